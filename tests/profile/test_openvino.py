"""OpenVINO graphs against the model itself in torch: prompts, forced tokens, batches, stored grids, encoders."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import CannotMeasure
from core.models.open import open_model
from core.profile.runtimes import openvino
from core.types import ModelRef
from tests.profile import graphs
from tests.profile.graphs import expected, rounded_variant
from tests.tiny import tiny_folder

pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None or find_spec("nncf") is None, reason="OpenVINO is not installed"
)


opened = partial(graphs.opened, openvino)


@pytest.mark.parametrize(
    "family", ["smollm", pytest.param("gemma2", marks=[pytest.mark.slow, pytest.mark.rotating]),
               pytest.param("gpt2", marks=[pytest.mark.slow, pytest.mark.rotating])],
)  # fmt: skip
def test_its_logits_are_the_models_over_prompts_and_forced_tokens(family: str, tmp_path: Path):
    """Past a window of 16 tokens for gemma2; two sequences; a shorter prompt first, of which nothing may be left."""
    folder = tiny_folder(family, tmp_path / "model")
    tokens_BP = np.random.default_rng(0).integers(0, 512, (2, 42))
    runtime = opened(folder, tmp_path, batch=2)
    for end in (7, 40):
        runtime.prefill(tokens_BP[:, :end])
        assert np.abs(runtime.logits() - expected(folder, tokens_BP[:, :end])).max() < 2e-4
    runtime.decode(tokens_BP[:, 40:41])
    runtime.decode(tokens_BP[:, 41:42])
    wanted = expected(folder, tokens_BP)
    assert np.abs(runtime.logits() - wanted).max() < 2e-4
    runtime.decode()
    longer = np.hstack([tokens_BP, wanted.argmax(-1)[:, None]])
    assert np.abs(runtime.logits() - expected(folder, longer)).max() < 2e-4
    facts = runtime.facts()
    shape = json.loads((folder / "config.json").read_text())
    assert facts.exact
    if family == "smollm":
        head = shape["hidden_size"] // shape["num_attention_heads"]
        per_token = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * 4
        assert facts.kv_cache_bytes == 2 * 43 * per_token


@pytest.mark.slow
@pytest.mark.rotating
@pytest.mark.parametrize(("bits", "scheme"), [(8, "symmetric"), (4, "affine")])
def test_stored_integer_weights_stay_packed_and_are_the_artifacts(bits: int, scheme: str, tmp_path: Path):
    stored = rounded_variant(tmp_path, bits=bits, scheme=scheme)
    runtime = opened(stored, tmp_path)
    made = runtime._made
    assert made["own_grid"] == made["packed"] > 0
    dense = sum(p.numel() * 4 for p in open_model(ModelRef(str(stored), dtype="float32")).model.parameters())
    assert made["file_bytes"] < dense * (bits + 8) / 32
    tokens_BP = np.random.default_rng(0).integers(0, 512, (1, 12))
    runtime.prefill(tokens_BP[:, :11])
    runtime.decode(tokens_BP[:, 11:])
    wanted = expected(stored, tokens_BP)
    assert np.abs(runtime.logits() - wanted).max() < 1e-3 * np.ptp(wanted)


@pytest.mark.slow
@pytest.mark.rotating
def test_fewer_bits_move_the_answers_a_little_and_their_numbers_are_named_so(tmp_path: Path):
    folder = tiny_folder("smollm", tmp_path / "model")
    tokens_BP = np.random.default_rng(0).integers(0, 512, (1, 12))
    wanted = expected(folder, tokens_BP)
    distances = {}
    for weights in ("int8", "int4"):
        runtime = opened(folder, tmp_path, weights=weights)
        runtime.prefill(tokens_BP)
        distances[weights] = np.abs(runtime.logits() - wanted).max()
        assert not runtime.facts().exact
        assert runtime._settings.suffix == f"_openvino_{weights}"
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
        output = loaded.model(pixel_values=torch.from_numpy(inputs))
        wanted = output.logits if "logits" in output else output.last_hidden_state
    runtime.prefill(inputs)
    assert np.abs(runtime.logits() - wanted.detach().numpy()).max() < 2e-4
    with pytest.raises(CannotMeasure, match="int8"):
        opened(folder, tmp_path, weights="int4")
