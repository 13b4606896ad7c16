"""How a vision model cuts its input, from its config alone: image and patch size, the grid, the tokens that are no patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class PatchGrid:
    """Patches row by row, after the tokens that are no patch."""

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
    """The grid of a config; a side that is no multiple of the patch loses its rest, as in the model."""
    (height, width), (patch_height, patch_width) = image_size(config), patch_size(config)
    distilled = ("[DIST]",) if config.model_type == "deit" else ()
    registers = tuple(f"[REG{n}]" for n in range(1, getattr(config, "num_register_tokens", 0) + 1))
    special = ("[CLS]", *distilled, *registers)
    return PatchGrid(height // patch_height, width // patch_width, patch_height, patch_width, special)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the model's input in pixels."""
    return _pair(config.image_size)


def patch_size(config: Any) -> tuple[int, int]:
    """Height and width of one patch in pixels."""
    return _pair(config.patch_size)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
