"""GGUF: the converted model computes what the original did, once per content, and leaves nothing when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from core.errors import Cancelled, CannotOpen
from core.models.gguf import converted_gguf
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def write_gguf(path: Path) -> Path:
    """The tiny Llama as llama.cpp's converter would write it: its names, its q/k row order, float32."""
    loaded = tiny_model("llama")
    config, state = loaded.model.config, loaded.model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(loaded.tokenizer.get_vocab().items(), key=lambda pair: pair[1])  # type: ignore[union-attr]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(vocabulary) - 1)])
    writer.add_token_merges([f"{a} {b}" for a, b in merges(loaded.tokenizer)])
    for special in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        special(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp rotates neighbouring rows, transformers the two halves of a head.
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name.removesuffix(".weight"))
        assert stored is not None
        writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_converted_model_computes_what_the_original_does(tiny_gguf: Path) -> None:
    loaded, original = open_model(ModelRef(str(tiny_gguf))), tiny_model("llama")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    text = "The capital of France is Paris."
    assert loaded.tokenizer is not None
    assert original.tokenizer is not None
    assert loaded.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


def test_same_content_is_converted_once(
    tiny_gguf: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = converted_gguf(tiny_gguf)
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    monkeypatch.setattr("core.models.gguf._convert", lambda *_: pytest.fail("converted again"))
    assert converted_gguf(copy) == first
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.name]


def test_a_conversion_that_was_killed_leaves_no_trap(tiny_gguf: Path, cache: Path) -> None:
    folder = converted_gguf(tiny_gguf)
    half = folder.with_suffix(".tmp")
    folder.rename(half)
    (half / "model.safetensors").unlink()
    assert converted_gguf(tiny_gguf) == folder
    assert (folder / "model.safetensors").is_file()
    assert not half.exists()


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_truncated_file(part: float, tiny_gguf: Path, tmp_path: Path, cache: Path) -> None:
    content = tiny_gguf.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CannotOpen, match="cut short, damaged") as caught:
        converted_gguf(broken)
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(CannotOpen, match="is not a GGUF file"):
        open_model(ModelRef(str(tmp_path / "text.gguf")))
    with pytest.raises(CannotOpen, match="does not exist"):
        open_model(ModelRef(str(tmp_path / "nothing.gguf")))


def test_cancelling_leaves_nothing(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: float, total: float, message: str) -> None:
        raise Cancelled("stop")

    monkeypatch.setattr("core.models.gguf.POLL_SECONDS", 0.001)
    with pytest.raises(Cancelled):
        converted_gguf(tiny_gguf, progress=stop)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_two_processes_share_one_conversion(tiny_gguf: Path, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from core.models.gguf import converted_gguf; "
        "print(converted_gguf(Path(sys.argv[1])))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, tiny_gguf], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    folders = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert folders[0] == folders[1]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(folders[0]).name]
