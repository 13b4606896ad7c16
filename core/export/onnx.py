"""ONNX: one graph for ONNX Runtime, in float32, dynamic int8, or 4-bit blocks."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from core.errors import CannotExport
from core.export import _onnx_graph
from core.export._companions import write_companions
from core.export._parity import Parity, Runtime, compare
from core.export._report import exported
from core.export._trace import CACHELESS, traced
from core.lazy import torch
from core.libraries import needed, without_telemetry
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Metric, Progress, Result

FILE = "model.onnx"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZED = {
    "float32": (),
    "int8": ("MatMulInteger", "DynamicQuantizeMatMul"),
    "int8_blocks": ("MatMulNBits",),
    "int4": ("MatMulNBits",),
}
"""Operators whose presence shows that a graph really is quantized."""


MUCH = 0.15
"""Share of an output's root mean square that is lost, from which on a reader is told what to choose instead."""


class OnnxSettings(Settings):
    """How the graph's weights are stored."""

    weights: Literal["float32", "int8", "int8_blocks", "int4"] = Field(
        default="int8",
        description="float32: the model as it is; int8: per output channel, activations rounded to 8 bits as they come; "
        "int8_blocks and int4: blocks of 8- or 4-bit weights (MatMulNBits), activations untouched",
    )
    block_size: Literal["32", "64", "128"] = Field(
        default="32", description="int8_blocks and int4: consecutive weights of an output that share a scale"
    )
    seven_bits: bool = Field(
        default=False,
        title="Seven bits only",
        description="int8: leave the top bit unused. x86 processors without VNNI add in 16 bits, and full 8-bit codes "
        "overflow there",
    )
    embedding: Literal["int8", "float32"] = Field(
        default="int8", description="All but float32: the token table, as one scale per row or as it is"
    )


@method(
    "export",
    title="ONNX",
    paper="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
)
def run(loaded: LoadedModel, folder: Path, progress: Progress, settings: OnnxSettings) -> Result:
    """Write one ONNX graph that ONNX Runtime runs on servers, phones and in browsers.

    transformers' own exporter traces the model with rows and tokens left open. For int8, ONNX Runtime's dynamic
    quantization stores every matrix product's weights as int8 with a scale per output channel and rounds activations
    while running (MatMulInteger), all of a product's with one scale: a model with a few large activations loses much.
    int8_blocks and int4 store blocks of weights (MatMulNBits) and leave activations in float32. The
    token table becomes int8 with a scale per row. The operators are counted, and a graph that has none of those it was
    asked for is refused.
    """
    started = time.monotonic()
    versions = needed(*LIBRARIES, by="the ONNX export")
    without_telemetry()
    progress(0.05, 1.0, "tracing the model")
    program = traced(loaded, _export, "ONNX")
    _onnx_graph.strip(program)
    if settings.weights != "float32":
        _onnx_graph.fold_transposes(program)
        if settings.embedding == "int8":
            _onnx_graph.int8_tables(program)
    progress(0.5, 1.0, "writing the graph")
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
        write_graph(program, Path(scratch), folder, settings)
    operators = _operators(folder / FILE)
    wanted = QUANTIZED[settings.weights]
    count = sum(operators[name] for name in wanted)
    if wanted and not count:
        raise CannotExport(
            f"{loaded.anatomy.architecture}: ONNX Runtime found no matrix product to store as {settings.weights}; "
            "nothing was kept. Export weights=float32"
        )
    progress(0.8, 1.0, "running it in ONNX Runtime")
    parity = _checked(loaded, folder, settings)
    files = sorted(path.name for path in folder.glob(f"{FILE}*"))
    write_companions(loaded, folder, "float32")
    left = operators["MatMul"] + operators["Gemm"]
    return exported(
        loaded, "onnx", settings, _rows(folder / FILE), folder, parity, started=started,
        format_=f"ONNX {settings.weights}", runtime=f"ONNX Runtime {versions['onnxruntime']}, CPU", files=files,
        metrics=(
            Metric("quantized_products", count, "", "higher"),
            Metric("float_products", left, "", "neither"),
        ),
        notes=(
            _product_note(settings, operators, count, left),
            _loss_note(settings, parity),
            CACHELESS if loaded.family == "decoder" else "",
            _tied_note(loaded, settings),
        ),
    )  # fmt: skip


