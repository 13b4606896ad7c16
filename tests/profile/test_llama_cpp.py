"""llama.cpp by its C interface against the model itself in torch."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import CannotMeasure, CannotOpen, MissingLibrary
from core.models.open import open_model
from core.profile.built import FACTS
from core.profile.runtimes import _llama_library, llama_cpp
from core.profile.runtimes._gguf_file import GgufProfileSettings, build
from core.profile.runtimes._llama_library import VARIABLE, Library, Session, find_library
from core.types import ModelRef, silent
from tests.tiny import tiny_folder

needs_library = pytest.mark.skipif(
    not os.environ.get(VARIABLE) and find_spec("xllamacpp") is None,
    reason="llama.cpp's library is not installed (pip install xllamacpp)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("smollm", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the artifact's own numbers, as the building process leaves it."""
    target = tmp_path_factory.mktemp("files")
    facts = build(folder, target, silent, GgufProfileSettings(weights="stored"))
    (target / FACTS).write_text(json.dumps(facts))
    return target


def opened(folder: Path, files: Path, **settings: object) -> llama_cpp.LlamaCpp:
    parsed = llama_cpp.LlamaCppSettings.model_validate(
        {"weights": "stored", "kv_cache": "f32", "threads": 1, **settings}
    )
    runtime = llama_cpp.create(parsed, files)
    runtime.prepare(folder)
    runtime.load()
    return runtime


def expected(folder: Path, tokens_BP: np.ndarray) -> np.ndarray:
    model = open_model(ModelRef(str(folder))).model
    with torch.inference_mode():
        logits: np.ndarray = (
            model(input_ids=torch.from_numpy(tokens_BP), logits_to_keep=1).logits[:, -1].numpy()
        )
    return logits


@needs_library
def test_its_logits_are_the_models_over_batches_of_prompts_and_forced_tokens(folder: Path, files: Path):
    # 2 × 1100 tokens are more than one of llama.cpp's batches (2048) holds
    tokens_BP = np.random.default_rng(0).integers(0, 512, (2, 1102))
    runtime = opened(folder, files, batch=2, prompt_tokens=1100)
    for end in (7, 1100):  # a short prompt first: nothing of it may be left
        runtime.prefill(tokens_BP[:, :end])
        assert np.abs(runtime.logits() - expected(folder, tokens_BP[:, :end])).max() < 2e-4
    for end in (1101, 1102):
        runtime.decode(tokens_BP[:, end - 1 : end])
        assert np.abs(runtime.logits() - expected(folder, tokens_BP[:, :end])).max() < 2e-4
    picked = runtime.logits().argmax(-1)[:, None]
    runtime.decode()
    assert np.abs(runtime.logits() - expected(folder, np.hstack([tokens_BP, picked]))).max() < 2e-4
    facts = runtime.facts()
    shape = json.loads((folder / "config.json").read_text())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    per_token = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head * 4
    assert facts.exact
    assert facts.kv_cache_bytes == pytest.approx(2 * 1103 * per_token, rel=0.02)
    assert facts.dtype == "float32"
    assert sum(facts.conditions["gguf"]["weight_bytes"].values()) == facts.weights_memory_bytes
    runtime.close()


@needs_library
def test_what_cannot_be_opened_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    library = Library(find_library())
    with pytest.raises(CannotOpen, match=r"llama\.cpp cannot load model\.gguf: "):
        Session(library, tmp_path / "model.gguf")
    monkeypatch.setitem(_llama_library.DEFAULTS, "n_batch", 4096)  # as if the layout had moved
    with pytest.raises(CannotMeasure, match="another interface than the one known here"):
        Library(find_library())
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CannotMeasure, match=f"{VARIABLE} names a folder without"):
        find_library()


def test_a_files_numbers_bear_its_type_in_their_names():
    names = [
        GgufProfileSettings(weights="stored").marks,
        GgufProfileSettings(weights="q4_1").marks,
        llama_cpp.LlamaCppSettings(weights="q8_0", kv_cache="q8_0").marks,
    ]
    assert names == [(), ("q4_1",), ("q8_0", "kv_q8_0")]
    assert llama_cpp.LlamaCppSettings(weights="q4_1").suffix == "_llama_cpp_q4_1"


@pytest.mark.skipif(find_spec("xllamacpp") is not None, reason="the library is installed")
def test_without_its_library_it_says_how_to_add_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_cpp, "LIBRARIES", (_llama_library.WHEEL,))
    with pytest.raises(MissingLibrary, match=r"run `pip install xllamacpp=="):
        llama_cpp.run(folder, silent, llama_cpp.LlamaCppSettings(tier="rapid"))
