"""A model as another library has quantized it, and how that library loads one.

The library's own modules run its own kernels; what probes and evaluations see are the dense weights that the packed ones
stand for (``quantized.densify``). bitsandbytes and torchao are read by transformers' auto classes, optimum-quanto only by
its own class, which is known by a file beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.lazy import torch, transformers

QUANTO_MAP = "quanto_qmap.json"
"""The file by which a folder is optimum-quanto's."""


@dataclass(eq=False)
class LibraryForm:
    """What a quantizing step of a library leaves: its model, to be written by it."""

    library: str
    """As a config names it: ``bitsandbytes``, ``torchao`` or ``quanto``."""
    version: str
    label: str
    """The format, as a variant is listed by it."""
    model: Any
    """Quantized and not run yet: bitsandbytes repacks weights at the first forward pass."""
    loader: str
    """The class that loads it, for a person to read."""
    wrapped: Any
    """What has ``save_pretrained``: the model, or quanto's wrapper of it."""

    def save(self, folder: Path) -> None:
        """Write weights and config as the library does."""
        with torch.inference_mode(False), torch.no_grad():
            if self.library == "quanto":
                self.wrapped._save_pretrained(folder)  # the public one adds a model card of its own
            else:
                self.wrapped.save_pretrained(folder)


def quanto_class(auto: str) -> Any:
    """optimum-quanto's class for models of a transformers auto class; it ships those of two, and this is their pattern."""
    from optimum.quanto.models.transformers_models import QuantizedTransformersModel

    return type("QuantizedModel", (QuantizedTransformersModel,), {"auto_class": getattr(transformers, auto)})


def library_of(folder: Path, quantization: Any) -> str | None:
    """Which library's kernels a folder's model runs on; None for plain torch, also where weights are unpacked at load."""
    if (folder / QUANTO_MAP).is_file():
        return "quanto"
    said = quantization if isinstance(quantization, dict) else vars(quantization) if quantization else {}
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method")))
    return method if method in ("bitsandbytes", "torchao") else None


def load_quanto(folder: Path, auto: str) -> Any:
    """The model of a quanto folder with the library's modules and kernels."""
    return quanto_class(auto).from_pretrained(folder)._wrapped