def _export(model: Any, inputs: dict[str, Any], config: dict[str, Any]) -> Any:
    exporters: Any = importlib.import_module("transformers.exporters")
    return exporters.OnnxExporter().export(model, inputs, exporters.OnnxConfig(**config)).program


def write_graph(program: Any, scratch: Path, folder: Path, settings: OnnxSettings) -> None:
    """The graph and its weights beside it (``model.onnx.data``), quantized on the way where asked."""
    import onnx
    import onnx_ir

    if settings.weights == "float32":
        onnx_ir.save(program, str(folder / FILE), external_data=f"{FILE}.data")
        return
    plain = scratch / "plain.onnx"
    onnx_ir.save(program, str(plain), external_data="plain.onnx.data")
    if settings.weights == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        _forget_shapes(plain)
        quantize_dynamic(
            plain, folder / FILE, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=settings.seven_bits,
            weight_type=QuantType.QInt8, use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(plain)),
        bits=4 if settings.weights == "int4" else 8,
        block_size=int(settings.block_size),
        is_symmetric=False,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / FILE), use_external_data_format=True)


def _forget_shapes(path: Path) -> None:
    """Drop noted shapes of weights: the quantizer transposes some and then trips over them."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    weights = {each.name for each in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, str(path))


def _operators(path: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


def _checked(loaded: LoadedModel, folder: Path, settings: OnnxSettings) -> Parity:
    parity = compare(loaded, runtime(folder))
    parity.refuse_if_broken(f"the ONNX {settings.weights} graph", exact=settings.weights == "float32")
    return parity


def runtime(folder: Path) -> Runtime:
    """The exported graph in ONNX Runtime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    output = next(v.name for v in session.get_outputs() if v.name in ("logits", "last_hidden_state"))

    def call(inputs: Mapping[str, Any]) -> Any:
        return session.run([output], {name: array for name, array in inputs.items() if name in taken})[0]

    return call


def _rows(path: Path) -> list[dict[str, Any]]:
    """One row per stored tensor: the table, the head, and the weights of the layers."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    # A table is read by its Gather first, whoever else reads it.
    by_gather = sorted(proto.graph.node, key=lambda node: node.op_type == "Gather")
    use = {name: node for node in by_gather for name in node.input}
    last = {value.name for value in proto.graph.output}
    rows = []
    for tensor in proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        size = int(np.prod(tensor.dims, dtype=np.int64))
        rows.append(
            {
                "component": _component(use.get(tensor.name), proto.graph.node, last, len(tensor.dims)),
                "format": str(dtype),
                "parameters": size,
                "bytes": size * dtype.itemsize,
                "noise": None,
                "signal": None,
            }
        )
    return rows


def _component(node: Any, nodes: Sequence[Any], outputs: set[str], ndim: int) -> str:
    """What a stored tensor belongs to, by who reads it: a gathered table, the product that ends in logits, or a layer."""
    if node is None:
        return "layers"
    if node.op_type == "Gather" and ndim == 2:
        return "embedding"
    reached = {*node.output}
    for _ in range(3):  # a quantized product ends in a cast and a multiplication
        if reached & outputs:
            return "head"
        following = [each for each in nodes if reached & set(each.input)]
        if any(each.op_type not in ("Cast", "Mul") for each in following):
            return "layers"
        reached = {name for each in following for name in each.output}
    return "layers"


def _product_note(settings: OnnxSettings, operators: Counter[str], count: int, left: int) -> str:
    if settings.weights == "float32":
        return ""
    kind = next(name for name in QUANTIZED[settings.weights] if operators[name])
    return f"{count} matrix products are {kind}, {left} multiply in float32 (both sides change, as in attention)."


def _loss_note(settings: OnnxSettings, parity: Parity) -> str:
    """Said where rounding activations costs this model much, with the setting that does not."""
    worst = float(parity.frame["relative_rms"].max())
    if settings.weights != "int8" or worst < MUCH:
        return ""
    return (
        f"Its outputs are off by {worst:.0%} of their root mean square: a product's activations share one 8-bit scale, and "
        "this model has some that are far larger than the rest. weights=int8_blocks leaves activations alone."
    )


def _tied_note(loaded: LoadedModel, settings: OnnxSettings) -> str:
    if not loaded.anatomy.tied or settings.weights == "float32":
        return ""
    return "Embedding and head are one tensor in the model and two in the file: a table to gather from, a matrix to multiply."
