"""Low-bit KV caches: the stored bytes, what is read back, and what a model then computes."""

from __future__ import annotations

import pytest
import torch

from core.errors import CannotMeasure
from core.evaluate._token_scores import next_token_logits
from core.models.kv_cache import KV_CACHES, bytes_per_head, from_bytes, new_cache, to_bytes
from core.text.windows import Window
from tests.tiny import tiny_model

LOW = [kind for kind in KV_CACHES if kind != "model"]
HALF_STEP = {"int8": 0.5 / 255, "int4": 0.5 / 15, "int2": 0.5 / 3}


def states(size: int, *, seed: int = 0) -> torch.Tensor:
    """Random keys [2, 3, 5, size] with an outlier channel, as real keys have."""
    drawn = torch.randn(2, 3, 5, size, generator=torch.Generator().manual_seed(seed))
    drawn[..., 1] *= 20
    return drawn


@pytest.mark.parametrize("size", [16, 64, 80])
@pytest.mark.parametrize("kind", LOW)
def test_what_is_kept_has_the_stated_bytes_and_reads_back_twice_alike(kind, size):
    rows = to_bytes(states(size), kind)
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 3, 5, bytes_per_head(size, kind))
    once = from_bytes(rows, kind, size=size)
    twice = from_bytes(to_bytes(once, kind), kind, size=size)
    assert (once - twice).abs().max() <= 2e-3 * once.abs().max()  # scales are float16: 2^-11, taken twice


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_an_integer_cache_errs_by_half_a_step_of_its_group(kind):
    keys = states(64)
    groups = keys.unflatten(-1, (2, 32))
    span = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
    error = (from_bytes(to_bytes(keys, kind), kind, size=64).unflatten(-1, (2, 32)) - groups).abs()
    # A rounded zero point may cost one end of the range another half step; float16 scales 2^-11 of the range.
    assert bool((error <= span * (2 * HALF_STEP[kind] + 2**-10)).all())
    assert bool((error.mean() > 0).all())


def test_a_float8_cache_errs_by_a_sixteenth_at_most():
    keys = states(64)
    kept = from_bytes(to_bytes(keys, "fp8"), "fp8", size=64)
    normal = keys.abs() > keys.abs().amax(-1, keepdim=True) * 2**-13
    assert bool(((kept - keys).abs() <= keys.abs() * 2**-4 * 1.01)[normal].all())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "mixtral"])
def test_a_prompt_read_at_once_and_token_by_token_gives_the_same_under_every_cache(family):
    loaded = tiny_model(family)
    ids = torch.arange(3, 27)[None] % loaded.anatomy.vocab_size
    for kind in LOW:
        with torch.inference_mode():
            whole = loaded.model(ids, past_key_values=new_cache(loaded.model, kind), use_cache=True).logits
            cache, steps = new_cache(loaded.model, kind), []
            for token in ids.T:
                steps.append(loaded.model(token[None], past_key_values=cache, use_cache=True).logits)
        stepped = torch.cat(steps, dim=1)
        # A token's key may round to the next code where a matrix product of one row differs in its last bit.
        assert (whole - stepped).abs().median() < 1e-4 * whole.abs().max()


def test_fewer_bits_move_the_logits_further_and_the_models_own_cache_not_at_all():
    loaded = tiny_model("llama")
    ids = (torch.arange(40) * 7 % loaded.anatomy.vocab_size).numpy()
    window = Window(0, 1, 40)
    plain = next_token_logits(loaded, ids, window)
    moved = {
        kind: float((next_token_logits(loaded, ids, window, kv_cache=kind) - plain).norm())
        for kind in KV_CACHES
    }
    assert moved["model"] == 0
    assert 0 < moved["int8"] < moved["int4"] < moved["int2"]
    assert moved["int8"] < moved["fp8"] < moved["int4"]


def test_a_model_that_keeps_a_state_instead_is_refused_by_name():
    with pytest.raises(CannotMeasure, match=r"kv_cache=int8: layer 0 of JambaForCausalLM keeps a"):
        new_cache(tiny_model("jamba").model, "int8")
