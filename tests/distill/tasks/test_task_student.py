"""From a body to a task and from a teacher to its student, on the catalog: bases, parents, what was learned, McNemar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.catalog.store import Catalog
from core.corpus.sources import open_rows
from core.corpus.splits import split
from core.errors import BadInput
from core.loop import compare, evaluate_variant, make_variant
from core.pairwise import pairwise
from core.recipe import Recipe
from tests.tiny import tiny_folder

TRAINING = {
    "held_out": 0.3,
    "window": 16,
    "max_tokens": 4000,
    "epochs": 60,
    "batch_tokens": 128,
    "micro_batch": 8,
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path_factory.mktemp('catalog') / 'c.db'}")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether a text speaks of water or of France, the word somewhere among others."""
    drawn = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "two.tsv"
    others = ("one", "hundred", "degrees", "store", "drink", "left", "right", "index")
    lines = ["text\tlabel"]
    for n in range(120):
        words = list(drawn.choice(others, 5))
        words.insert(int(drawn.integers(6)), ("water", "France")[n % 2])
        lines.append(f"{' '.join(words)}\t{('wet', 'land')[n % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_task_student_is_held_against_its_teacher(catalog: Catalog, labelled: Path, tmp_path: Path) -> None:
    body = tiny_folder("bert", tmp_path / "body")
    settings = {**TRAINING, "data": str(labelled), "learning_rate": 1e-3}
    teacher = make_variant(catalog, str(body), Recipe.of("fine_tune", **settings)).variant
    assert (teacher.family, teacher.base_id) == ("classifier", teacher.id)
    assert len(teacher.parents) == 1
    cut = {"method": "drop_layers", "settings": {"criterion": "even", "count": 1}}
    taught = {"method": "distil", "settings": settings}
    student = make_variant(catalog, teacher.source, Recipe.parse({"steps": [cut, taught]})).variant
    assert student.base_id == teacher.id
    assert student.parameters < teacher.parameters
    for made in (teacher, student):
        evaluate_variant(catalog, made.id)  # on the held-out rows of what it learned from
    rows = compare(catalog, base=teacher.id).set_index("variant")
    assert set(rows.index) == {teacher.id, student.id}
    assert rows.loc[teacher.id, "accuracy"] > 0.9
    assert rows.loc[student.id, "kl"] > 0 == rows.loc[teacher.id, "kl"]
    found = pairwise(catalog, [teacher.id, student.id]).iloc[0]
    held_out = split(open_rows(str(labelled)), held_out=0.3, seed=0)[1]
    assert found["n"] == len(held_out)
    assert found["accuracy_a"] == rows.loc[teacher.id, "accuracy"]
    assert found["accuracy_b"] - found["accuracy_a"] == pytest.approx(
        (found["only_b"] - found["only_a"]) / found["n"]
    )
    learned = tmp_path / "learned.tsv"
    learned.write_text("\n".join(labelled.read_text().splitlines()[:40]) + "\n")
    with pytest.raises(BadInput, match="were learned from"):
        evaluate_variant(catalog, student.id, documents=str(learned))


def test_scored_pairs_train_the_body_alone(catalog: Catalog, tmp_path: Path) -> None:
    """What is like must become unlike: the untrained body finds texts of the same words alike by itself."""
    drawn = np.random.default_rng(0)
    words = ("one", "hundred", "water", "store", "drink", "left", "right", "index", "Paris", "Rome")
    lines = ["score\tsentence1\tsentence2"]
    for _ in range(60):
        a, b = (list(drawn.choice(words, 4, replace=False)) for _ in range(2))
        lines.append(f"{4 - len(set(a) & set(b))}\t{' '.join(a)}\t{' '.join(b)}")
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    body = tiny_folder("bert", tmp_path / "body", seed=1)
    made = make_variant(catalog, str(body), Recipe.of("fine_tune", **{**TRAINING, "data": str(path)})).variant
    assert (made.family, made.base_id) == ("encoder", made.parents[0])
    run = evaluate_variant(catalog, made.id, method="sentence_similarity")
    value = {m.name: m.value for m in run.measurements}
    assert value["delta_spearman"] > 0
