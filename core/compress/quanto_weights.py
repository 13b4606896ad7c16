"""optimum-quanto: int8, int4, int2 or float8 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from core.compress._library import quantized_by
from core.lazy import transformers
from core.libraries import needed
from core.models.library import LibraryForm, quanto_class
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Documents, Progress, Result

BITS = {"int8": 8, "int4": 4, "int2": 2, "float8": 8}


class QuantoSettings(Settings):
    """Which of the library's formats."""

    format: Literal["int8", "int4", "int2", "float8"] = Field(
        default="int4",
        description="int8 and float8 (e4m3): one scale per row; int4 and int2: groups of 128 with scale and shift",
    )


@method(
    "compress",
    title="Weights by optimum-quanto 0.2.7",
    group="quantize",
    paper="https://github.com/huggingface/optimum-quanto",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: QuantoSettings
) -> Result:
    """Quantize every linear layer by the optimum-quanto library, weights only.

    Its files are loaded by the library's own class, ``QuantizedModelForCausalLM`` or the same pattern for other models;
    plain ``AutoModel`` does not know them, and the proof says so. A tied head stays with its embedding. Embedding and norms
    stay; put cast first to hold them in 16 bits.
    """
    version = needed("optimum-quanto", "ninja", by="quanto_weights")["optimum-quanto"]
    tied = [loaded.anatomy.unembedding] if loaded.anatomy.tied and loaded.anatomy.unembedding else None

    def quantize(folder: Path, auto: str) -> LibraryForm:
        from optimum import quanto

        model = (
            getattr(transformers, auto).from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        )
        weights = getattr(quanto, f"q{settings.format}")
        wrapped = quanto_class(auto).quantize(model, weights=weights, exclude=tied)
        loader = (
            "QuantizedModelForCausalLM"
            if auto == "AutoModelForCausalLM"
            else f"QuantizedTransformersModel of {auto}"
        )
        return LibraryForm("quanto", version, f"quanto {settings.format}", wrapped._wrapped, loader, wrapped)

    return quantized_by(
        loaded, quantize, progress, settings, method="quanto_weights", bits=BITS[settings.format]
    )
