"""A picture as a vision model's tokens: pixel values, the grid of patches, and the tokens that are no patch.

Shared by the probes that look at vision models. How a picture is read and processed is ``core.images``' knowledge.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.errors import BadInput
from core.images.pictures import Picture, read_picture
from core.images.pixels import to_pixels
from core.models.patch_grid import PatchGrid, patch_grid
from core.types import Prompt

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SHOWN_PIXELS = 224
"""A picture smaller than this is enlarged by a whole factor, without smoothing, before it is drawn."""


@dataclass(frozen=True)
class EncodedImage:
    """A picture as one vision model takes it. P is the number of positions, special tokens included."""

    inputs: dict[str, Any]
    """The model's keyword arguments, on its device."""
    grid: PatchGrid
    picture: Picture
    seen_HWC: NDArray[np.uint8]
    """The picture as the model sees it, before normalising."""
    notes: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """P."""
        return self.grid.n_tokens

    @property
    def texts(self) -> tuple[str, ...]:
        """What each position is to a reader: a special token, or a patch by row and column."""
        patches = (
            f"row {n // self.grid.columns}, column {n % self.grid.columns}"
            for n in range(self.grid.n_patches)
        )
        return (*self.grid.special, *patches)

    @property
    def enlarged(self) -> int:
        """Pixels of the drawn picture per pixel of the model's input."""
        height, width = self.seen_HWC.shape[:2]
        return max(1, -(-SHOWN_PIXELS // min(int(height), int(width))))

    def png(self) -> bytes:
        """The picture as the model sees it, enlarged where it is small."""
        from PIL import Image

        pixels = self.seen_HWC.repeat(self.enlarged, axis=0).repeat(self.enlarged, axis=1)
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
        return file.getvalue()

    def patch_frame(self, weight_N: NDArray[Any]) -> pd.DataFrame:
        """One row per patch: its place in the grid, its box in pixels of ``png``, its weight."""
        grid, n = self.grid, np.arange(self.grid.n_patches)
        row, column = n // grid.columns, n % grid.columns
        width, height = grid.patch_width * self.enlarged, grid.patch_height * self.enlarged
        return pd.DataFrame(
            {
                "patch": n,
                "row": row,
                "column": column,
                "x": column * width,
                "y": row * height,
                "width": width,
                "height": height,
                "weight": weight_N,
            }
        )


def encode_image(loaded: LoadedModel, prompt: Prompt) -> EncodedImage:
    """Read and process a prompt's image for this model; raises ``BadInput`` for text, no image, or an unusable one."""
    if prompt.image is None:
        raise BadInput(
            f"{loaded.ref} is a vision model and reads no text; give it an image: a file, or digits:N, e.g. digits:1348"
        )
    picture = read_picture(prompt.image)
    pixels = to_pixels(loaded, [picture])
    seen = pixels.seen_NHWC[0]
    return EncodedImage(
        {"pixel_values": pixels.values_NCHW},
        patch_grid(loaded.model.config),
        picture,
        seen,
        (*picture.notes, *_resizing(picture, seen)),
    )


def _resizing(picture: Picture, seen_HWC: NDArray[np.uint8]) -> tuple[str, ...]:
    (width, height), (to_height, to_width) = picture.size, seen_HWC.shape[:2]
    if (width, height) == (to_width, to_height):
        return ()
    distorted = width * to_height != height * to_width
    tail = ", which changes its proportions unless the processor crops it" if distorted else ""
    return (f"The picture was resized from {width} × {height} to {to_width} × {to_height} pixels{tail}.",)
