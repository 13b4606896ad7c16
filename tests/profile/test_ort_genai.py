"""ONNX Runtime GenAI against the model itself in torch: prompts, forced tokens, batches, what it refuses."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import CannotMeasure
from core.profile.runtimes import ort_genai
from core.types import silent
from tests.profile import graphs
from tests.profile.graphs import expected, rounded_variant
from tests.tiny import tiny_folder

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime_genai") is None, reason="ONNX Runtime GenAI is not installed"
)


opened = partial(graphs.opened, ort_genai)


@pytest.mark.parametrize("family", ["smollm", "qwen3"])
def test_its_logits_are_the_models_over_batches_of_prompts_and_forced_tokens(family: str, tmp_path: Path):
    """Also where a prompt or a forced token is one that the tokenizer calls the end of text, or padding."""
    folder = tiny_folder(family, tmp_path / "model")
    end_of_text = json.loads((folder / "config.json").read_text()).get("eos_token_id") or 0
    for batch in (1, 2):
        tokens_BP = np.random.default_rng(batch).integers(1, 511, (batch, 24))
        tokens_BP[:, [3, 16, 17]] = end_of_text
        runtime = opened(folder, tmp_path, batch=batch)
        for end in (20, 16):  # a longer prompt first: nothing of it may be left
            runtime.prefill(tokens_BP[:, :end])
            assert np.abs(runtime.logits() - expected(folder, tokens_BP[:, :end])).max() < 1e-4
        for end in range(17, 21):
            runtime.decode(tokens_BP[:, end - 1 : end])
        wanted = expected(folder, tokens_BP[:, :20])
        assert np.abs(runtime.logits() - wanted).max() < 1e-4
        runtime.decode()
        wanted[:, -1] = -np.inf  # the one token that it may not pick
        longer = np.hstack([tokens_BP[:, :20], wanted.argmax(-1)[:, None]])
        assert np.abs(runtime.logits() - expected(folder, longer)).max() < 1e-4
        facts = runtime.facts()
        shape = json.loads((folder / "config.json").read_text())
        head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        per_token = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * 4
        assert facts.exact
        assert facts.kv_cache_bytes == batch * 21 * per_token


@pytest.mark.parametrize(
    ("bits", "scheme"),
    [(4, "affine"), pytest.param(8, "symmetric", marks=(pytest.mark.slow, pytest.mark.rotating))],
)
def test_stored_integer_weights_stay_packed_and_are_the_artifacts(bits: int, scheme: str, tmp_path: Path):
    stored = rounded_variant(tmp_path, bits=bits, scheme=scheme)
    runtime = opened(stored, tmp_path)
    made = runtime._made
    assert (
        made["own_grid"] == made["packed"] - (bits == 8) > 0
    )  # a table of 8 bits is looked up, not multiplied
    assert made["weight_bytes"]["uint8"] > 0
    tokens_BP = np.random.default_rng(0).integers(0, 511, (1, 12))
    runtime.prefill(tokens_BP[:, :11])
    runtime.decode(tokens_BP[:, 11:])
    wanted = expected(stored, tokens_BP)
    # the opener multiplies codes and scales in the scales' own narrow dtype
    assert np.abs(runtime.logits() - wanted).max() < 1e-3 * np.ptp(wanted)


def test_fewer_bits_move_the_answers_a_little_and_their_numbers_are_named_so(tmp_path: Path):
    folder = tiny_folder("smollm", tmp_path / "model")
    tokens_BP = np.random.default_rng(0).integers(0, 511, (1, 12))
    wanted = expected(folder, tokens_BP)
    asked: dict[str, dict[str, Any]] = {
        "_int8": {"weights": "int8"},
        "_int4": {"weights": "int4"},
        "_int4_head_int8": {"weights": "int4", "head": "int8"},
        "_int4_g16_zp_k_quant_a32": {"weights": "int4", "block_size": "16", "zero_points": True,
                                     "algorithm": "k_quant", "activations": "float"},
    }  # fmt: skip
    distance, size = {}, {}
    for name, settings in asked.items():
        runtime = opened(folder, tmp_path, **settings)
        runtime.prefill(tokens_BP)
        distance[name] = np.abs(runtime.logits() - wanted).mean()
        size[name] = runtime.facts().weights_memory_bytes
        assert not runtime.facts().exact
        assert runtime._settings.suffix == f"_ort_genai{name}"
    assert 1e-4 < distance["_int8"] < distance["_int4_head_int8"] < distance["_int4"]
    assert distance["_int4_g16_zp_k_quant_a32"] < distance["_int4"]
    assert size["_int4"] < min(size["_int8"], size["_int4_head_int8"])


@pytest.mark.slow
@pytest.mark.rotating
def test_measured_whole_in_processes_of_its_own_and_held_against_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    folder = tiny_folder("smollm", tmp_path / "model")
    asked = {"tier": "rapid", "threads": 1, "prompt_tokens": 32, "new_tokens": 8, "batch": 2, "depth": 48}
    result = ort_genai.run(folder, silent, ort_genai.OrtGenaiSettings.model_validate(asked))
    found = {metric.name: metric.value for metric in result.metrics}
    assert found["decode_tokens_per_s_ort_genai_depth_48"] > 0
    assert found["parity_top1_ort_genai_depth_48"] == 1
    assert found["parity_kl_ort_genai_depth_48"] < 1e-6


def test_an_architecture_that_its_builder_does_not_know_is_refused_with_another_way(tmp_path: Path):
    folder = tiny_folder("mixtral", tmp_path / "model")
    with pytest.raises(CannotMeasure, match=r"cannot write MixtralForCausalLM .*measure it in onnx_runtime"):
        opened(folder, tmp_path)
