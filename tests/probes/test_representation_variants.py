"""Probes and steering on what a user has: a reloaded compressed-tensors variant, a bfloat16 model, a CUDA device."""

from __future__ import annotations

import pytest
import torch

from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.compress.making import apply, own_model, save
from tests.tiny import tiny_folder

PROMPT = Prompt("The capital of France is")
SETTINGS = {
    "linear_probe": {"data": "builtin:tense", "folds": 3},
    "steering": {"max_new_tokens": 4},
    "residual_map": {},
    "nearest_tokens": {},
}


def run(loaded, id_):
    method = get("probe", id_)
    return method.run(loaded, PROMPT, silent, method.parse(SETTINGS[id_]))


def finite(result):
    return all(frame.select_dtypes("number").notna().all(axis=None) for frame in result.frames.values())


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variant")
    loaded = own_model("llama", folder)
    save(loaded, apply(loaded, "rtn", bits=8), folder / "made")
    return open_model(ModelRef(str(folder / "made")))


@pytest.mark.parametrize("id_", SETTINGS)
def test_on_a_compressed_variant(variant, id_):
    result = run(variant, id_)
    assert finite(result)
    assert result.provenance.exactness_gap < 1e-4


@pytest.mark.parametrize("id_", SETTINGS)
def test_on_a_bfloat16_model(tmp_path, id_):
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path)), dtype="bfloat16"))
    result = run(loaded, id_)
    assert finite(result)
    assert result.provenance.exactness_gap < 0.05, "bfloat16 keeps 8 bits"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("id_", SETTINGS)
def test_on_a_cuda_device(tmp_path, id_):
    folder = str(tiny_folder("llama", tmp_path))
    on_device = run(open_model(ModelRef(folder, device="cuda")), id_)
    on_cpu = run(open_model(ModelRef(folder)), id_)
    assert finite(on_device)
    name = {
        "linear_probe": "accuracy",
        "steering": "kl_nats",
        "residual_map": "norm",
        "nearest_tokens": "cosine",
    }[id_]
    assert on_device.frame[name].to_numpy() == pytest.approx(on_cpu.frame[name].to_numpy(), abs=2e-2)
