"""ONNX Runtime on the CPU: transformers' own export with its cache, driven directly; encoders and vision models too.

A decoder's graph is fused for this runtime's kernels. For one sequence the cache lies in one place and has room for
every position, as in any serving loop; for more, a step makes a new cache of the old one and the new tokens.
"""

from __future__ import annotations

import shutil
import tempfile
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
from core.profile.runtimes._graph_facts import graph_facts, prepared
from core.profile.runtimes._onnx_decoder import PAST, PRESENT, decoder_graph, plain_products, with_room
from core.profile.runtimes._onnx_file import QUANTIZED, Activations, bytes_of, described, set_activations
from core.profile.runtimes._onnx_own_grid import on_own_grid
from core.profile.runtimes._own_exports import ONNX_FILE, onnx_settings, whole_onnx, written_onnx
from core.profile.runtimes._own_grid import own_grids
from core.profile.session import profile_artifact
from core.profile.where.onnx_notes import calls_of
from core.profile.where.spans import Span
from core.registry import method
from core.types import ModelRef, Progress, Result, part_of

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
BUILT_FROM = ("weights", "block_size", "activations", "batch")
"""The batch is in them since one sequence's graph has another attention than several sequences'."""
EXPORTED = {"stored": "float32", "int8": "int8_blocks", "int4": "int4", "int8_dynamic": "int8"}
"""Our weights → what our own ONNX export calls them."""


class OnnxRuntimeSettings(ProfileSettings):
    """Settings of ONNX Runtime."""

    weights: Literal["stored", "int8", "int4", "int8_dynamic"] = Field(
        "stored",
        description="stored: the artifact's own numbers, integer grids kept packed; int8 and int4: blocks with scale and "
        "zero point, the token table in int8; int8_dynamic: scales per output, activations of a whole product rounded with "
        "one scale",
    )
    block_size: Literal["32", "64", "128"] = Field(
        "32", description="int8 and int4: weights of an output that share a scale"
    )
    activations: Activations = Field(
        "int8",
        description="int8 and int4: what products read; int8 rounds it block by block (accuracy_level 4), which is faster",
    )

    @property
    def marks(self) -> tuple[str, ...]:
        """Everything that changes what is computed."""
        blocks = self.weights in ("int8", "int4")
        group = (f"g{self.block_size}",) if blocks and self.block_size != "32" else ()
        exact = ("a32",) if blocks and self.activations == "float" else ()
        return (*super().marks, *group, *exact)


@method("profile", title="ONNX Runtime", paper="https://onnxruntime.ai/docs/")
def run(folder: Path, progress: Progress, settings: OnnxRuntimeSettings) -> Result:
    """Speed and memory of an artifact as an ONNX graph in ONNX Runtime on the CPU, in a fresh process.

    The workload is the same as everywhere: a prompt of fixed token ids in one call (prefill), then tokens one by one with
    the cache (decode), each with the greedy pick. Weights that the artifact stores in 4 or 8 bits stay packed
    (MatMulNBits with its own codes and scales). What int8 and int4 lose is measured in the same process.
    """
    return profile_artifact(folder, "onnx_runtime", progress, settings)


def build(folder: Path, target: Path, progress: Progress, settings: OnnxRuntimeSettings) -> Mapping[str, Any]:
    """Write ``target/model.onnx``; raises ``CannotMeasure`` or ``CannotExport`` where the model cannot be one."""
    from core.models.open import open_model

    without_telemetry()
    loaded = open_model(
        ModelRef(str(folder.resolve()), dtype="float32"), progress=part_of(progress, 0.0, 0.1)
    )
    asked = onnx_settings(EXPORTED[settings.weights], settings.block_size)
    facts = graph_facts(loaded)
    if loaded.family == "decoder":
        facts |= _decoder(loaded, target, part_of(progress, 0.1, 1.0), settings, asked)
    else:
        whole_onnx(loaded, target, part_of(progress, 0.1, 1.0), asked)
    if settings.weights in ("int8", "int4"):
        set_activations(target / ONNX_FILE, settings.activations)
    facts |= described(target / ONNX_FILE)
    if settings.weights != "stored" and not any(name in facts["operators"] for name in QUANTIZED):
        raise CannotMeasure(
            f"ONNX Runtime found no product of {loaded.anatomy.architecture} to store as {settings.weights}; "
            "set weights=stored"
        )
    return facts


def create(settings: OnnxRuntimeSettings, files: Path) -> OnnxRuntime:
    """The runtime that the measuring process drives."""
    return OnnxRuntime(settings, files)


