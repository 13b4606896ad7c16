"""NVFP4: weights as 4-bit floats in blocks of 16, each with an 8-bit float as its scale."""

from __future__ import annotations

from core.models.loaded import LoadedModel
from core.numerics.schemes import Nvfp4Scheme
from core.quantize.narrow_floats import FormatSettings, store_as
from core.registry import method
from core.types import Documents, Progress, Result


class Nvfp4Settings(FormatSettings):
    """How the two big tables are kept; the format itself has nothing to set."""

    @property
    def format(self) -> Nvfp4Scheme:
        """The number format of the matrices."""
        return Nvfp4Scheme()


@method("compress", title="NVFP4", paper="https://arxiv.org/abs/2509.25149", group="quantize")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: Nvfp4Settings
) -> Result:
    """Store every matrix in NVFP4, 4.5 bits per weight: no data, seconds of work.

    e2m1 floats (0, ½, 1, 1½, 2, 3, 4, 6) in blocks of 16. A block's scale is an e4m3 float rather than a power of two, and
    the matrix has one float32 scale: half MXFP4's block and a finer scale for a quarter bit more. Values come back
    rounded to bfloat16, as the loader computes them. Norms, biases, routers and position embeddings stay as they are.
    """
    return store_as(loaded, progress, settings, method="nvfp4")
