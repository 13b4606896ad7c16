"""MX formats: weights as narrow floats, 32 of which share a power of two."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.models.loaded import LoadedModel
from core.numerics.schemes import MxElement, MxScheme, ScaleRule
from core.quantize.narrow_floats import FormatSettings, store_as
from core.registry import method
from core.types import Documents, Progress, Result

ELEMENTS: dict[int, MxElement] = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
"""The elements that compressed-tensors has a format for; e3m2 and e5m2 have none."""


class MxfpSettings(FormatSettings):
    """Which element, and how a block's power of two is chosen."""

    bits: Literal[4, 6, 8] = Field(
        default=4,
        description="Bits of an element: 4 is e2m1, 6 is e2m3, 8 is e4m3; the scale adds a quarter bit",
    )
    rule: ScaleRule = Field(
        default="even",
        description="Power of two of a block: floor clips its largest values, ceil never does and may waste a bit, even "
        "rounds the largest first",
    )

    @property
    def format(self) -> MxScheme:
        """The number format of the matrices."""
        return MxScheme(ELEMENTS[self.bits], self.rule)


@method("compress", title="MXFP", paper="https://arxiv.org/abs/2310.10537", group="quantize")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: MxfpSettings
) -> Result:
    """Store every matrix in a microscaling format: 32 narrow floats of a row share a power of two. No data, seconds.

    The formats of the OCP specification that new accelerators multiply directly. MXFP4 holds 0, ½, 1, 1½, 2, 3, 4, 6 and
    their negatives times a power of two, so at 4.25 bits it is coarser than an integer grid with a 16-bit scale per
    group; MXFP6 and MXFP8 are finer. Norms, biases, routers and position embeddings stay as they are.
    """
    return store_as(loaded, progress, settings, method="mxfp")
