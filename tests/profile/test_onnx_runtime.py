"""ONNX graphs in ONNX Runtime against the model itself in torch: prompts, forced tokens, batches, stored grids."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import SlimscopeError
from core.models.open import open_model
from core.profile.runtimes import onnx_runtime
from core.types import ModelRef
from tests.profile import graphs
from tests.profile.graphs import expected, rounded_variant
from tests.tiny import tiny_folder

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None,
    reason="ONNX Runtime is not installed",
)
SLOW = (pytest.mark.slow, pytest.mark.rotating)


opened = partial(graphs.opened, onnx_runtime)


@pytest.mark.parametrize(
    ("family", "batch"),
    [("smollm", 1), pytest.param("smollm", 2, marks=SLOW), pytest.param("gpt2", 1, marks=SLOW),
     pytest.param("gemma2", 1, marks=SLOW), pytest.param("mixtral", 1, marks=SLOW)],
)  # fmt: skip
def test_its_logits_are_the_models_over_prompts_and_forced_tokens(family: str, batch: int, tmp_path: Path):
    """Past a window of 16 tokens for gemma2; a longer prompt first, of which nothing may be left in the cache."""
    folder = tiny_folder(family, tmp_path / "model")
    tokens_BP = np.random.default_rng(0).integers(0, 512, (batch, 42))
    runtime = opened(folder, tmp_path, batch=batch)
    for end in (40, 7):
        runtime.prefill(tokens_BP[:, :end])
        assert np.abs(runtime.logits() - expected(folder, tokens_BP[:, :end])).max() < 1e-4
    for end in range(8, 31):
        runtime.decode(tokens_BP[:, end - 1 : end])
    wanted = expected(folder, tokens_BP[:, :30])
    assert np.abs(runtime.logits() - wanted).max() < 1e-4
    runtime.decode()
    longer = np.hstack([tokens_BP[:, :30], wanted.argmax(-1)[:, None]])
    assert np.abs(runtime.logits() - expected(folder, longer)).max() < 1e-4
    facts = runtime.facts()
    assert facts.exact
    if family == "smollm":
        model = open_model(ModelRef(str(folder))).model
        parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert facts.weights_memory_bytes == pytest.approx(
            parameters, rel=0.01
        )  # a shared table is stored once
        shape = json.loads((folder / "config.json").read_text())
        head = shape["hidden_size"] // shape["num_attention_heads"]
        per_token = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * 4
        assert facts.kv_cache_bytes == batch * 31 * per_token
        # one sequence's attention writes into the cache, several sequences' copy it
        assert ("GroupQueryAttention" in facts.attention_kernel) == (batch == 1) == runtime._made["room"]


@pytest.mark.slow
@pytest.mark.rotating
@pytest.mark.parametrize(("bits", "scheme"), [(4, "affine"), (8, "symmetric")])
def test_stored_integer_weights_stay_packed_and_are_the_artifacts(bits: int, scheme: str, tmp_path: Path):
    stored = rounded_variant(tmp_path, bits=bits, scheme=scheme)
    runtime = opened(stored, tmp_path)
    made = runtime._made
    assert (
        made["own_grid"] == made["packed"] - (bits == 8) > 0
    )  # a table of 8 bits is looked up, not multiplied
    assert made["weight_bytes"]["uint8"] > 0
    tokens_BP = np.random.default_rng(0).integers(0, 512, (1, 12))
    runtime.prefill(tokens_BP[:, :11])
    runtime.decode(tokens_BP[:, 11:])
    wanted = expected(stored, tokens_BP)
    # the opener multiplies codes and scales in the scales' own narrow dtype
    assert np.abs(runtime.logits() - wanted).max() < 1e-3 * np.ptp(wanted)


@pytest.mark.slow
@pytest.mark.rotating
def test_fewer_bits_move_the_answers_a_little_and_their_numbers_are_named_so(tmp_path: Path):
    folder = tiny_folder("smollm", tmp_path / "model")
    tokens_BP = np.random.default_rng(0).integers(0, 512, (1, 12))
    wanted = expected(folder, tokens_BP)
    distances = {}
    for weights in ("int8", "int4"):
        runtime = opened(folder, tmp_path, weights=weights, activations="float")
        runtime.prefill(tokens_BP)
        distances[weights] = np.abs(runtime.logits() - wanted).max()
        assert not runtime.facts().exact
        assert runtime._settings.suffix == f"_onnx_runtime_{weights}_a32"
    assert 1e-4 < distances["int8"] < distances["int4"]


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_encoders_and_vision_models_answer_as_they_are(family: str, tmp_path: Path):
    folder = tiny_folder(family, tmp_path / "model")
    runtime = opened(folder, tmp_path, batch=2)
    loaded = open_model(ModelRef(str(folder), dtype="float32"))
    if family == "bert":
        inputs = np.random.default_rng(0).integers(0, 512, (2, 9))
        wanted = loaded.model(input_ids=torch.from_numpy(inputs)).last_hidden_state
    else:
        shape = tuple(runtime._made["image_shape"])
        inputs = np.random.default_rng(0).uniform(-1, 1, (2, *shape)).astype(np.float32)
        wanted = loaded.model(pixel_values=torch.from_numpy(inputs)).logits
    runtime.prefill(inputs)
    assert np.abs(runtime.logits() - wanted.detach().numpy()).max() < 1e-4


def test_a_cache_of_something_else_is_refused_in_one_sentence(tmp_path: Path):
    folder = tiny_folder("jamba", tmp_path / "model")
    with pytest.raises(SlimscopeError, match="keeps something else than keys and values, which ONNX Runtime"):
        opened(folder, tmp_path)
