"""Residual map: exact components with fixed signs, distances kept, variance shares that add up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core.capture import capture_residual
from core.errors import BadInput, SlimscopeError
from core.models.open import open_model
from core.probes.residual_map import ResidualMapSettings, principal_components, residual_map
from core.types import ModelRef, Prompt, silent
from tests.tiny import FAMILIES, LAYERS, tiny_folder, tiny_model

PROMPT = Prompt("The capital of France is Paris")
TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]


def slow_first_component(rows):
    """Power iteration on the covariance matrix: the direction of largest variance, and that variance."""
    covariance = rows.T @ rows
    vector = torch.ones(len(covariance), dtype=torch.float64)
    for _ in range(20_000):
        vector = covariance @ vector
        vector = vector / vector.norm()
    return vector, float(vector @ covariance @ vector)


def test_the_first_component_is_the_direction_of_largest_variance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 7, generator=generator, dtype=torch.float64) * torch.tensor(
        [3.0, 2, 1, 1, 1, 1, 1]
    )
    rows = rows - rows.mean(0)
    parts = principal_components(rows)
    direction, variance = slow_first_component(rows)
    direction = direction * direction[direction.abs().argmax()].sign()
    assert parts.directions_KD[0].numpy() == pytest.approx(direction.numpy(), abs=1e-9)
    assert float(parts.share_K[0]) == pytest.approx(variance / float(rows.square().sum()), abs=1e-12)
    assert parts.scores_NK[:, 0].numpy() == pytest.approx((rows @ direction).numpy(), abs=1e-8)
    assert float(parts.share_K.sum()) == pytest.approx(1)
    assert parts.gap < 1e-13


def test_a_rotation_changes_no_distance_and_no_share():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    one, two = principal_components(rows), principal_components(rows @ rotation)
    assert one.share_K.numpy() == pytest.approx(two.share_K.numpy(), abs=1e-12)
    ours, theirs = torch.cdist(one.scores_NK, one.scores_NK), torch.cdist(rows, rows)
    assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-6)


def test_signs_do_not_depend_on_the_solver():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    one, flipped = principal_components(rows), principal_components(-rows)
    assert one.directions_KD.numpy() == pytest.approx(flipped.directions_KD.numpy(), abs=1e-9)
    assert (one.directions_KD.gather(1, one.directions_KD.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("centre", ["all", "layer"])
@pytest.mark.parametrize("scale", ["unit", "none"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_points_are_the_captured_stream_projected(family, scale, centre):
    loaded = tiny_model(family)
    result = residual_map(loaded, PROMPT, silent, ResidualMapSettings(scale=scale, centre=centre))
    assert result.provenance.exactness_gap < 1e-12
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode(), capture_residual(loaded) as residual:
        loaded.model(ids)
    stream = torch.stack([value[0].double() for value in residual.values()])
    norms = stream.norm(dim=-1)
    assert result.frame["norm"].to_numpy() == pytest.approx(norms.flatten().numpy(), rel=1e-6)
    if scale == "unit":
        stream = stream / norms[..., None]
    mean = stream.mean((0, 1)) if centre == "all" else stream.mean(1, keepdim=True)
    rows = (stream - mean).flatten(0, 1)
    variance = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2
    shares = result.frames["components"]["share"].to_numpy()
    assert shares == pytest.approx((variance / variance.sum())[: len(shares)], abs=1e-9)
    drawn = result.frame[["pc1", "pc2", "pc3"]].to_numpy()
    assert (drawn**2).sum(0) == pytest.approx(variance[:3], rel=1e-6)
    assert result.metrics[0].value == pytest.approx(shares[:2].sum())


def test_positions_and_layers_choose_rows():
    frame = residual_map(
        tiny_model("llama"), PROMPT, silent, ResidualMapSettings(positions=2, layer_stride=2)
    ).frame
    assert sorted(frame["layer"].unique()) == [0, 2, LAYERS]
    assert frame["position"].nunique() == 2


def test_what_cannot_be_mapped_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="alike"):
        principal_components(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(BadInput, match="three vectors"):
        residual_map(tiny_model("llama"), PROMPT, silent, ResidualMapSettings(positions=1, layer_stride=64))
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    with torch.no_grad():
        loaded.model.get_submodule(loaded.anatomy.blocks[1].path).mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(SlimscopeError, match="not finite"):
        residual_map(loaded, PROMPT, silent, ResidualMapSettings())
