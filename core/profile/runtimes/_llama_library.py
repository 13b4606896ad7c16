"""llama.cpp through its C interface: a model, its context and its batches, by ctypes.

Any build of llama.cpp will do: the one inside the wheel of xllamacpp (compiled for AVX2, so that it runs on every
processor of the last ten years), or one made for this very processor, whose folder the variable
``LLAMA_CPP_LIB_PATH`` names, as llama-cpp-python has it. The interface has no version, so the layout below is held
against the values that llama.cpp's defaults are known to have, before a model is given to it. Only the fields we set
are named; a tail follows them that is longer than llama.cpp's own, and it is passed back as it came.
"""

from __future__ import annotations

import ctypes as c
import hashlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import CannotMeasure, CannotOpen
from core.libraries import PINS

WHEEL = "xllamacpp"
VARIABLE = "LLAMA_CPP_LIB_PATH"
NAMES = {"darwin": "libllama.dylib", "win32": "llama.dll"}
TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
"""ggml's numbers of the types that keys and values can be kept in."""
DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "flash_attn_type": -1,
    "type_k": TYPES["f16"],
    "type_v": TYPES["f16"],
}
"""What ``llama_context_default_params`` gives; read through another layout, these would be other numbers."""


class _ModelParams(c.Structure):
    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("tail", c.c_char * 252),
    )


class _ContextParams(c.Structure):
    _fields_ = (
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch")),
        ("kinds", c.c_int * 4),
        ("flash_attn_type", c.c_int),
        ("positions", c.c_float * 6),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("tail", c.c_char * 256),
    )


