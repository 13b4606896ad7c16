"""SmoothQuant: scales as written down, exact before rounding, outliers moved, inputs rounded again after a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.compress.smoothquant import smoothing_scales
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.saving.description import settle
from core.types import Documents, ModelRef, Result, silent
from tests.compress.making import own_model, save
from tests.references import slow_awq
from tests.tiny import CORPUS

TEXT = Documents("corpus", "calibration", CORPUS * 4)
IDS = (torch.arange(48) * 37 % 512).view(2, 24)


def smooth(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "smoothquant")
    with torch.inference_mode():
        result: Result = chosen.run(
            loaded, TEXT, silent, None, chosen.parse({"samples": 8, "sample_tokens": 32, **settings})
        )
    return result


def output(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS)[0].double()


def with_outliers(folder: Path) -> LoadedModel:
    """A model whose norms make two channels forty times larger than the rest."""
    loaded = own_model("llama", folder)
    for layer in loaded.model.model.layers:
        layer.input_layernorm.weight.data[[5, 77]] *= 40
        layer.post_attention_layernorm.weight.data[[9, 30]] *= 40
    return loaded


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scales_equal_the_slow_version(alpha: float) -> None:
    torch.manual_seed(0)
    x_TI, weights = torch.randn(40, 12) * torch.rand(12) * 9, [torch.randn(8, 12), torch.randn(4, 12)]
    largest_w = torch.cat(weights).abs().amax(0)
    found = smoothing_scales(x_TI.abs().amax(0), largest_w, alpha)
    assert torch.allclose(found, slow_awq.smoothing_scales(x_TI, weights, alpha), rtol=1e-5)
    assert smoothing_scales(torch.zeros(2), torch.ones(2), alpha).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_outliers_move_into_weights_and_the_loss_falls(activations: str, tmp_path: Path) -> None:
    expected = output(with_outliers(tmp_path / "exact").model)
    wrong = {}
    for alpha in (0.0, 0.5):
        loaded = with_outliers(tmp_path / str(alpha))
        result = smooth(loaded, alpha=alpha, activations=activations)
        wrong[alpha] = float((output(loaded.model) - expected).norm() / expected.norm())
        assert result.provenance.exactness_gap is not None
        assert result.provenance.exactness_gap < 1e-5
        inputs = result.frames["inputs"].set_index("module")
    # alpha 0 leaves inputs to be flattened by nothing but the weights' own ranges.
    assert wrong[0.5] < 0.7 * wrong[0.0]
    read_by_q = inputs.loc["model.layers.0.self_attn.q_proj"]
    assert read_by_q["outlier_after"] < 0.5 * read_by_q["outlier_before"]


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_reload_rounds_inputs_likewise(activations: str, tmp_path: Path) -> None:
    loaded = with_outliers(tmp_path / "model")
    result = smooth(loaded, activations=activations, places="all")
    settle(loaded)
    save(loaded, result, tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    assert again.activations == loaded.activations
    assert len(again.activations) == 21
    assert all((scheme.scale is None) == (activations == "dynamic") for scheme in again.activations.values())
    assert torch.equal(output(again.model), output(loaded.model))
    weights = result.frame.set_index("module").loc["model.layers.1.mlp.up_proj"]
    assert weights["format"] == "int8 channel symmetric"


def test_experts_are_stored_in_8_bits_with_their_inputs_as_they_are(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    result = smooth(loaded, activations="static")
    assert not any("experts" in module for module in loaded.activations)
    assert any("not rounded" in note for note in result.notes)
    experts = result.frame[result.frame["component"] == "experts"]
    assert (experts["format"] == "int8 channel symmetric").all()


def test_a_conv1d_is_refused_unless_its_inputs_stay(tmp_path: Path) -> None:
    loaded = own_model("gpt2", tmp_path)
    with pytest.raises(CannotCompress, match="choose activations=none"):
        smooth(loaded)
    assert not loaded.packed
    smooth(loaded, activations="none")
    assert not loaded.activations
