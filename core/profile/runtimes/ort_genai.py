"""ONNX Runtime GenAI on the CPU: the library's own graph of a decoder, and its own generating loop.

Its builder knows some architectures by name and writes their graphs node by node: grouped attention that writes into one
cache, query, key and value in one product. What it does not know it cannot run, and says so.
"""

from __future__ import annotations

import json
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
from core.profile.runtimes._onnx_file import ACCURACY, Activations, bytes_of, described
from core.profile.runtimes._onnx_own_grid import on_own_grid
from core.profile.runtimes._own_exports import dense_copy
from core.profile.runtimes._own_grid import own_grids
from core.profile.session import profile_artifact
from core.registry import method
from core.types import Family, ModelRef, Progress, Result, part_of

LIBRARIES = ("onnx", "onnxruntime", "onnxruntime-genai")
BUILT_FROM = ("weights", "block_size", "activations", "zero_points", "algorithm", "head")
FAMILIES: frozenset[Family] = frozenset({"decoder"})
PRECISION = {"stored": "fp32", "int8": "int8", "int4": "int4"}
FILE, CONFIG = "model.onnx", "genai_config.json"
SURE = 1e4
"""The logit of a token that is to be taken whatever the model says."""


class OrtGenaiSettings(ProfileSettings):
    """Settings of ONNX Runtime GenAI."""

    weights: Literal["stored", "int8", "int4"] = Field(
        "stored",
        description="stored: the artifact's own numbers, integer grids kept packed; int8 and int4: blocks of weights that "
        "share a scale (MatMulNBits); at int4 a table that is also the head is 4-bit too",
    )
    block_size: Literal["16", "32", "64", "128", "256"] = Field(
        "32", description="int8 and int4: weights of an output that share a scale"
    )
    activations: Activations = Field(
        "int8",
        description="int8 and int4: what products read; int8 rounds it block by block (accuracy_level 4), the builder's own "
        "choice",
    )
    zero_points: bool = Field(
        False, description="int8 and int4: a zero point beside each scale, for weights that lean to one side"
    )
    algorithm: Literal["rtn", "k_quant"] = Field(
        "rtn",
        description="int8 and int4: rtn rounds to the nearest; k_quant searches each block's scale for the least error",
    )
    head: Literal["same", "int8"] = Field(
        "same", description="int4: what the head is stored in; int8 leaves the token table in float32"
    )

    @property
    def marks(self) -> tuple[str, ...]:
        """Everything that changes what is computed."""
        if self.weights == "stored":
            return ()
        group = () if self.block_size == "32" else (f"g{self.block_size}",)
        exact = ("a32",) if self.activations == "float" else ()
        zero = ("zp",) if self.zero_points else ()
        how = () if self.algorithm == "rtn" else (self.algorithm,)
        head = ("head_int8",) if self.head == "int8" and self.weights == "int4" else ()
        return (*super().marks, *group, *zero, *how, *exact, *head)


@method("profile", title="ONNX Runtime GenAI", needs=["decoder"], paper="https://onnxruntime.ai/docs/genai/")
def run(folder: Path, progress: Progress, settings: OrtGenaiSettings) -> Result:
    """Speed and memory of a decoder in ONNX Runtime GenAI on the CPU, in a fresh process.

    The workload is the same as everywhere: a prompt of fixed token ids in one call (prefill), then tokens one by one with
    the cache (decode). The library picks the likeliest token at the beginning of a step, so the first pick is counted
    with the first step. What int8 and int4 lose is measured in the same process.
    """
    return profile_artifact(folder, "ort_genai", progress, settings)


def build(folder: Path, target: Path, progress: Progress, settings: OrtGenaiSettings) -> Mapping[str, Any]:
    """Write graph and configuration by the library's builder, from dense float32 weights.

    Raises ``CannotMeasure`` where the builder does not know the architecture or refuses the model.
    """
    from core.models.open import open_model

    without_telemetry()
    loaded = open_model(
        ModelRef(str(folder.resolve()), dtype="float32"), progress=part_of(progress, 0.0, 0.1)
    )
    grids = own_grids(loaded) if settings.weights == "stored" else {}
    facts: dict[str, Any] = {
        "vocab_size": loaded.anatomy.vocab_size,
        "context_length": loaded.anatomy.context_length,
        "was_packed": getattr(loaded.model.config, "quantization_config", None) is not None,
        "packed": len(grids),
        "own_grid": 0,
        "exact": all(grid.exact for grid in grids.values()),
    }
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=target) as scratch:
        dense, cache = Path(scratch) / "model", Path(scratch) / "cache"
        dense.mkdir()
        dense_copy(loaded, dense, part_of(progress, 0.1, 0.4))
        progress(0.4, 1.0, "writing the graph")
        try:
            _by_builder(dense, target, cache, settings)
        except Exception as error:  # the builder raises whatever it trips over
            said = next(iter(str(error).strip().splitlines()), "").replace(str(dense), "this")
            raise CannotMeasure(
                f"ONNX Runtime GenAI's builder cannot write {loaded.anatomy.architecture} "
                f"({type(error).__name__}: {said[:160]}); measure it in onnx_runtime"
            ) from error
        if grids:
            facts["own_grid"] = _pack(target / FILE, grids, Path(scratch))
    _without_special_tokens(target / CONFIG, facts["vocab_size"])
    return facts | described(target / FILE)


