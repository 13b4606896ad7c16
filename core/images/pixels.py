"""From pictures to a vision model's input, by the checkpoint's own image processor, and what the model sees of them.

Legend: N pictures, C channels, H and W pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.images.pictures import Picture
from core.models.patch_grid import image_size

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class Pixels:
    """Processed pictures."""

    values_NCHW: Tensor
    """The model's ``pixel_values``, on its device in its dtype."""
    seen_NHWC: NDArray[np.uint8]
    """The same pictures before scaling and normalising, 0 to 255: cropped and resized as the model sees them."""


def to_pixels(loaded: LoadedModel, pictures: Sequence[Picture]) -> Pixels:
    """Run the image processor; raises ``BadInput`` for a model without one, or when its output does not fit the model."""
    if loaded.processor is None:
        raise BadInput(
            f"{loaded.ref} has no preprocessor_config.json, so how a picture becomes its input is not known; "
            "put the checkpoint's own beside config.json"
        )
    config = loaded.model.config
    if config.num_channels not in (1, 3):
        raise BadInput(
            f"{loaded.ref} takes {config.num_channels} channels; only grey (1) and RGB (3) pictures are read"
        )
    images = [picture.image.convert("RGB" if config.num_channels == 3 else "L") for picture in pictures]
    size = image_size(config)
    kept = loaded.processor(images=images, return_tensors="np", do_rescale=False, do_normalize=False)
    for picture, seen in zip(pictures, kept["pixel_values"], strict=True):
        if seen.shape[-2:] != size:
            raise BadInput(
                f"{picture.name} is {picture.size[0]} × {picture.size[1]} pixels, and its processor gives {loaded.ref} "
                f"{seen.shape[-1]} × {seen.shape[-2]}, but it takes {size[1]} × {size[0]}; resize the picture to that"
            )
    values = loaded.processor(images=images, return_tensors="pt")["pixel_values"]
    seen_NCHW = np.clip(np.rint(np.stack(list(kept["pixel_values"]))), 0, 255).astype(np.uint8)
    model = loaded.model
    return Pixels(values.to(model.device, model.dtype), np.moveaxis(seen_NCHW, 1, -1))
