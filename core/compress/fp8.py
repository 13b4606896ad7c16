"""FP8: weights as 8-bit floats with scales."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.models.loaded import LoadedModel
from core.numerics.schemes import FloatScheme
from core.quantize.narrow_floats import FormatSettings, TableFormat, store_as
from core.registry import method
from core.types import Documents, Progress, Result

E5M2_NOTE = (
    "The file's 8-bit floats are e5m2. Plain transformers reads what the file holds; other readers of compressed-tensors "
    "may take every 8-bit float for e4m3."
)
EXPERTS_NOTE = (
    "Experts have one scale per row: transformers multiplies them expert by expert, with no other scales."
)


class Fp8Settings(FormatSettings):
    """Which 8-bit float, and what shares a scale."""

    scale: Literal["row", "tensor", "block"] = Field(
        default="row",
        description="What shares a float32 scale: a row, the whole matrix, or a block of 128 × 128 (as DeepSeek-V3)",
    )
    element: Literal["e4m3", "e5m2"] = Field(
        default="e4m3",
        description="e4m3: 3 bits of mantissa, the one for weights; e5m2: 2 bits and more range",
    )
    embedding: TableFormat = Field(
        default="same",
        description="Token embedding: same as the matrices, float8 (e4m3 without scales), or bfloat16",
    )

    @property
    def format(self) -> FloatScheme:
        """The number format of the matrices."""
        return FloatScheme("float8_e4m3fn" if self.element == "e4m3" else "float8_e5m2", self.scale)

    @property
    def experts_format(self) -> FloatScheme:
        """Experts are read with one scale a row."""
        return FloatScheme(self.format.dtype, "row")


@method("compress", title="FP8", paper="https://arxiv.org/abs/2209.05433", group="quantize")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: Fp8Settings
) -> Result:
    """Store every matrix in 8-bit floats: no data, seconds of work, near lossless.

    Each row (or matrix, or block) is scaled so that its largest value becomes the format's largest, 448 for e4m3, and
    every value goes to the nearest float, ties to even. A float's error is relative: about 31 dB signal to noise
    whatever a weight's size, where an 8-bit integer grid spends its precision evenly and does better on rows without
    outliers. Norms, biases, routers and position embeddings stay as they are.
    """
    notes = (E5M2_NOTE,) if settings.element == "e5m2" else ()
    if loaded.anatomy.n_experts and settings.scale != "row":
        notes = (*notes, EXPERTS_NOTE)
    return store_as(loaded, progress, settings, method="fp8", notes=notes)
