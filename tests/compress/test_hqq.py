"""HQQ: equal to a slow version, never worse than round-to-nearest in any group, exact on a grid's own points."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.quantize.grid_fit import Grid, grouped, half_quadratic
from tests.compress.making import apply, own_model
from tests.references import slow_grids

OPTIONS = {"beta": 10.0, "kappa": 1.01, "iterations": 6, "refit_scale": True}


def heavy_tailed(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, columns) * torch.randn(rows, columns).exp() * 0.05


def started(weight: torch.Tensor, scheme: IntegerScheme) -> tuple[torch.Tensor, Grid]:
    return grouped(weight, scheme), Grid.of(quantize(weight, scheme))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_the_slow_version(bits: int) -> None:
    groups, nearest = started(heavy_tailed(3, 64), IntegerScheme(bits, 32, symmetric=False))
    grid, _ = half_quadratic(groups, nearest, p=0.7, **OPTIONS)
    assert nearest.zero_RG is not None
    assert grid.zero_RG is not None
    moved = 0
    for row in range(3):
        for group in range(2):
            values = groups[row, group].tolist()
            start = float(nearest.scale_RG[row, group]), float(nearest.zero_RG[row, group])
            expected = slow_grids.half_quadratic(
                values, *start, bits=bits, p=0.7, beta=10.0, kappa=1.01, iterations=6
            )
            found = float(grid.scale_RG[row, group]), float(grid.zero_RG[row, group])
            assert found[0] == pytest.approx(expected[0], rel=2e-3)  # one step of float16
            assert found[1] == expected[1]
            moved += found != start
    assert moved >= 3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0, 2.0])
def test_no_group_is_worse_than_nearest_and_the_error_never_grows(p: float, symmetric: bool) -> None:
    weight = heavy_tailed(16, 128, seed=1)
    groups, nearest = started(weight, IntegerScheme(3, 32, symmetric))
    grid, curve = half_quadratic(groups, nearest, p=p, **OPTIONS)
    assert all(later <= earlier for earlier, later in pairwise(curve))
    assert curve[-1] < curve[0]

    def error(of: Grid) -> torch.Tensor:
        stored = of.pack(groups).dequantize().float().view_as(groups)
        return (stored - groups).abs().pow(p).sum(-1)

    # Products of codes and scales are stored in float16.
    assert (error(grid) <= error(nearest) * 1.01).all()


def test_weights_on_a_grid_stay_there() -> None:
    scheme = IntegerScheme(4, 32, symmetric=False)
    on_grid = quantize(heavy_tailed(8, 64), scheme).dequantize().float()
    groups, nearest = started(on_grid, scheme)
    grid, curve = half_quadratic(groups, nearest, p=0.7, **OPTIONS)
    assert torch.allclose(grid.pack(groups).dequantize().float(), on_grid, rtol=2e-3)
    assert curve[-1] <= curve[0]


def test_a_lone_outlier_no_longer_coarsens_its_group() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * 0.1
    weight[:, 5] = 0.55
    scheme = IntegerScheme(3, 64, symmetric=False)
    groups, nearest = started(weight, scheme)
    grid, _ = half_quadratic(groups, nearest, p=0.7, **{**OPTIONS, "iterations": 20})
    assert (grid.scale_RG < nearest.scale_RG).sum() >= 2


@pytest.mark.parametrize("family", ["smollm", "mixtral"])
def test_the_model_holds_what_is_packed_and_every_matrix_gained(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    result = apply(loaded, "hqq", bits=3, iterations=5)
    fits = result.frames["fits"]
    assert (fits["error_left"] < 1).all()
    assert len(fits) == len(result.frame[result.frame["format"].str.startswith("int3")])
    for module, packed in loaded.packed.items():
        name = module if family == "mixtral" and "experts" in module else f"{module}.weight"
        weight = loaded.model.get_parameter(name)
        assert torch.equal(weight, packed.dequantize().to(weight.dtype))
