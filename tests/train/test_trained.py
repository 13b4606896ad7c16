"""A trained instrument comes back as it was saved, and is refused wherever its numbers would mean nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from core.catalog.store import Catalog
from core.errors import BadInput
from core.registry import Settings
from core.train._trained import Learned, bound_to, load, unembedding_hash
from core.types import Documents
from tests.tiny import tiny_model

DOCUMENTS = Documents("words", "calibration", ("one two three",))


def learned(family: str = "llama", method: str = "tuned_lens") -> Learned:
    return Learned(
        tensors={"a": torch.randn(3, 4), "b": torch.arange(3)},
        facts=bound_to(tiny_model(family), DOCUMENTS, method=method, settings=Settings(), layer=1),
        tables={"snippets": pd.DataFrame({"feature": [0, 1], "text": ["é", "\U0001f600"]})},
    )


def test_what_is_saved_comes_back(tmp_path: Path):
    saved = learned()
    saved.save(tmp_path / "a")
    found = load(str(tmp_path / "a"), method="tuned_lens", loaded=tiny_model("llama"))
    assert found.facts == saved.facts
    assert found.facts["layer"] == 1
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in saved.tensors.items())
    pd.testing.assert_frame_equal(found.tables["snippets"], saved.tables["snippets"])


def test_a_catalog_artifact_is_found_by_its_hash_or_the_first_digits_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    learned().save(tmp_path / "a")
    hash_ = Catalog().put_artifact(tmp_path / "a")
    for name in (hash_, hash_[:8]):
        assert load(name, method="tuned_lens", loaded=tiny_model("llama")).facts["layer"] == 1
    with pytest.raises(BadInput, match="is not in the catalog"):
        load("0" * 64, method="tuned_lens", loaded=tiny_model("llama"))


def test_another_model_is_refused_by_name(tmp_path: Path):
    learned("llama").save(tmp_path / "a")
    with pytest.raises(BadInput, match=r"was trained on .*llama .*gpt2 is another model"):
        load(str(tmp_path / "a"), method="tuned_lens", loaded=tiny_model("gpt2"))


def test_a_variant_made_from_that_model_is_accepted(tmp_path: Path):
    learned("llama").save(tmp_path / "a")
    base = tiny_model("llama")
    record = {"base": {"source": "x", "fingerprint": base.fingerprint}}
    (tmp_path / "slimscope.json").write_text(json.dumps(record))
    variant = replace(base, fingerprint="another", folder=tmp_path)
    assert load(str(tmp_path / "a"), method="tuned_lens", loaded=variant).facts["layer"] == 1
    stranger = replace(variant, folder=Path("nowhere"))
    with pytest.raises(BadInput, match="is another model"):
        load(str(tmp_path / "a"), method="tuned_lens", loaded=stranger)


def _lose_facts(folder: Path) -> None:
    (folder / "facts.json").unlink()


def _cut_facts(folder: Path) -> None:
    (folder / "facts.json").write_text("{")


def _age(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({**facts, "version": 0}))


def _cut_weights(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"1234567890")


def _cut_table(folder: Path) -> None:
    (folder / "snippets.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "holds nothing trained"),
        (_lose_facts, "holds nothing trained"),
        (_cut_facts, "holds nothing trained"),
        (_age, "another version"),
        (_cut_weights, "are damaged"),
        (_cut_table, "are damaged"),
    ],
)
def test_damage_is_refused(tmp_path: Path, harm, message: str):
    learned().save(tmp_path / "a")
    harm(tmp_path / "a")
    with pytest.raises(BadInput, match=message):
        load(str(tmp_path / "a"), method="tuned_lens", loaded=tiny_model("llama"))


@pytest.mark.parametrize(
    ("artifact", "message"),
    [("", "no trained tuned_lens was chosen"), ("mine", "neither a folder nor a hash")],
)
def test_no_artifact_is_refused(artifact: str, message: str):
    with pytest.raises(BadInput, match=message):
        load(artifact, method="tuned_lens", loaded=tiny_model("llama"))


def test_another_method_is_refused(tmp_path: Path):
    learned(method="sparse_autoencoder").save(tmp_path / "a")
    with pytest.raises(BadInput, match="a trained sparse_autoencoder, not a tuned_lens"):
        load(str(tmp_path / "a"), method="tuned_lens", loaded=tiny_model("llama"))


def test_the_unembedding_hash_sees_one_changed_weight():
    loaded = tiny_model("llama")
    before = unembedding_hash(loaded)
    weight = loaded.model.get_submodule(loaded.anatomy.final_norm).weight
    with torch.no_grad():
        kept = weight[0].clone()
        weight[0] += 1
        after = unembedding_hash(loaded)
        weight[0] = kept
    assert after != before
    assert unembedding_hash(loaded) == before
