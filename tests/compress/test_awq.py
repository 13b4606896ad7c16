"""AWQ: without scales it is round-to-nearest, its folds change nothing, its losses only fall; equal to a slow version."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from core.calibrate.collected import Inputs
from core.errors import Cancelled
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.quantize.scale_search import Reader, search_scales
from core.quantize.scaling_places import places
from core.registry import get
from core.types import Documents, ModelRef, Result, silent
from tests.compress.making import apply, own_model, save
from tests.references import slow_awq
from tests.tiny import CORPUS

TEXT = Documents("corpus", "calibration", CORPUS * 4)
SMALL: dict[str, Any] = {"bits": 3, "samples": 8, "sample_tokens": 32, "scale_steps": 5, "clip_steps": 4}
IDS = (torch.arange(48) * 37 % 512).view(2, 24)


def awq(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "awq")
    with torch.inference_mode():
        result: Result = chosen.run(loaded, TEXT, silent, None, chosen.parse({**SMALL, **settings}))
    return result


def output(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS)[0].double()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "olmoe"])
def test_without_scales_and_clipping_it_is_rounding_to_nearest(family: str, tmp_path: Path) -> None:
    plain, loaded = own_model(family, tmp_path / "a"), own_model(family, tmp_path / "b")
    apply(plain, "rtn", bits=3)
    result = awq(loaded, scale_steps=0, clip_steps=0, refits=0)
    for (name, one), other in zip(plain.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert result.frames["losses"]["loss_left"].eq(1).all()


@pytest.mark.parametrize(
    "family",
    ["qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "gemma2", "bert", "mixtral", "qwen2_moe", "gpt_oss"],
)
def test_any_scales_can_be_folded_at_every_place(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    expected = output(loaded.model)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    torch.manual_seed(0)
    moved = 0
    with torch.inference_mode():
        for block in loaded.anatomy.blocks:
            for place in places(loaded, block):
                size = len(place.pool(torch.ones(place.readers[0].shape[1])))
                place.apply(torch.rand(size) * 3 + 0.2)
                moved += 1
    got = output(loaded.model)
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert moved >= len(loaded.anatomy.blocks)
    changed = sum(not torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert changed >= 3 * len(loaded.anatomy.blocks)


def salient() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs of which three channels are large, and two matrices that read them."""
    torch.manual_seed(1)
    x_TI = torch.randn(256, 64)
    x_TI[:, [3, 20, 50]] *= 25
    return x_TI, [torch.randn(32, 64) * 0.1, torch.randn(16, 64) * 0.2]


@cache
def found_on_salient(duo: bool = False) -> Any:
    x_TI, weights = salient()
    inputs = Inputs(frozenset({"gram", "mean_abs"}))
    inputs.add(x_TI)
    readers = [Reader(weight, inputs.gram_II, nearest) for weight in weights]
    sizes = torch.cat(weights).abs().mean(0) if duo else None
    return search_scales(
        readers, inputs.mean_abs_I, steps=10, weight_size_S=sizes, spread=lambda scale: scale
    )


def nearest(weight: torch.Tensor) -> torch.Tensor:
    return quantize(weight, IntegerScheme(3, 32, symmetric=False)).dequantize().float()


def test_the_search_equals_the_slow_version() -> None:
    x_TI, weights = salient()
    ratio, loss, before = slow_awq.best_ratio(weights, x_TI, nearest, 10)
    found = found_on_salient()
    assert found.ratio == ratio
    assert found.loss == pytest.approx(loss, rel=1e-3)
    assert found.loss_before == pytest.approx(before, rel=1e-3)
    assert 0 < ratio < 1
    assert loss < 0.5 * before


def test_scales_by_weights_too_are_never_worse_than_none() -> None:
    found = found_on_salient(duo=True)
    assert found.loss <= found.loss_before


@pytest.mark.parametrize(("family", "duo"), [("llama", False), ("mixtral", True), ("gpt2", False)])
def test_losses_only_fall_and_the_model_holds_what_is_packed(family: str, duo: bool, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    result = awq(loaded, duo=duo)
    scales, losses = result.frames["scales"], result.frames["losses"]
    assert (scales["loss"] <= scales["loss_before"] * (1 + 1e-6)).all()
    assert (losses["loss"] <= losses["loss_scaled"] * 1.001).all()  # products are stored in float16
    assert losses["loss"].sum() < 0.9 * losses["loss_nearest"].sum()
    assert result.provenance.exactness_gap is not None
    assert 0 < result.provenance.exactness_gap < 1e-5
    for module, packed in loaded.packed.items():
        names = dict(loaded.model.named_parameters())
        weight = names.get(f"{module}.weight", names.get(module))
        assert weight is not None
        assert torch.equal(weight, packed.dequantize().to(weight.dtype)), module
    save(loaded, result, tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    assert torch.equal(output(again.model), output(loaded.model))


def test_rounding_by_gptq_moves_the_outputs_less_on_the_same_grids(tmp_path: Path) -> None:
    losses = {
        rounding: awq(own_model("llama", tmp_path / rounding), rounding=rounding).frames["losses"]
        for rounding in ("nearest", "gptq")
    }
    first = losses["nearest"]["layer"] == 0  # later blocks read what the first ones give
    assert (losses["gptq"]["loss"][first] <= losses["nearest"]["loss"][first] * (1 + 1e-6)).all()
    assert losses["gptq"]["loss"][first].sum() < 0.7 * losses["nearest"]["loss"][first].sum()


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    chosen = get("compress", "awq")
    settings, scratch = chosen.parse(SMALL), tmp_path / "scratch"

    def stop(done: float, total: float, message: str) -> None:
        if "block 3" in message:
            raise Cancelled("stopped")

    once, again = own_model("qwen2", tmp_path / "once"), own_model("qwen2", tmp_path / "again")
    with torch.inference_mode(), pytest.raises(Cancelled):
        chosen.run(own_model("qwen2", tmp_path / "stopped"), TEXT, stop, scratch, settings)
    assert len(list(scratch.rglob("block_*.safetensors"))) == 2
    with torch.inference_mode():
        resumed = chosen.run(again, TEXT, silent, scratch, settings)
    result = awq(once)
    for (name, one), other in zip(once.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.frames["losses"].equals(result.frames["losses"])
