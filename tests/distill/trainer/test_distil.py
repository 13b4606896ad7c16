from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.compress import distil, fine_tune
from core.distill.settings import DistilSettings, FineTuneSettings
from core.errors import BadInput, CannotCompress
from core.models.open import open_model
from core.models.targets import targets
from core.types import ModelRef, silent
from tests.tiny import CORPUS, tiny_folder

QUICK: dict[str, Any] = {
    "window": 32, "batch_tokens": 64, "max_tokens": 400, "evaluate_every": 0, "learning_rate": 1e-3, "held_out": 0.3,
}  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> str:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(CORPUS * 4):
        (folder / f"{number}.txt").write_text(f"Text {number}. {text} ".replace("\n", " ") * 8)
    return str(folder)


def test_a_student_learns_what_its_teacher_says(tmp_path: Path, texts: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    teacher, student = (open_model(ModelRef(str(tiny_folder("smollm", tmp_path / "m")))) for _ in range(2))
    untaught = {name: p.detach().clone() for name, p in teacher.model.named_parameters()}
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    settings = DistilSettings(**QUICK, data=texts, top_k=16)
    with torch.inference_mode():  # as recipes run their steps
        found = distil.run(student, teacher, None, silent, tmp_path / "scratch", settings)
    value = {metric.name: metric.value for metric in found.metrics}
    assert value["held_out_kl_after"] < 0.9 * value["held_out_kl_before"]
    assert all(torch.equal(p, untaught[name]) for name, p in teacher.model.named_parameters())
    assert not any(p.requires_grad for p in student.model.parameters())
    assert found.frame["module"].tolist() == [target.module for target in targets(student)]
    assert found.frame["touched"].all()
    assert set(found.frames) == {"main", "curve", "held_out", "rows", "samples"}
    assert found.notes[0].startswith("KL(teacher ‖ student) went from ")
    assert student.learned[-1].source == texts


def test_fine_tuning_a_head_leaves_the_rest(tmp_path: Path, texts: str) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path / "m"))))
    settings = FineTuneSettings(**QUICK, data=texts, train="head", samples=0)
    found = fine_tune.run(loaded, None, silent, None, settings)
    moved = found.frame.set_index("module")["touched"]
    assert moved["lm_head"]
    assert not moved.filter(like="layers.").any()
    assert (
        found.frame.set_index("module").loc["model.layers.0.mlp.up_proj", "reason"]
        == "not moved by train=head"
    )


def test_nothing_to_learn_is_refused_before_any_work(tmp_path: Path, texts: str) -> None:
    teacher, student = (open_model(ModelRef(str(tiny_folder("llama", tmp_path / "m")))) for _ in range(2))
    with pytest.raises(BadInput, match="every weight is 0"):
        distil.run(student, teacher, None, silent, None, DistilSettings(**QUICK, data=texts, kd_weight=0))


def test_what_cannot_be_trained_is_refused_before_the_teacher_reads(
    tmp_path: Path, texts: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    teacher, student = (open_model(ModelRef(str(tiny_folder("llama", tmp_path / "m")))) for _ in range(2))
    settings = DistilSettings(**QUICK, data=texts, train="scales_and_norms")
    with pytest.raises(CannotCompress, match="for a quantized model"):
        distil.run(student, teacher, None, silent, None, settings)
    assert not (tmp_path / "cache" / "teachers").exists()


def test_a_teacher_that_cannot_read_the_student_s_rows_is_refused(tmp_path: Path, texts: str) -> None:
    teacher, student = (open_model(ModelRef(str(tiny_folder("llama", tmp_path / "m")))) for _ in range(2))
    teacher.anatomy = replace(teacher.anatomy, context_length=16)
    with pytest.raises(BadInput, match="context of 16"):
        distil.run(student, teacher, None, silent, None, DistilSettings(**QUICK, data=texts))