class _Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, c.c_void_p)),
    "llama_print_system_info": (c.c_char_p, ()),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (c.c_void_p, (c.c_char_p, _ModelParams)),
    "llama_init_from_model": (c.c_void_p, (c.c_void_p, _ContextParams)),
    "llama_model_get_vocab": (c.c_void_p, (c.c_void_p,)),
    "llama_vocab_n_tokens": (c.c_int32, (c.c_void_p,)),
    "llama_model_size": (c.c_uint64, (c.c_void_p,)),
    "llama_get_memory": (c.c_void_p, (c.c_void_p,)),
    "llama_memory_clear": (None, (c.c_void_p, c.c_bool)),
    "llama_state_seq_get_size": (c.c_size_t, (c.c_void_p, c.c_int32)),
    "llama_batch_init": (_Batch, (c.c_int32, c.c_int32, c.c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c.c_int32, (c.c_void_p, _Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (c.c_void_p, c.c_int32)),
    "llama_free": (None, (c.c_void_p,)),
    "llama_model_free": (None, (c.c_void_p,)),
}


def find_library() -> Path:
    """The shared library that holds llama.cpp. Raises ``CannotMeasure`` where the variable names none."""
    if folder := os.environ.get(VARIABLE):
        file = Path(folder) / NAMES.get(sys.platform, "libllama.so")
        if not file.is_file():
            raise CannotMeasure(f"{VARIABLE} names a folder without {file.name}; unset it to take {WHEEL}'s")
        return file
    for part in distribution(WHEEL).files or ():
        if part.stem.startswith(WHEEL) and part.suffix in (".so", ".pyd"):
            return Path(str(part.locate()))
    raise CannotMeasure(f"{WHEEL} came without its library; run `pip install --force-reinstall {_pin()}`")


def _pin() -> str:
    return f"{WHEEL}=={PINS[WHEEL]}"


class Library:
    """A llama.cpp library whose layout was checked; quiet, but for its last complaint."""

    def __init__(self, file: Path) -> None:
        """Load it. Raises ``CannotMeasure`` where it cannot be, or where its interface is not the one written here."""
        self._file = file
        self.complaint = ""
        try:
            self.calls = c.CDLL(str(file))
            for name, (result, arguments) in _SIGNATURES.items():
                call = getattr(self.calls, name)
                call.restype, call.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise CannotMeasure(f"llama.cpp cannot be loaded: {error}; run `pip install {_pin()}`") from error
        self._log = _LOG(self._listen)  # llama.cpp keeps the pointer, so we keep the object
        self.calls.llama_log_set(self._log, None)
        self.calls.llama_backend_init()
        found = self.calls.llama_context_default_params()
        if any(getattr(found, name) != value for name, value in DEFAULTS.items()):
            raise CannotMeasure(
                f"this build of llama.cpp has another interface than the one known here; run `pip install {_pin()}`"
                f" and unset {VARIABLE}"
            )

    def facts(self) -> dict[str, str]:
        """Which build this is: where it came from, its content, and the instruction sets it was compiled for."""
        with self._file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        pinned = WHEEL in self._file.name
        return {
            "llama_cpp": f"{WHEEL} {distribution(WHEEL).version}"
            if pinned
            else "a build of this machine's own",
            "llama_cpp_library": content[:16],
            "llama_cpp_kernels": " ".join(
                part.split(" = ")[0]
                for part in self.calls.llama_print_system_info().decode().split(" | ")
                if part
            ),
        }

    def _listen(self, level: int, text: bytes, _: object) -> None:
        if level >= 4:  # GGML_LOG_LEVEL_ERROR
            self.complaint = text.decode(errors="replace").strip()


class Session:
    """A model with its cache, and one batch that is filled anew for every call."""

    def __init__(self, library: Library, file: Path) -> None:
        """Load the weights onto the CPU. Raises ``CannotOpen``."""
        self._library, self._calls = library, library.calls
        asked = self._calls.llama_model_default_params()
        asked.n_gpu_layers = 0
        self._model = self._calls.llama_model_load_from_file(str(file).encode(), asked)
        if not self._model:
            raise CannotOpen(
                f"llama.cpp cannot load {file.name}: {library.complaint or 'it does not say why'}"
            )
        vocabulary = self._calls.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._calls.llama_vocab_n_tokens(vocabulary))
        self._context: int | None = None

    def start(self, *, positions: int, sequences: int, threads: int, kv: str) -> None:
        """Make the cache: ``positions`` for each of ``sequences``, kept in type ``kv``. Raises ``CannotMeasure``."""
        asked = self._calls.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = positions * sequences, sequences
        asked.n_threads = asked.n_threads_batch = threads
        asked.type_k = asked.type_v = TYPES[kv]
        if kv == "f32":
            asked.flash_attn_type = 0  # off: on the CPU it rounds to float16, whatever the cache is kept in
        # Token i of every batch belongs to sequence i % sequences, so a batch holds a whole number of positions.
        self._most = min(int(asked.n_batch), positions * sequences) // sequences * sequences
        if not self._most:
            raise CannotMeasure(f"llama.cpp's batches hold {asked.n_batch} tokens; set a smaller batch")
        self._sequences = sequences
        self._context = self._calls.llama_init_from_model(self._model, asked)
        if not self._context:
            raise CannotMeasure(f"llama.cpp makes no cache of this size: {self._library.complaint}")
        self._memory = self._calls.llama_get_memory(self._context)
        self._batch = batch = self._calls.llama_batch_init(self._most, 0, 1)
        self._token, self._pos, self._wanted, n_sequences = (
            np.ctypeslib.as_array(field, (self._most,))
            for field in (batch.token, batch.pos, batch.logits, batch.n_seq_id)
        )
        n_sequences[:] = 1
        for index in range(self._most):
            batch.seq_id[index][0] = index % sequences

    def clear(self) -> None:
        """Forget every sequence."""
        self._calls.llama_memory_clear(self._memory, False)

    def run(self, tokens_BP: np.ndarray, start: int) -> None:
        """Run P tokens of each sequence from position ``start`` on, position by position, in as many batches as it takes."""
        tokens = tokens_BP.T.reshape(-1)
        positions = np.repeat(np.arange(start, start + tokens_BP.shape[1]), self._sequences)
        for first in range(0, len(tokens), self._most):
            n = min(self._most, len(tokens) - first)
            self._batch.n_tokens = n
            self._token[:n] = tokens[first : first + n]
            self._pos[:n] = positions[first : first + n]
            self._wanted[:n] = 0
            if first + n == len(tokens):
                self._wanted[n - self._sequences : n] = 1
            if code := self._calls.llama_decode(self._context, self._batch):
                raise CannotMeasure(f"llama.cpp refused a batch with code {code}: {self._library.complaint}")

    def logits(self) -> list[np.ndarray]:
        """Logits [vocabulary] of the last position, one array per sequence, where llama.cpp has them until the next run."""
        last = range(self._batch.n_tokens - self._sequences, self._batch.n_tokens)
        rows = (self._calls.llama_get_logits_ith(self._context, index) for index in last)
        return [np.ctypeslib.as_array(row, (self.n_vocab,)) for row in rows]

    def weight_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return int(self._calls.llama_model_size(self._model))

    def cache_bytes(self) -> int:
        """Bytes of all sequences' keys and values, with the few bytes that llama.cpp heads them with when it saves them."""
        sizes = (self._calls.llama_state_seq_get_size(self._context, s) for s in range(self._sequences))
        return sum(int(size) for size in sizes)

    def close(self) -> None:
        """Free the cache and the weights."""
        if self._context:
            self._calls.llama_batch_free(self._batch)
            self._calls.llama_free(self._context)
        self._calls.llama_model_free(self._model)
