"""Hooks that write change exactly what they are told to, leave no trace, and complain when they never ran."""

from __future__ import annotations

import pytest
import torch

from core.capture import HookDidNotFire, capture, capture_residual
from core.errors import SlimscopeError
from core.intervene import intervene
from tests.tiny import DECODERS, FAMILIES, n_hooks, tiny_model

IDS = torch.tensor([[5, 9, 3, 7, 9, 3]])


def run(loaded):
    with torch.inference_mode():
        if loaded.family == "vision":
            torch.manual_seed(0)
            return loaded.model(pixel_values=torch.randn(1, 3, 32, 32))[0]
        return loaded.model(IDS)[0]


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_that_changes_nothing_is_bit_equal_and_leaves_no_hook(family, inputs):
    loaded = tiny_model(family)
    plain = run(loaded)
    paths = [block.path for block in loaded.anatomy.blocks]
    n = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
    with intervene(loaded.model, paths, lambda path, hidden: hidden, inputs=inputs):
        assert torch.equal(run(loaded), plain)
    assert torch.equal(run(loaded), plain)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()) == n


@pytest.mark.parametrize("family", DECODERS)
def test_what_is_written_after_a_block_is_what_the_next_block_reads(family):
    loaded = tiny_model(family)
    shift = torch.linspace(-1, 1, loaded.anatomy.d_model)
    with capture_residual(loaded) as before:
        plain = run(loaded)
    path = loaded.anatomy.blocks[0].path
    with intervene(loaded.model, [path], lambda p, hidden: hidden + shift), capture_residual(loaded) as after:
        changed = run(loaded)
    one, two = list(before.values()), list(after.values())
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1] + shift, two[1])
    assert (changed - plain).abs().max() > 1e-3, "a change that does not reach the output was not made"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_input_and_output_of_the_same_place_are_one(family):
    loaded = tiny_model(family)
    first, second = (block.path for block in loaded.anatomy.blocks[:2])
    with intervene(loaded.model, [first], lambda p, hidden: 2 * hidden):
        by_output = run(loaded)
    with intervene(loaded.model, [second], lambda p, hidden: 2 * hidden, inputs=True):
        assert torch.equal(run(loaded), by_output)


def test_a_tuple_keeps_its_other_elements():
    loaded = tiny_model("llama")
    path = loaded.anatomy.blocks[0].attention
    with (
        intervene(loaded.model, [path], lambda p, hidden: torch.zeros_like(hidden)),
        capture(loaded.model, [path]) as seen,
    ):
        run(loaded)
    assert not seen[path].any(), "a capture opened later sees the changed value"


def test_an_unfired_hook_is_an_error_and_every_hook_goes():
    loaded = tiny_model("llama")
    path = loaded.anatomy.blocks[0].path
    before = n_hooks(loaded.model)
    with pytest.raises(HookDidNotFire, match="never ran"), intervene(loaded.model, [path], lambda p, h: h):
        pass
    with pytest.raises(ZeroDivisionError), intervene(loaded.model, [path], lambda p, h: h):
        raise ZeroDivisionError
    assert n_hooks(loaded.model) == before


@pytest.mark.parametrize("change", [lambda p, h: h[:, :1], lambda p, h: h.double()])
def test_a_change_of_shape_or_dtype_is_refused(change):
    loaded = tiny_model("llama")
    path = loaded.anatomy.blocks[0].path
    with pytest.raises(SlimscopeError, match=path), intervene(loaded.model, [path], change):
        run(loaded)


def test_an_unknown_path_is_named():
    with (
        pytest.raises(KeyError, match="no_such"),
        intervene(tiny_model("llama").model, ["no_such"], lambda p, h: h),
    ):
        pass