class OnnxRuntime:
    """A session; the state between two calls is its cache and the tokens picked last."""

    def __init__(self, settings: OnnxRuntimeSettings, files: Path) -> None:
        self._settings = settings
        self._files = files
        self._made = facts_of(files)
        self.clock: Clock = WallClock()
        self._session: Any = None
        self._binding: Any = None  # where the cache has room to grow
        self._cache: list[Any] = []
        self._position = 0
        self.profiling = False  # set by who looks where the time goes, before ``load``

    def prepare(self, folder: Path) -> Prepared:
        """Import the library; torch is not needed."""
        import onnxruntime

        self._library = onnxruntime
        onnxruntime.disable_telemetry_events()
        return prepared(self._made)

    def load(self) -> None:
        """Read the graph, let the library optimise it and repack its weights, and make the cache."""
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self._settings.n_threads
        options.log_severity_level = 3
        options.enable_profiling = self.profiling
        if self.profiling:
            options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "calls")
        self._session = self._library.InferenceSession(
            str(self._files / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in self._session.get_inputs()]
        self._taken = frozenset(names)
        outputs = [value.name for value in self._session.get_outputs()]
        self._output = next(name for name in outputs if name in ("logits", "last_hidden_state"))
        self._past = [name for name in names if name.startswith(PAST)]
        self._present = [name.replace(PAST, PRESENT, 1) for name in self._past]
        if "past_length" in self._taken:
            self._binding = self._session.io_binding()
            self._cache = [self._empty(name, self._settings.n_positions) for name in self._past]
            for name, present, buffer in zip(self._past, self._present, self._cache, strict=True):
                self._binding.bind_ortvalue_input(name, buffer)
                self._binding.bind_ortvalue_output(present, buffer)
            self._binding.bind_output(self._output)

    def prefill(self, inputs: np.ndarray) -> None:
        """The prompt from an empty cache, or one whole forward."""
        if self._made["family"] == "decoder":
            self._position = 0
            if self._binding is None:
                self._cache = [self._empty(name, 0) for name in self._past]
            self._advance(inputs)
            return
        given = {"pixel_values" if inputs.ndim == 4 else "input_ids": inputs}
        if inputs.ndim == 2:
            given |= {"attention_mask": np.ones_like(inputs), "token_type_ids": np.zeros_like(inputs)}
        feed = {name: array for name, array in given.items() if name in self._taken}
        self._answer = self._session.run([self._output], feed)[0]

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """One token per sequence."""
        self._advance(self._picked_B1 if tokens_B1 is None else tokens_B1)

    def logits(self) -> np.ndarray:
        """The last call's answers."""
        answer = self._answer[:, -1] if self._made["family"] == "decoder" else self._answer
        return np.array(answer, dtype=np.float32)

    def operators(self) -> list[list[Span]]:
        """The library's own notes of every call so far, one list per call; asked once."""
        file = Path(self._session.end_profiling())
        try:
            return calls_of(file)
        finally:
            shutil.rmtree(file.parent)

    def close(self) -> None:
        """Drop session and cache."""
        self._session = self._binding = None
        self._cache = []

    def facts(self) -> Facts:
        """What was really run."""
        settings, made = self._settings, self._made
        notes = [f"the graph's weights have {bytes_of(made):,} bytes"]
        if packed := made.get("packed"):
            notes.append(
                f"{made['own_grid']} of {packed} stored integer weights are kept packed in the graph, on their own grids"
            )
        fused = made["operators"].get("GroupQueryAttention", 0)
        if made["family"] == "decoder" and self._binding is None:
            notes.append("every step copies the cache: this graph's attention cannot write into one")
        filled = sum(
            int(np.prod(value.shape())) // max(1, value.shape()[2]) * self._position for value in self._cache
        )
        return Facts(
            dtype="float32" if settings.weights == "stored" else settings.weights,
            attention_kernel="GroupQueryAttention" if fused else "plain operators",
            weights_memory_bytes=bytes_of(made),
            device_peak_bytes=None,
            exact=settings.weights == "stored" and bool(made.get("exact", True)),
            kv_cache_bytes=4 * filled or None,
            conditions={"activations": self._activations(), "graph": dict(made)},
            notes=tuple(notes),
        )

    def _activations(self) -> str:
        """What products with quantized weights read."""
        if self._settings.weights == "stored":
            return "float"
        return "int8" if self._settings.weights == "int8_dynamic" else self._settings.activations

    def _advance(self, tokens_BP: np.ndarray) -> None:
        batch, read = tokens_BP.shape
        places = np.arange(self._position, self._position + read)[None].repeat(batch, 0)
        given = {
            "input_ids": np.ascontiguousarray(tokens_BP, dtype=np.int64),
            "position_ids": places,
            "past_length": np.array([self._position]),
        }
        value_of = self._library.OrtValue.ortvalue_from_numpy
        feed = {name: value_of(array) for name, array in given.items() if name in self._taken}
        if self._binding is not None:
            for name, value in feed.items():
                self._binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(self._binding)
            self._answer = self._binding.get_outputs()[self._where()].numpy()
        else:
            feed |= dict(zip(self._past, self._cache, strict=True))
            answer, *self._cache = self._session.run_with_ort_values([self._output, *self._present], feed)
            self._answer = answer.numpy()
        self._position += read
        self._picked_B1 = self._answer[:, -1].argmax(-1)[:, None]

    def _where(self) -> int:
        """The place of the logits among the bound outputs: bound last."""
        return len(self._present)

    def _empty(self, name: str, length: int) -> Any:
        shape = next(value.shape for value in self._session.get_inputs() if value.name == name)
        sizes = [self._settings.batch, shape[1], length, shape[3]]
        return self._library.OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.float32))


def _decoder(
    loaded: Any, target: Path, progress: Progress, settings: OnnxRuntimeSettings, asked: Any
) -> dict[str, Any]:
    """Trace, fuse and store a decoder."""
    from core.export._onnx_graph import fold_transposes, int8_tables

    progress(0.0, 1.0, "tracing the model with its cache")
    graph = decoder_graph(loaded, sequences=settings.batch)
    facts: dict[str, Any] = {"room": with_room(graph)}
    progress(0.6, 1.0, "storing its weights")
    if settings.weights == "stored":
        grids = own_grids(loaded)
        if grids:  # else a head that is also the table stays one matrix
            plain_products(graph)
        facts |= {"packed": len(grids), "own_grid": on_own_grid(graph, grids)}
        facts["exact"] = all(grid.exact for grid in grids.values())
    else:
        plain_products(graph)
        fold_transposes(graph)
        int8_tables(graph)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=target) as scratch:
        written_onnx(graph, Path(scratch), target, asked)
    return facts
