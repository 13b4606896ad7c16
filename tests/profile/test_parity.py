"""Parity: a runtime that changes nothing passes, one that changes a little is measured, one that lies is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import CannotMeasure
from core.models.open import open_model
from core.profile import parity, reference
from core.profile.parity import check, refuse_another_model
from core.profile.reference import TEXTS
from core.profile.runtimes._base import PARITY_PROMPT, PARITY_STEPS
from core.profile.runtimes.torch_eager import TorchEager, TorchEagerSettings, create
from core.types import ModelRef, silent
from tests.tiny import tiny_folder

SETTINGS = TorchEagerSettings(threads=1, batch=3)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family → folder of a tiny model and the file of its own answers."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            home = tmp_path_factory.mktemp(family)
            folder, file = tiny_folder(family, home / "model"), home / "answers.npz"
            reference.answer({"folder": str(folder), "file": str(file)}, silent)
            made[family] = folder, file
        return made[family]

    return of


def loaded(folder: Path, settings: TorchEagerSettings = SETTINGS) -> TorchEager:
    runtime = create(settings, folder)
    runtime.prepare(folder)
    runtime.load()
    return runtime


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "bert", "bert_classifier", "vit"])
def test_a_runtime_that_changes_nothing_answers_as_the_artifact(kept: Any, family: str):
    """Step by step with a cache, three texts at a time, against whole texts without a cache."""
    folder, file = kept(family)
    runtime = loaded(folder)
    kind = open_model(ModelRef(str(folder))).family
    held = check(runtime, kind, SETTINGS, file, None, longest_s=60)
    assert held.texts == TEXTS
    assert held.max_abs < 1e-5 * held.span
    assert all(kl < 1e-9 for kl in held.kl)
    assert bool(held.kl) == (kind != "encoder")
    if kind == "decoder":
        assert held.positions == TEXTS * (1 + PARITY_STEPS)
        assert held.top1 == (1.0,) * TEXTS
    refuse_another_model(held, runtime.facts(), SETTINGS)
    runtime.close()


def test_the_kept_answers_are_those_of_texts_read_one_by_one(kept: Any):
    folder, file = kept("llama")
    wanted, model = reference.read(file), open_model(ModelRef(str(folder))).model
    assert wanted.answers.shape[:2] == (TEXTS, 1 + PARITY_STEPS)
    for ids, answers in zip(wanted.inputs[:3], wanted.answers, strict=False):
        for place in (0, 5, PARITY_STEPS):
            with torch.inference_mode():
                alone = model(input_ids=torch.from_numpy(ids[None, : PARITY_PROMPT + place])).logits[0, -1]
            assert answers[place] == pytest.approx(alone.numpy(), abs=1e-4)


class Lying(TorchEager):
    """Adds a little to one logit, once it decodes."""

    def logits(self) -> np.ndarray:
        answers = super().logits().copy()
        answers[:, 7] += 0.02 * np.ptp(answers)
        return answers


def test_another_models_speed_is_refused_where_nothing_should_differ(kept: Any):
    folder, file = kept("llama")
    runtime = Lying(SETTINGS)
    runtime.prepare(folder)
    runtime.load()
    held = check(runtime, "decoder", SETTINGS, file, None, longest_s=60)
    facts = runtime.facts()
    with pytest.raises(CannotMeasure, match="does not run this model as it is"):
        refuse_another_model(held, facts, SETTINGS)
    refuse_another_model(
        held, facts.model_copy(update={"exact": False}), SETTINGS
    )  # a runtime that rounds is told, not refused
    runtime.close()


def test_the_loss_is_the_divergence_of_the_answers(kept: Any):
    """Half precision against the formula written out, with the base's own answers beside it."""
    folder, file = kept("llama")
    settings = SETTINGS.model_copy(update={"dtype": "bfloat16"})
    runtime = loaded(folder, settings)
    held = check(runtime, "decoder", settings, file, file, longest_s=60)
    assert held.kl_base == held.kl
    wanted = reference.read(file)
    runtime.prefill(np.take(wanted.inputs, range(3), axis=0)[:, :PARITY_PROMPT])
    p = torch.from_numpy(wanted.answers[:3, 0]).double().softmax(-1)
    q = torch.from_numpy(runtime.logits()).double().log_softmax(-1)
    first = (p * (p.log() - q)).sum(-1).numpy()
    assert first.min() > 0
    one = parity._distance(runtime.logits()[:, None], wanted.answers[:3, :1], names_classes=True)[0]
    assert one == pytest.approx(first, rel=1e-6)
    named = {metric.name: metric for metric in parity.metrics(held)}
    assert named["parity_kl"].value == pytest.approx(np.mean(held.kl))
    assert named["parity_kl"].low < named["parity_kl"].value < named["parity_kl"].high
    runtime.close()


def test_a_loss_that_is_noticed_is_flagged(kept: Any):
    folder, file = kept("llama")
    held = check(loaded(folder), "decoder", SETTINGS, file, None, longest_s=60)
    assert list(parity.flags(held)) == []
    assert list(parity.flags(held.model_copy(update={"kl": (0.2,) * TEXTS}))) == ["parity_loss"]


def test_a_slow_model_is_asked_less(kept: Any):
    folder, file = kept("llama")
    held = check(loaded(folder), "decoder", SETTINGS, file, None, longest_s=0)
    assert parity.FEWEST <= held.texts < TEXTS
