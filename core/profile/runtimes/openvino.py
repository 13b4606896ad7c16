"""OpenVINO on the CPU: a graph with the cache as its own state, weights as stored, in 8 or in 4 bits.

What OpenVINO would do by itself (bfloat16 products where the processor has them, activations rounded to 8 bits, a cache of
8 bits) is a choice here, off unless asked for, and every choice is part of the numbers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from core.errors import CannotMeasure
from core.libraries import without_telemetry
from core.profile.built import facts_of
from core.profile.measured import Facts
from core.profile.runtimes._base import Clock, Prepared, ProfileSettings, WallClock
from core.profile.runtimes._graph_facts import prepared
from core.profile.runtimes._openvino_graph import GRAPH, write
from core.profile.session import profile_artifact
from core.registry import method
from core.types import Progress, Result

LIBRARIES = ("openvino", "nncf")
BUILT_FROM = ("weights", "group_size")
KV_WIDTH = {"float": {"float32": 4, "bfloat16": 2}, "u8": {"float32": 1, "bfloat16": 1}}


class OpenVinoProfileSettings(ProfileSettings):
    """Settings of OpenVINO."""

    weights: Literal["stored", "int8", "int4"] = Field(
        "stored",
        description="stored: the artifact's own numbers, integer grids kept packed; int8: one scale per row; int4: groups of "
        "a row with scale and zero point, table and head in int8",
    )
    group_size: Literal[32, 64, 128] = Field(64, description="Weights of a row that share a scale, for int4")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="What products are computed in")
    activations: Literal["float", "int8"] = Field(
        "float",
        description="int8 rounds what matrix products read, in groups of 32, as the library does by itself",
    )
    kv_cache: Literal["float", "u8"] = Field(
        "float", description="What keys and values are kept in; u8 is the library's own choice"
    )

    @property
    def marks(self) -> tuple[str, ...]:
        """Everything that changes what is computed."""
        group = (f"g{self.group_size}",) if self.weights == "int4" and self.group_size != 64 else ()
        precise = ("bf16",) if self.precision == "bfloat16" else ()
        rounded = ("a8",) if self.activations == "int8" else ()
        kept = ("kv_u8",) if self.kv_cache == "u8" else ()
        return (*super().marks, *group, *precise, *rounded, *kept)


@method("profile", title="OpenVINO", paper="https://docs.openvino.ai")
def run(folder: Path, progress: Progress, settings: OpenVinoProfileSettings) -> Result:
    """Speed and memory of an artifact as an OpenVINO graph on the CPU, in a fresh process.

    The workload is the same as everywhere: a prompt of fixed token ids in one call (prefill), then tokens one by one with
    the cache (decode), each with the greedy pick. Weights that the artifact stores as integers stay packed and are
    unpacked inside the matrix product. int8 and int4 are NNCF's data-free weight compression; what they lose is measured
    in the same process.
    """
    return profile_artifact(folder, "openvino", progress, settings)


def build(
    folder: Path, target: Path, progress: Progress, settings: OpenVinoProfileSettings
) -> Mapping[str, Any]:
    """Write the graph; raises ``CannotMeasure`` where the model cannot be one."""
    return write(folder, target, progress, weights=settings.weights, group_size=settings.group_size)


def create(settings: OpenVinoProfileSettings, files: Path) -> OpenVino:
    """The runtime that the measuring process drives."""
    return OpenVino(settings, files)


class OpenVino:
    """A compiled graph; the state between two calls is its cache and the tokens picked last."""

    def __init__(self, settings: OpenVinoProfileSettings, files: Path) -> None:
        self._settings = settings
        self._files = files
        self._made = facts_of(files)
        self.clock: Clock = WallClock()
        self._request: Any = None
        self._answer: Any = None
        self._positions = 0

    def prepare(self, folder: Path) -> Prepared:
        """Import the library, and see whether this processor has what is asked for; torch is not needed."""
        without_telemetry()
        import openvino

        self._core = openvino.Core()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self._settings.precision == "bfloat16" and "BF16" not in able:
            raise CannotMeasure(
                "this processor has no bfloat16 products (AVX-512 BF16 or AMX); set precision=float32"
            )
        return prepared(self._made)

    def load(self) -> None:
        """Read the graph and compile it."""
        settings = self._settings
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if settings.precision == "bfloat16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if settings.activations == "int8" else "0",
            "KV_CACHE_PRECISION": "u8"
            if settings.kv_cache == "u8"
            else {"float32": "f32", "bfloat16": "bf16"}[settings.precision],
            "INFERENCE_NUM_THREADS": str(settings.n_threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = self._core.compile_model(str(self._files / GRAPH), "CPU", options)
        self._names = {name for port in compiled.inputs for name in port.get_names()}
        wanted = {"logits", "last_hidden_state"}
        self._output = next(port for port in compiled.outputs if wanted & set(port.get_names()))
        self._request = compiled.create_infer_request()

    def prefill(self, inputs: np.ndarray) -> None:
        """The prompt from an empty cache, or one whole forward."""
        if self._made["family"] == "decoder":
            self._request.reset_state()
            self._positions = 0
            self._advance(inputs)
            return
        name = "pixel_values" if inputs.ndim == 4 else "input_ids"
        given = {name: inputs}
        if "attention_mask" in self._names:
            given["attention_mask"] = np.ones_like(inputs)
        if "token_type_ids" in self._names:
            given["token_type_ids"] = np.zeros_like(inputs)
        self._request.infer(given)
        self._answer = self._request.get_tensor(self._output).data

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """One token per sequence."""
        self._advance(self._picked_B1 if tokens_B1 is None else tokens_B1)

    def logits(self) -> np.ndarray:
        """The last call's answers."""
        answer = self._answer[:, -1] if self._made["family"] == "decoder" else self._answer
        return np.array(answer, dtype=np.float32)

    def close(self) -> None:
        """Drop the compiled graph."""
        self._request = self._answer = None

    def facts(self) -> Facts:
        """What was really run."""
        settings, made = self._settings, self._made
        packed = made.get("packed", 0)
        notes = [f"the graph's weights have {made['file_bytes']:,} bytes"]
        if packed:
            notes.append(
                f"{made['own_grid']} of {packed} stored integer weights are kept packed in the graph, on their own grids"
            )
        plain = (settings.precision, settings.activations, settings.kv_cache) == ("float32", "float", "float")
        width = KV_WIDTH[settings.kv_cache][settings.precision]
        return Facts(
            dtype=settings.precision if settings.weights == "stored" else settings.weights,
            attention_kernel="OpenVINO CPU plugin",
            weights_memory_bytes=made["file_bytes"],
            device_peak_bytes=None,
            exact=bool(made["exact"]) and plain,
            kv_cache_bytes=width * self._positions * settings.batch * sum(made["kv_width"]) or None,
            conditions={
                "precision": settings.precision,
                "activations": settings.activations,
                "kv_cache": settings.kv_cache,
                "graph": dict(made),
            },
            notes=tuple(notes),
        )

    def _advance(self, tokens_BP: np.ndarray) -> None:
        rows = np.arange(tokens_BP.shape[0], dtype=np.int32)
        self._request.infer({"input_ids": tokens_BP, "beam_idx": rows})
        self._positions += tokens_BP.shape[1]
        self._answer = self._request.get_tensor(self._output).data
        self._picked_B1 = self._answer[:, -1].argmax(-1)[:, None]
