"""A GGUF file as a Hugging Face folder: converted once to safetensors, then cached by the file's content.

The conversion is the transformers loader's own (it knows the names and the q/k permutation of every architecture
it supports); its result is dense float32. It takes about half a minute the first time, and nothing after.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

from filelock import FileLock

from core.errors import CannotOpen
from core.lazy import torch, transformers
from core.models.checkpoint import file_hash
from core.models.quiet import quiet
from core.paths import cache_dir
from core.types import Progress, silent

MAGIC = b"GGUF"
POLL_SECONDS = 0.5
SECONDS_BASE, SECONDS_PER_MB = 18.0, 0.1
"""Rough cost of a conversion, for the progress bar only."""


def converted_gguf(file: Path, *, progress: Progress = silent) -> Path:
    """The cached folder of a GGUF file, converting it if this is the first time.

    Two processes never convert the same file at once, and a folder appears only when it is whole. Raises
    ``CannotOpen`` for a missing, cut-short or unsupported file; ``progress`` may raise ``Cancelled``.
    """
    if not file.is_file():
        raise CannotOpen(f"{file} does not exist; give the path of a GGUF file")
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise CannotOpen(f"{file} is not a GGUF file (it does not start with 'GGUF'); give another file")
    home = cache_dir() / "gguf"
    home.mkdir(parents=True, exist_ok=True)
    folder = home / file_hash(file)
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            fresh = folder.with_suffix(".tmp")
            shutil.rmtree(
                fresh, ignore_errors=True
            )  # left by a process that was killed; the lock is ours now
            try:
                _watched(lambda: _convert(file, fresh), _expected_seconds(file), progress)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _expected_seconds(file: Path) -> float:
    return SECONDS_BASE + SECONDS_PER_MB * file.stat().st_size / 1e6


def _watched(work: Callable[[], None], expected: float, progress: Progress) -> None:
    """Run ``work`` in a thread while this one reports; a ``Cancelled`` from ``progress`` waits for its end."""
    started = time.monotonic()
    with ThreadPoolExecutor(1, thread_name_prefix="gguf") as pool:
        future = pool.submit(work)
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)
            except NotYet:
                done = min(time.monotonic() - started, 0.97 * expected)
                progress(done, expected, "converting GGUF to safetensors, once for this file")


def _convert(file: Path, folder: Path) -> None:
    try:
        source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, **source
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
            _forget_quantization(model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the parser of an untrusted file fails in any way it likes
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CannotOpen(
                f"no space left to convert {file.name} in {folder.parent}; free {_needed_mb(file):.0f} MB or move "
                "the cache with SLIMSCOPE_CACHE"
            ) from None
        said = str(error).strip().splitlines()
        raise CannotOpen(
            f"{file} cannot be read as GGUF: it is cut short, damaged, or of an architecture transformers does not "
            f"convert ({type(error).__name__}: {said[0] if said else 'no message'}); fetch it again or use safetensors"
        ) from None


def _needed_mb(file: Path) -> float:
    """A 4-bit file grows eightfold as float32; an upper guess is better than a second failure."""
    return 8 * file.stat().st_size / 1e6


def _forget_quantization(model: Any) -> None:
    """The loader dequantized everything, yet marks the model as not serializable; take the marks off."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
