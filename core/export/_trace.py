"""Tracing a model for another runtime through transformers' own exporters: what goes in, and which sizes may vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.errors import CannotExport
from core.export._parity import trace_inputs
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.quiet import quiet, without_chatter

MOST_ROWS = 1024
CACHELESS = (
    "The graph has no key/value cache: it reads a whole text at once and names the next token of every position, so "
    "generating with it costs a pass over the whole text per token."
)


def traced(
    loaded: LoadedModel, export: Callable[[Any, dict[str, Any], dict[str, Any]], Any], format_: str
) -> Any:
    """``export(model, inputs, config)`` with rows and tokens left open; raises ``CannotExport`` with the exporter's words.

    ``config`` holds what every exporter's config takes.
    """
    if loaded.dtype != "float32":
        raise CannotExport(
            f"a graph is traced in float32, this model is held in {loaded.dtype}; open it as float32"
        )
    inputs: dict[str, Any] = dict(trace_inputs(loaded))
    shapes: dict[str, Any] = {name: _open_sizes(loaded, tensor.ndim) for name, tensor in inputs.items()}
    if loaded.family == "decoder":
        inputs["use_cache"] = False
    try:
        with quiet(), without_chatter(), torch.no_grad():
            config = {"dynamic_shapes": shapes, "prefer_deferred_runtime_asserts_over_guards": True}
            return export(loaded.model, inputs, config)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "no message")
        raise CannotExport(
            f"{loaded.anatomy.architecture} cannot be traced for {format_} by transformers' exporter "
            f"({type(error).__name__}: {said[:200]}); nothing was written. Export safetensors instead"
        ) from error


def _open_sizes(loaded: LoadedModel, ndim: int) -> dict[int, Any]:
    """Which axes vary: the rows, and an input of tokens' length."""
    axes = {0: torch.export.Dim("batch", min=1, max=MOST_ROWS)}
    if ndim == 2:
        axes[1] = torch.export.Dim("tokens", min=1, max=loaded.anatomy.context_length)
    return axes
