"""Mixed precision: bytes promised, proof of the reload, assignments, pins, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compress._pipeline import compress
from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from core.registry import get
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS

TEXT = Documents("corpus", "calibration", tuple(" ".join(CORPUS[i:] + CORPUS[:i]) * 2 for i in range(4)) * 2)
FEW = {"score_samples": 8, "score_tokens": 24}


def mixed(loaded: LoadedModel, **settings: object) -> Result:
    """The step in memory."""
    method = get("compress", "mixed_precision")
    result: Result = method.run(loaded, TEXT, silent, None, method.parse({**FEW, **settings}))
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A mixed variant of a tied model through the whole pipeline."""
    folder = tmp_path_factory.mktemp("mixed")
    recipe = Recipe.of("mixed_precision", budget="5bpw", **FEW)
    return compress(own_model("smollm", folder), recipe, TEXT, folder / "files", silent)


def test_the_file_is_as_large_as_promised_and_reloads(made) -> None:
    value = {metric.name: metric.value for metric in made.result.metrics}
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert value["promised_bytes"] == pytest.approx(made.saved.bytes, rel=0.02)
    assert made.saved.bytes <= 5 * made.saved.parameters / 8
    assert len(set(made.result.frames["parts"]["format"])) > 1, "a mixture was wanted"


def test_predicted_and_measured_loss_are_told_as_the_parts_are_stored(made) -> None:
    curve = made.result.frames["stages"]
    assert curve["parts"].iloc[-1] == len(made.result.frames["parts"])
    assert curve["loss"].is_monotonic_increasing
    last = curve.iloc[-1]
    assert last["loss_low"] <= last["loss"] <= last["loss_high"]
    assert last["predicted"] == pytest.approx(last["loss"], rel=0.5)


def test_it_beats_one_format_at_equal_bytes(made, tmp_path: Path) -> None:
    parts = made.result.frames["cells"]
    of = parts[parts["format"].isin(["int4g32"]) & (parts["part"] != "embedding")]
    uniform = dict.fromkeys(of["group"], "int4g32") | {"embedding": "float8"}
    text = ", ".join(f"{group}:{choice}" for group, choice in uniform.items())
    one = mixed(own_model("smollm", tmp_path / "one"), assignment=text)
    nbytes = next(metric.value for metric in one.metrics if metric.name == "promised_bytes")
    many = mixed(own_model("smollm", tmp_path / "many"), budget=f"{nbytes / 1e6:.6f}MB")
    assert next(m.value for m in many.metrics if m.name == "promised_bytes") <= nbytes
    assert many.frames["stages"]["loss"].iloc[-1] < one.frames["stages"]["loss"].iloc[-1]


def test_an_assignment_makes_the_same_weights_again(made, tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    result = mixed(loaded, assignment=made.result.provenance.conditions["assignment"])
    assert result.frames["parts"]["format"].tolist() == made.result.frames["parts"]["format"].tolist()
    assert result.frames["stages"]["loss"].iloc[-1] == made.result.frames["stages"]["loss"].iloc[-1]


def test_a_pin_is_kept_and_gptq_stores_it_too(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    result = mixed(loaded, budget="6bpw", pins="1.o:int8", quantizer="gptq", samples=8, sample_tokens=24)
    main = result.frame.set_index("module")
    assert main.loc["model.layers.1.self_attn.o_proj", "format"] == "int8 channel symmetric"
    assert result.frames["stages"]["loss"].iloc[-1] > 0


@pytest.mark.parametrize(("settings", "error", "said"), [
    ({"budget": "0.01MB"}, BadInput, r"cannot be met: the minimum is 0\.\d+ MB"),
    ({"pins": "9.qkv:int4"}, BadInput, r"'9.qkv' is no part of this model; its parts are: embedding, 0.qkv"),
    ({"pins": "embedding:int8, 0.o:int4"}, BadInput, "cannot stand in one file"),
    ({"assignment": "0.o:int4, 1.o:int8, embedding:int4"}, CannotCompress, "embeddings as plain floats only"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(
    settings: dict[str, str], error: type[Exception], said: str, tmp_path: Path
) -> None:
    loaded = own_model("smollm", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises(error, match=said):
        mixed(loaded, **settings)
    assert not loaded.packed
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_a_budget_in_bits_predicts_the_size_and_names_stay_short() -> None:
    by_bits = Recipe.of("mixed_precision", budget="4.5bpw").steps[0].parsed()
    assert set(by_bits.stored_bits(None).values()) == {4.5}
    long = Recipe.of("mixed_precision", assignment=", ".join(f"{n}.o:int4" for n in range(99)))
    with pytest.raises(BadInput):
        long.steps[0].parsed().stored_bits(None)
    assert len(long.label()) < 120
