"""What runtimes take of our own exports: a method file may not import another, these shared parts may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.models.loaded import LoadedModel
from core.types import Progress

ONNX_FILE = "model.onnx"


def dense_copy(loaded: LoadedModel, folder: Path, progress: Progress) -> None:
    """The model as plain float32 safetensors, for libraries that read such folders."""
    from core.export.safetensors import SafetensorsSettings, run

    run(loaded, folder, progress, SafetensorsSettings(weights="float32"))


def onnx_settings(weights: str, block_size: str) -> Any:
    """Settings of the ONNX export."""
    from core.export.onnx import OnnxSettings

    return OnnxSettings.model_validate({"weights": weights, "block_size": block_size})


def whole_onnx(loaded: LoadedModel, folder: Path, progress: Progress, asked: Any) -> None:
    """The model's forward over whole inputs as one ONNX file, checked as the export checks it."""
    from core.export.onnx import run

    run(loaded, folder, progress, asked)


def written_onnx(graph: Any, scratch: Path, folder: Path, asked: Any) -> None:
    """A graph as the export would store it."""
    from core.export.onnx import write_graph

    write_graph(graph, scratch, folder, asked)
