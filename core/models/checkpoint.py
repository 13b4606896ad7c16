"""The files of a checkpoint folder: are they all there and whole, and what is their content's hash.

Reads safetensors headers and bytes only; knows nothing of models. The format: 8 bytes little-endian header length,
a JSON header name → {dtype, shape, data_offsets}, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CannotOpen
from core.paths import cache_dir
from core.types import canonical_json, content_hash

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 1 << 22
VOLATILE_CONFIG = ("_name_or_path", "transformers_version")
"""Keys of config.json that change without the model changing."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Absolute offset of its first byte in the file."""
    nbytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises ``CannotOpen`` when folder or file is missing or is not a JSON object."""
    if not folder.is_dir():
        raise CannotOpen(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    path = folder / "config.json"
    if not path.is_file():
        raise CannotOpen(f"{folder} has no config.json; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotOpen(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(config, dict):
        raise CannotOpen(f"{path} is not a JSON object; fetch the file again")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Every safetensors file of the checkpoint; raises ``CannotOpen`` when there is none or a shard is missing."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotOpen(
                f"{index} cannot be read as a shard index ({error}); fetch the file again"
            ) from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CannotOpen(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}; "
                "fetch the missing shards"
            )
        return tuple(folder / name for name in names)
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CannotOpen(
            f"{folder} has only pickled weights (.bin, .pt), which can run code when loaded; "
            "convert them to safetensors first, e.g. with huggingface.co/spaces/safetensors/convert"
        )
    raise CannotOpen(
        f"{folder} has no model.safetensors; give the folder of a Hugging Face model with its weights"
    )


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor in the files, by name; raises ``CannotOpen`` for a file that is corrupt or cut short."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(_read_header(file))
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length + 8 > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(file, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0],
                               e["data_offsets"][1] - e["data_offsets"][0])
            for name, e in header.items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CannotOpen(
            f"{file} is not a safetensors file, or its header is damaged ({error}); fetch it again"
        ) from None
    end = max((tensor.begin + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise CannotOpen(
            f"{file} has {size} bytes where its header says {end}: it is cut short or corrupt; fetch it again"
        )
    return tensors


def fingerprint(folder: Path) -> str:
    """Content hash of a checkpoint's tensors and config, independent of how it is split into files.

    Raises ``CannotOpen`` as the functions above do. Cached by the files' names, sizes and times.
    """
    files = weight_files(folder)
    return cached_by_stat(
        "fingerprint", (folder / "config.json", *files), lambda: _fingerprint(folder, files)
    )


def _fingerprint(folder: Path, files: Sequence[Path]) -> str:
    config = {key: value for key, value in read_config(folder).items() if key not in VOLATILE_CONFIG}
    digest = hashlib.sha256(canonical_json(config).encode())
    for name, tensor in sorted(stored_tensors(files).items()):
        digest.update(canonical_json([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.begin)
            _feed(digest, stream, tensor.nbytes)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, cached by its name, size and time."""

    def compute() -> str:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            _feed(digest, stream, path.stat().st_size)
        return digest.hexdigest()

    return cached_by_stat("sha256", (path,), compute)


def _feed(digest: Any, stream: Any, nbytes: int) -> None:
    while nbytes > 0:
        chunk = stream.read(min(CHUNK_BYTES, nbytes))
        if not chunk:
            raise CannotOpen(f"{stream.name} ended {nbytes} bytes early; fetch the file again")
        digest.update(chunk)
        nbytes -= len(chunk)


def cached_by_stat(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """``compute()``, or what it gave before for files with these paths, sizes and modification times."""
    stats = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    entry = cache_dir() / "hashes" / f"{content_hash([kind, stats])}.txt"
    if entry.is_file():
        return entry.read_text(encoding="ascii")
    value = compute()
    entry.parent.mkdir(parents=True, exist_ok=True)
    fresh = entry.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(value, encoding="ascii")
    fresh.replace(entry)
    return value
