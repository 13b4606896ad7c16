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

from core.errors import BadInput, CannotMeasure, SlimscopeError
from core.images.pictures import Picture, read_picture
from core.images.pixels import image_size, patch_size, to_pixels
from core.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

SHOWN_PIXELS = 224
"""A picture smaller than this is enlarged by a whole factor, without smoothing, before it is drawn."""


@dataclass(frozen=True)
class PatchGrid:
    """How a vision model cuts its input: patches row by row, after the tokens that are no patch."""

    rows: int
    columns: int
    patch_height: int
    patch_width: int
    """Pixels of the model's input."""
    special: tuple[str, ...]
    """Tokens before the patches: the class token, then a distillation token or registers where the model has them."""

    @property
    def n_patches(self) -> int:
        """Patches of one picture."""
        return self.rows * self.columns

    @property
    def n_tokens(self) -> int:
        """Positions of the residual stream."""
        return len(self.special) + self.n_patches

    def patches(self, values_P: NDArray[Any]) -> NDArray[Any]:
        """The patches' part of one value per position."""
        return values_P[len(self.special) :]


def patch_grid(config: Any) -> PatchGrid:
    """The grid that a vision model's config says; a side that is no multiple of the patch loses its rest, as in the model."""
    (height, width), (patch_height, patch_width) = image_size(config), patch_size(config)
    distilled = ("[DIST]",) if config.model_type == "deit" else ()
    registers = tuple(f"[REG{n}]" for n in range(1, getattr(config, "num_register_tokens", 0) + 1))
    special = ("[CLS]", *distilled, *registers)
    return PatchGrid(height // patch_height, width // patch_width, patch_height, patch_width, special)


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


def class_logits(loaded: LoadedModel, pixels_NCHW: Tensor) -> Tensor:
    """Float32 class logits [N, classes]; raises ``CannotMeasure`` without a classifier, ``SlimscopeError`` if not finite."""
    if loaded.anatomy.unembedding is None:
        raise CannotMeasure(
            f"{loaded.ref} has no classifier, so it names no classes; open an image classifier"
        )
    logits_NC: Tensor = loaded.model(pixel_values=pixels_NCHW).logits.float()
    if not logits_NC.isfinite().all():
        raise SlimscopeError(
            "the class logits are not finite (NaN or infinity); open the model in float32, or check its weights"
        )
    return logits_NC


def _resizing(picture: Picture, seen_HWC: NDArray[np.uint8]) -> tuple[str, ...]:
    (width, height), (to_height, to_width) = picture.size, seen_HWC.shape[:2]
    if (width, height) == (to_width, to_height):
        return ()
    distorted = width * to_height != height * to_width
    tail = ", which changes its proportions unless the processor crops it" if distorted else ""
    return (f"The picture was resized from {width} × {height} to {to_width} × {to_height} pixels{tail}.",)