def create(settings: OrtGenaiSettings, files: Path) -> OrtGenai:
    """The runtime that the measuring process drives."""
    return OrtGenai(settings, files)


class OrtGenai:
    """A generator; the state between two calls is its cache and the logits that the next pick is made from."""

    def __init__(self, settings: OrtGenaiSettings, files: Path) -> None:
        self._settings = settings
        self._files = files
        self._made = facts_of(files)
        self.clock: Clock = WallClock()
        self._generator: Any = None
        self._answer: Any = None

    def prepare(self, folder: Path) -> Prepared:
        """Import the library; torch is not needed."""
        import onnxruntime_genai

        self._library = onnxruntime_genai
        onnxruntime_genai.disable_telemetry_events()
        return Prepared("decoder", self._made["vocab_size"], self._made["context_length"])

    def load(self) -> None:
        """Read the graph, let the library optimise it and repack its weights, and make the cache."""
        settings = self._settings
        config = self._library.Config(str(self._files))
        options = {"intra_op_num_threads": settings.n_threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        model = self._library.Model(config)
        longest = min(settings.n_positions + 1, self._made["context_length"] or settings.n_positions + 1)
        asked = self._library.GeneratorParams(model)
        # Never done before the last position, whatever is picked: the end of text is forbidden as long.
        asked.set_search_options(
            batch_size=settings.batch, max_length=longest, min_length=longest, do_sample=False
        )
        self._generator = self._library.Generator(model, asked)

    def prefill(self, inputs: np.ndarray) -> None:
        """The prompt from an empty cache."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(np.ascontiguousarray(inputs, dtype=np.int32))
        self._answer = self._generator.get_logits()

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """Pick one token per sequence by the last logits, or by ones that leave no choice, and run it."""
        if tokens_B1 is not None:
            chosen = np.full(self._answer.shape, -SURE, np.float32)
            np.put_along_axis(chosen, tokens_B1[:, :, None], SURE, axis=-1)
            self._generator.set_logits(chosen)
        self._generator.generate_next_token()
        self._answer = self._generator.get_logits()  # runs the forward

    def logits(self) -> np.ndarray:
        """Of the last position, [batch, vocabulary]."""
        return np.array(self._answer[:, -1], dtype=np.float32)

    def close(self) -> None:
        """Drop generator and cache."""
        self._generator = self._answer = None

    def facts(self) -> Facts:
        """What was really run."""
        settings, made = self._settings, self._made
        decoder = json.loads((self._files / CONFIG).read_text())["model"]["decoder"]
        per_token = 8 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        notes = [f"the graph's weights have {bytes_of(made):,} bytes"]
        if made["packed"]:
            notes.append(
                f"{made['own_grid']} of {made['packed']} stored integer weights are kept packed in the graph, on their own "
                "grids"
            )
        elif made["was_packed"]:
            notes.append("the stored weights are compressed; they were unpacked to float32 and rounded anew")
        return Facts(
            dtype="float32" if settings.weights == "stored" else settings.weights,
            attention_kernel="GroupQueryAttention",
            weights_memory_bytes=bytes_of(made),
            device_peak_bytes=None,
            exact=settings.weights == "stored" and bool(made["exact"]),
            kv_cache_bytes=per_token * settings.batch * self._generator.token_count(),
            conditions={
                "activations": "float" if settings.weights == "stored" else settings.activations,
                "graph": dict(made),
            },
            notes=tuple(notes),
        )


def _by_builder(dense: Path, target: Path, cache: Path, settings: OrtGenaiSettings) -> None:
    import logging

    import onnxruntime_genai.models  # puts its folder where the builder looks for its own parts  # noqa: F401
    from onnxruntime_genai.models import builder

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    precision = PRECISION[settings.weights]
    options = {"hf_token": "false"}
    if settings.weights != "stored":
        options |= {
            "block_size": settings.block_size,
            "accuracy_level": str(ACCURACY[settings.activations]),
            "is_symmetric": "false" if settings.zero_points else "true",
            "algo_config": "default" if settings.algorithm == "rtn" else settings.algorithm,
        }
    if settings.weights == "int4" and settings.head == "int8":
        options |= {"matmul_mixed_precision": "last_matmul:int8", "shared_embeddings": "false"}
    given = [f"{name}={value}" for name, value in options.items()]
    parsed = builder.parse_extra_options("", str(dense), str(target), precision, "cpu", str(cache), given)
    builder.create_model("", str(dense), str(target), precision, "cpu", str(cache), **parsed)


def _pack(file: Path, grids: Mapping[str, Any], scratch: Path) -> int:
    """Write the graph again with stored integer weights on their own grids; how many there were."""
    import onnx_ir

    data = file.with_name(f"{file.name}.data")
    graph = onnx_ir.load(str(file))
    found = on_own_grid(graph, grids)
    onnx_ir.save(graph, str(scratch / file.name), external_data=data.name)
    del graph
    for name in (file.name, data.name):
        (scratch / name).replace(file.with_name(name))
    return found


def _without_special_tokens(path: Path, vocab_size: int) -> None:
    """Let no token end or pad a text but the vocabulary's last, which no fixed workload depends on."""
    config = json.loads(path.read_text())
    config["model"] |= {"eos_token_id": [vocab_size - 1], "pad_token_id": vocab_size - 1}
    path.write_text(json.dumps(config))
