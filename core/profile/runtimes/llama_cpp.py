"""llama.cpp on the CPU, driven token by token through its C interface: what Ollama and LM Studio stand on.

The artifact becomes one GGUF file (``core.export.gguf``), which llama.cpp opens with its own defaults: keys and values
in float16, flash attention where it has it, prompts in batches of 2048. Kernels of quantized types round activations
to 8 bits too, and flash attention rounds to 16, so even a file of the artifact's own numbers answers a little
differently; by how much is measured. With ``weights=stored`` and ``kv_cache=f32`` nothing is rounded, and the answers
must be the artifact's own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from core.profile.built import facts_of
from core.profile.measured import Facts
from core.profile.runtimes._base import Clock, Prepared, WallClock
from core.profile.runtimes._gguf_file import BUILT_FROM, GgufProfileSettings, build
from core.profile.runtimes._llama_library import VARIABLE, WHEEL, Library, Session, find_library
from core.profile.session import profile_artifact
from core.registry import method
from core.types import Progress, Result

__all__ = [
    "BUILT_FROM",
    "LIBRARIES",
    "LlamaCpp",
    "LlamaCppSettings",
    "build",
    "create",
    "run",
]

LIBRARIES = () if os.environ.get(VARIABLE) else (WHEEL,)


class LlamaCppSettings(GgufProfileSettings):
    """Settings of llama.cpp."""

    kv_cache: Literal["f16", "f32", "q8_0"] = Field(
        "f16",
        description="What keys and values are kept in; f32 also turns flash attention off, which rounds to 16 bits inside. "
        "Other choices than llama.cpp's own f16 give numbers of their own names",
    )

    @property
    def marks(self) -> tuple[str, ...]:
        """Names the KV cache where it is not llama.cpp's own choice."""
        kv = () if self.kv_cache == "f16" else (f"kv_{self.kv_cache}",)
        return (*super().marks, *kv)


@method("profile", title="llama.cpp", needs=["decoder"], paper="https://github.com/ggml-org/llama.cpp")
def run(folder: Path, progress: Progress, settings: LlamaCppSettings) -> Result:
    """Speed and memory of an artifact as a GGUF file in llama.cpp, in a fresh process.

    The workload is the same as everywhere: a prompt of fixed token ids in one call (prefill), then tokens one by one
    with the cache (decode), each with the greedy pick. Weights are kept in one of GGUF's types; the loss against the
    artifact is measured in the same process. The wheel's kernels are compiled for AVX2; a library built for this
    machine is taken where LLAMA_CPP_LIB_PATH names its folder, and its instruction sets are among the conditions.
    """
    return profile_artifact(folder, "llama_cpp", progress, settings)


def create(settings: LlamaCppSettings, files: Path) -> LlamaCpp:
    """The runtime that the measuring process drives."""
    return LlamaCpp(settings, files)


class LlamaCpp:
    """A GGUF file in llama.cpp; the state between two calls is its cache and the tokens picked last."""

    def __init__(self, settings: LlamaCppSettings, files: Path) -> None:
        self._settings = settings
        self._files = files
        self.clock: Clock = WallClock()
        self._session: Session | None = None
        self._position = 0

    def prepare(self, folder: Path) -> Prepared:
        """Load the library, read the configuration; torch is not needed."""
        self._library = Library(find_library())
        config = json.loads((folder / "config.json").read_text())
        return Prepared("decoder", int(config["vocab_size"]), config.get("max_position_embeddings"))

    def load(self) -> None:
        """Map the file, repack what its kernels want otherwise, and make the cache."""
        settings = self._settings
        self._session = Session(self._library, self._files / "model.gguf")
        self._session.start(
            positions=settings.n_positions,
            sequences=settings.batch,
            threads=settings.n_threads,
            kv=settings.kv_cache,
        )

    def prefill(self, inputs: np.ndarray) -> None:
        """The prompt from an empty cache."""
        assert self._session is not None
        self._session.clear()
        self._position = 0
        self._advance(inputs)

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """One token per sequence."""
        self._advance(self._picked_B1 if tokens_B1 is None else tokens_B1)

    def logits(self) -> np.ndarray:
        """Of the last position, [batch, vocabulary]."""
        assert self._session is not None
        return np.stack(self._session.logits())

    def close(self) -> None:
        """Free model and cache."""
        assert self._session is not None
        self._session.close()
        self._session = None

    def facts(self) -> Facts:
        """What was really run."""
        assert self._session is not None
        made = facts_of(self._files)
        kinds, exact_kv = made["weight_bytes"], self._settings.kv_cache == "f32"
        return Facts(
            dtype="float32" if self._settings.weights == "stored" else self._settings.weights,
            attention_kernel="llama.cpp, plain" if exact_kv else "llama.cpp, flash where it has it",
            weights_memory_bytes=self._session.weight_bytes(),
            device_peak_bytes=None,
            exact=self._settings.weights == "stored" and exact_kv,
            kv_cache_bytes=self._session.cache_bytes(),
            conditions={
                "kv_cache": self._settings.kv_cache,
                "gguf": made,
                **self._library.facts(),
            },
            notes=(
                f"the GGUF file has {made['file_bytes']:,} bytes ("
                + ", ".join(f"{name} {size:,}" for name, size in kinds.items())
                + ")",
            ),
        )

    def _advance(self, tokens_BP: np.ndarray) -> None:
        assert self._session is not None
        self._session.run(tokens_BP, self._position)
        self._position += tokens_BP.shape[1]
        self._picked_B1 = np.array([[row.argmax()] for row in self._session.logits()])
