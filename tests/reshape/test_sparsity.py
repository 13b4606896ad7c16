"""Masks and updates of single matrices against slow references and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.reshape.reconstruction import reconstructed
from core.reshape.sparsity import (
    Sparsity,
    output_error,
    row_mask,
    sparsegpt,
    threshold_masks,
    wanda_scores,
)
from tests.references import slow_pruning

HALF, TWO_FOUR, FOUR_EIGHT = Sparsity(0.5), Sparsity.of("2:4", 0.9), Sparsity.of("4:8", 0.9)


def correlated(
    seed: int, *, rows: int = 24, inputs: int = 192, tokens: int = 600
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [O, I] and X [T, I] whose inputs hang together and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    sizes = torch.randn(inputs, generator=generator).exp()
    return torch.randn(rows, inputs, generator=generator), torch.randn(
        tokens, inputs, generator=generator
    ) @ mix * sizes


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0.01, 0.99), rows=st.integers(1, 5), inputs=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_every_row_loses_exactly_its_share(share: float, rows: int, inputs: int, seed: int) -> None:
    """Also where many values are equal, as on a grid of 4 bits."""
    scores = torch.randint(4, (rows, inputs), generator=torch.Generator().manual_seed(seed)).float()
    mask = row_mask(scores, Sparsity(share))
    assert (mask.sum(1) == int(share * inputs + 1e-9)).all()
    for row, gone in zip(scores, mask, strict=True):
        assert not gone.any() or gone.all() or row[gone].max() <= row[~gone].min()


@pytest.mark.parametrize("sparsity", [TWO_FOUR, FOUR_EIGHT])
def test_patterns_leave_half_of_every_aligned_group(sparsity: Sparsity) -> None:
    weight, _ = correlated(0)
    assert sparsity.group is not None
    kept = (~row_mask(weight.abs(), sparsity)).view(-1, sparsity.group[1]).sum(1)
    assert (kept == sparsity.group[1] // 2).all()


def test_wanda_is_the_slow_wanda_and_magnitude_where_inputs_are_equally_large() -> None:
    weight, x = correlated(1)
    for sparsity, slow in (
        (HALF, slow_pruning.wanda(weight.double().numpy(), x.double().numpy(), 0.5)),
        (TWO_FOUR, slow_pruning.n_of_m(weight.double().numpy(), x.double().numpy(), 2, 4)),
    ):
        mask = row_mask(wanda_scores(weight, x.square().sum(0)), sparsity)
        assert np.array_equal(mask.numpy(), slow == 0)
        assert not torch.equal(mask, row_mask(weight.abs(), sparsity))
        flat = row_mask(wanda_scores(weight, torch.full((192,), 7.0)), sparsity)
        assert torch.equal(flat, row_mask(weight.abs(), sparsity))


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.01, 0.99), levels=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_threshold_of_several_tensors_is_that_of_a_sort(share: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randint(-levels, levels + 1, shape, generator=generator) * 0.3
        for shape in ((3, 7), (5, 5), (1, 9))
    ]
    masks = list(threshold_masks(weights, share))
    every = torch.cat([w.abs().flatten() for w in weights])
    expected = torch.zeros(len(every), dtype=torch.bool)
    expected[every.argsort(stable=True)[: int(share * len(every) + 1e-9)]] = True
    assert torch.equal(torch.cat([m.flatten() for m in masks]), expected)


def test_sparsegpt_is_the_slow_sparsegpt() -> None:
    weight, x = correlated(2)
    slow = slow_pruning.sparsegpt(weight.double().numpy(), x.double().numpy(), 0.5, damping=0.01)
    fast, used = sparsegpt(weight, x.T @ x, HALF, damping=0.01)
    assert used == pytest.approx(0.01)
    same = (fast.numpy() == 0) == (slow == 0)
    assert same.mean() > 0.998  # ties within float32
    assert np.abs(fast.numpy() - slow)[same].mean() < 1e-3 * np.abs(slow).mean()


@pytest.mark.parametrize("sparsity", [HALF, TWO_FOUR])
def test_uncorrelated_equal_inputs_make_sparsegpt_magnitude_by_blocks_without_update(
    sparsity: Sparsity,
) -> None:
    weight, _ = correlated(3)
    pruned, _ = sparsegpt(weight, 5 * torch.eye(192), sparsity, damping=0.01)
    for start in (0, 128):
        block = weight[:, start : start + 128]
        if sparsity.group is None:
            gone = row_mask(block.abs().reshape(1, -1), sparsity).view(block.shape)
        else:
            gone = row_mask(block.abs(), sparsity)
        assert torch.equal(pruned[:, start : start + 128], block.masked_fill(gone, 0.0))


@pytest.mark.parametrize("sparsity", [HALF, TWO_FOUR, FOUR_EIGHT])
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_the_update_makes_good_what_its_mask_takes_and_beats_wanda_and_magnitude(
    sparsity: Sparsity, seed: int
) -> None:
    weight, x = correlated(seed)
    gram = x.T @ x
    pruned, _ = sparsegpt(weight, gram, sparsity, damping=0.01)
    with_update = output_error(weight, pruned, gram)
    assert with_update < 0.9 * output_error(weight, weight.masked_fill(pruned == 0, 0.0), gram)
    wanda = output_error(
        weight, weight.masked_fill(row_mask(wanda_scores(weight, gram.diagonal()), sparsity), 0.0), gram
    )
    magnitude = output_error(weight, weight.masked_fill(row_mask(weight.abs(), sparsity), 0.0), gram)
    assert with_update < wanda < magnitude


def test_inputs_that_were_always_zero_lose_their_weights_and_a_hopeless_gram_falls_back_to_magnitude() -> (
    None
):
    weight, x = correlated(7, inputs=64, tokens=20)
    x[:, 5] = 0
    pruned, used = sparsegpt(weight, x.T @ x, HALF, damping=0.01)
    assert used > 0.0099
    assert torch.isfinite(pruned).all()
    assert (pruned[:, 5] == 0).all()
    hopeless, used = sparsegpt(weight, torch.full((64, 64), torch.inf), HALF, damping=0.01)
    assert math.isnan(used)
    gone = row_mask(weight.abs().reshape(1, -1), HALF).view(weight.shape)
    assert torch.equal(hopeless, weight.masked_fill(gone, 0.0))


def test_output_error_is_that_of_the_outputs() -> None:
    weight, x = correlated(8)
    other = weight + 0.1
    expected = (x @ (other - weight).T).norm() / (x @ weight.T).norm()
    assert output_error(weight, other, x.T @ x) == pytest.approx(float(expected), rel=1e-4)


def test_reconstruction_is_least_squares_and_free_where_what_is_removed_can_be_written_by_the_rest() -> None:
    weight, x = correlated(9, inputs=40)
    kept = [i for i in range(40) if i % 3]
    slow = slow_pruning.reconstructed(weight.double().numpy(), x.double().numpy(), kept, damping=0.01)
    fast = reconstructed(weight, x.T @ x, torch.tensor(kept), damping=0.01)
    assert np.allclose(fast.numpy(), slow, atol=1e-3)
    assert (np.delete(fast.numpy(), kept, 1) == 0).all()
    x[:, 0] = 2 * x[:, 1] - x[:, 2]  # 0 is not kept, and 1 and 2 are
    x[:, 3::3] = 0
    free = reconstructed(weight, x.T @ x, torch.tensor(kept), damping=1e-7)
    assert output_error(weight, free, x.T @ x) < 1e-3
    assert output_error(weight, free, x.T @ x) < 0.01 * output_error(
        weight, weight.index_fill(1, torch.arange(0, 40, 3), 0.0), x.T @ x
    )
