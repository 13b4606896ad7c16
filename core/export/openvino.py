"""OpenVINO: an IR file for Intel's runtime, in float32, float16, or int8 weights."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from core.errors import CannotExport
from core.export._companions import write_companions
from core.export._parity import Parity, Runtime, compare
from core.export._report import exported
from core.export._trace import CACHELESS, traced
from core.lazy import torch
from core.libraries import needed, without_telemetry
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Metric, Progress, Result

FILES = ("openvino_model.xml", "openvino_model.bin")
"""The names that OpenVINO's own tools look for."""


class OpenVinoSettings(Settings):
    """How the graph's weights are stored."""

    weights: Literal["float32", "float16", "int8"] = Field(
        default="int8",
        description="float32: the model as it is; float16: its weights rounded, products as the device does them; int8: "
        "weights of matrix products and of the token table, one scale per row",
    )


@method("export", title="OpenVINO", paper="https://docs.openvino.ai")
def run(loaded: LoadedModel, folder: Path, progress: Progress, settings: OpenVinoSettings) -> Result:
    """Write an OpenVINO IR that Intel's runtime runs on CPU, GPU and NPU.

    transformers' own exporter traces the model with rows and tokens left open; int8 is NNCF's symmetric weight
    compression: every matrix product's weights and the token table get one scale per row, activations stay floats. It
    is checked on the CPU in float32 products; a runtime that is left its defaults may round activations too.
    """
    started = time.monotonic()
    by = "the OpenVINO export"
    versions = needed("openvino", *(("nncf",) if settings.weights == "int8" else ()), by=by)
    without_telemetry()
    progress(0.05, 1.0, "tracing the model")
    program = traced(loaded, _export, "OpenVINO")
    stored = 0
    if settings.weights == "int8":
        progress(0.5, 1.0, "compressing weights")
        program, stored = _compressed(program)
        if not stored:
            raise CannotExport(
                f"{loaded.anatomy.architecture}: NNCF found no weights to compress; nothing was kept. Export float32"
            )
    import openvino

    openvino.save_model(program, str(folder / FILES[0]), compress_to_fp16=settings.weights == "float16")
    rows = _rows(program, half=settings.weights == "float16")
    progress(0.8, 1.0, "running it in OpenVINO")
    parity = _checked(loaded, folder, settings)
    write_companions(loaded, folder, "float32")
    return exported(
        loaded, "openvino", settings, rows, folder, parity, started=started, format_=f"OpenVINO {settings.weights}",
        runtime=f"OpenVINO {versions['openvino']}, CPU, float32 products, activations not quantized", files=FILES,
        metrics=() if settings.weights != "int8" else (Metric("quantized_tensors", stored, "", "higher"),),
        notes=(CACHELESS if loaded.family == "decoder" else "",),
    )  # fmt: skip


def _export(model: Any, inputs: dict[str, Any], config: dict[str, Any]) -> Any:
    exporters: Any = importlib.import_module("transformers.exporters")
    return exporters.OpenVINOExporter().export(model, inputs, exporters.OpenVINOConfig(**config)).program


def _compressed(program: Any) -> tuple[Any, int]:
    """The graph with int8 weights, and how many there are."""
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    smaller = nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_SYM)
    return smaller, sum(_dtype(op) == "i8" for op in smaller.get_ops() if op.get_type_name() == "Constant")


def _checked(loaded: LoadedModel, folder: Path, settings: OpenVinoSettings) -> Parity:
    parity = compare(loaded, runtime(folder))
    parity.refuse_if_broken(f"the OpenVINO {settings.weights} graph", exact=settings.weights == "float32")
    return parity


def runtime(folder: Path) -> Runtime:
    """The exported graph in OpenVINO on the CPU: what is in the file, without the device's own shortcuts."""
    import openvino

    plain = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    compiled = openvino.Core().compile_model(str(folder / FILES[0]), "CPU", plain)
    names = {name for port in compiled.inputs for name in port.get_names()}
    output = next(p for p in compiled.outputs if {"logits", "last_hidden_state"} & set(p.get_names()))

    def call(inputs: Mapping[str, Any]) -> Any:
        return compiled({name: array for name, array in inputs.items() if name in names})[output]

    return call


def _dtype(constant: Any) -> str:
    return str(constant.get_output_element_type(0).get_type_name())


def _rows(program: Any, *, half: bool) -> list[dict[str, Any]]:
    """One row per stored constant: the table, the head, and the weights of the layers."""
    rows = []
    for op in program.get_ops():
        if op.get_type_name() != "Constant":
            continue
        shape, dtype = list(op.get_output_shape(0)), _dtype(op)
        size = 1
        for each in shape:
            size *= each
        narrow = half and dtype == "f32"
        width = op.get_output_element_type(0).bitwidth
        rows.append(
            {
                "component": _component(op, len(shape)),
                "format": "f16" if narrow else dtype,
                "parameters": size,
                "bytes": size * (16 if narrow else width) // 8,
                "noise": None,
                "signal": None,
            }
        )
    return rows


def _component(constant: Any, ndim: int) -> str:
    """What a constant belongs to, by who reads it: a gathered table, the product that ends in the output, or a layer."""
    readers = _readers(constant)
    while ndim == 2 and readers and readers[0].get_type_name() in ("Convert", "Multiply", "Reshape"):
        readers = _readers(readers[0])
    kinds = {reader.get_type_name() for reader in readers}
    if "Gather" in kinds and ndim == 2:
        tied = any(_ends(reader) for reader in readers if reader.get_type_name() == "MatMul")
        return "embedding and head" if tied else "embedding"
    if any(_ends(reader) for reader in readers if reader.get_type_name() == "MatMul"):
        return "head"
    return "layers"


def _ends(product: Any) -> bool:
    return any(reader.get_type_name() == "Result" for reader in _readers(product))


def _readers(op: Any) -> list[Any]:
    return [target.get_node() for output in op.outputs() for target in output.get_target_inputs()]
