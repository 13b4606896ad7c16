"""Hooks read and leave no trace: bit-equal outputs, removed on every exit, silent ones reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.capture import HookDidNotFire, capture, capture_residual
from core.errors import SlimscopeError
from core.models.anatomy_verify import eager_attention
from core.models.loaded import LoadedModel
from tests.tiny import DECODERS, FAMILIES, LAYERS, MOE, n_hooks, tiny_model


def inputs_for(loaded: LoadedModel) -> dict[str, Any]:
    torch.manual_seed(1)
    if loaded.family == "vision":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": torch.randint(loaded.anatomy.vocab_size, (2, 9))}


def answer(loaded: LoadedModel, **options: Any) -> Any:
    with torch.inference_mode():
        return loaded.model(**inputs_for(loaded), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooked_forward_is_bit_equal_and_leaves_nothing(family: str) -> None:
    loaded = tiny_model(family)
    plain = answer(loaded)[0]
    before = n_hooks(loaded.model)
    paths = [p for b in loaded.anatomy.blocks for p in (b.path, b.attention, b.v, b.o, b.mlp_write)]
    with capture(loaded.model, paths) as out, capture_residual(loaded) as residual:
        hooked = answer(loaded)[0]
    assert torch.equal(plain, hooked)
    assert out.keys() == set(paths)
    assert len(residual) == LAYERS + 1
    assert n_hooks(loaded.model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_is_what_transformers_calls_hidden_states(family: str) -> None:
    """An independent source: output_hidden_states (whose last entry is already normed, so it is not compared)."""
    loaded = tiny_model(family)
    with capture_residual(loaded) as residual:
        states = answer(loaded, output_hidden_states=True).hidden_states
    assert list(residual) == [*(block.path for block in loaded.anatomy.blocks), "final"]
    for ours, theirs in zip(list(residual.values())[:LAYERS], states[:LAYERS], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_what_transformers_calls_attentions(family: str) -> None:
    loaded = tiny_model(family)
    paths = [block.attention for block in loaded.anatomy.blocks]
    with eager_attention(loaded.model), capture(loaded.model, paths, item=1) as patterns:
        attentions = answer(loaded, output_attentions=True).attentions
    for path, theirs in zip(paths, attentions, strict=True):
        assert torch.equal(patterns[path], theirs)
        torch.testing.assert_close(theirs.sum(-1), torch.ones(theirs.shape[:-1]))


def test_patterns_under_a_fused_kernel_are_an_error_that_says_what_to_do() -> None:
    loaded = tiny_model("llama")
    before = n_hooks(loaded.model)
    assert loaded.model.config._attn_implementation == "sdpa"
    with (
        pytest.raises(SlimscopeError, match=r"attention kernel: sdpa.*set_attn_implementation\('eager'\)"),
        capture(loaded.model, [loaded.anatomy.blocks[0].attention], item=1),
    ):
        answer(loaded)
    assert n_hooks(loaded.model) == before


def test_eager_attention_puts_the_kernel_back_after_an_error() -> None:
    loaded = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), eager_attention(loaded.model):
        _ = 1 / (loaded.model.config._attn_implementation == "sdpa")
    assert loaded.model.config._attn_implementation == "sdpa"


def test_reduce_runs_inside_the_hook_and_only_its_value_is_kept() -> None:
    loaded = tiny_model("llama")
    seen: list[str] = []

    def norm(path: str, tensor: torch.Tensor) -> float:
        seen.append(path)
        return float(tensor.norm())

    with capture_residual(loaded, reduce=norm) as norms:
        answer(loaded)
    assert seen == [*(block.path for block in loaded.anatomy.blocks), "final"]
    assert all(isinstance(value, float) for value in norms.values())
    with capture_residual(loaded) as residual:
        answer(loaded)
    assert norms["final"] == pytest.approx(float(residual["final"].norm()))


def test_every_batch_row_is_kept() -> None:
    """A hook written for tuple outputs would silently take row 0 of a layer that returns a plain tensor."""
    loaded = tiny_model("llama")
    last = loaded.anatomy.blocks[-1].path
    with capture(loaded.model, [last]) as values:
        answer(loaded)
    assert values[last].shape[:2] == (2, 9)


@pytest.mark.parametrize("family", MOE)
def test_the_routers_choice_is_read_from_the_experts_arguments(family: str) -> None:
    loaded = tiny_model(family)
    experts = next(block.experts for block in loaded.anatomy.blocks if block.experts is not None)
    with (
        capture(loaded.model, [experts], inputs=True, item=1) as chosen,
        capture(loaded.model, [experts], inputs=True, item=2) as weights,
    ):
        answer(loaded)
    assert chosen[experts].shape == weights[experts].shape == (18, 2)
    assert chosen[experts].dtype == torch.int64


def test_a_hook_that_never_fires_is_an_error() -> None:
    loaded = tiny_model("llama")
    before = n_hooks(loaded.model)
    hooks = capture(loaded.model, ["model.layers.0"])
    with pytest.raises(HookDidNotFire, match=r"model\.layers\.0 was hooked but never ran"), hooks:
        pass
    assert n_hooks(loaded.model) == before


def test_a_path_that_does_not_exist_is_an_error_before_any_hook() -> None:
    loaded = tiny_model("llama")
    before = n_hooks(loaded.model)
    with (
        pytest.raises(KeyError, match="no module"),
        capture(loaded.model, ["model.layers.0", "model.nothing"]),
    ):
        pass
    assert n_hooks(loaded.model) == before


def test_hooks_go_when_the_forward_raises() -> None:
    loaded = tiny_model("llama")
    before = n_hooks(loaded.model)
    with pytest.raises(ZeroDivisionError), capture_residual(loaded):
        _ = 1 / int(answer(loaded)[0].isnan().sum())
    assert n_hooks(loaded.model) == before


@pytest.mark.parametrize("family", DECODERS)
def test_bfloat16_is_bit_equal_too(family: str, tmp_path: Any) -> None:
    from core.models.open import open_model
    from core.types import ModelRef
    from tests.tiny import tiny_folder

    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path)), dtype="bfloat16"))
    assert loaded.dtype == "bfloat16"
    plain = answer(loaded).logits
    with capture_residual(loaded):
        assert torch.equal(answer(loaded).logits, plain)
