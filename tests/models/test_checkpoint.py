"""The fingerprint is of content: the same tensors anywhere, another after any change, and free the second time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.models import checkpoint
from core.models.checkpoint import file_hash, fingerprint, stored_tensors
from tests.tiny import tiny_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    first = tiny_folder("llama", tmp_path / "first")
    same = tiny_folder("llama", tmp_path / "same")
    other = tiny_folder("llama", tmp_path / "other", seed=1)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


def test_fingerprint_changes_with_one_bit(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "llama")
    before = fingerprint(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert fingerprint(folder) != before


def test_fingerprint_ignores_the_order_of_tensors_and_who_wrote_the_config(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "llama")
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = dict(sorted(tensors.items(), reverse=True))
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt", "by": "someone"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"})
    )
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint(folder) != before


def test_fingerprint_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama", tmp_path / "llama")
    first = fingerprint(folder)
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(folder) == first


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_stored_tensors_agree_with_safetensors_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(()),
    }
    save_file(tensors, path)
    stored = stored_tensors([path])
    assert {name: t.shape for name, t in stored.items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    content = path.read_bytes()
    a = stored["a"]
    assert content[a.begin : a.begin + a.nbytes] == tensors["a"].numpy().tobytes()
