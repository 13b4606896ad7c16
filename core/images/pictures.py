"""A picture the user named, as pixels: an image file, or a row of the digits. Knows nothing of models.

Only plain picture formats are read, and nothing larger than ``MAX_PIXELS``: a file may come from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import BadInput
from core.images.digits import digit

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 50_000_000
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")
"""Modes with more than 8 bits a channel, which would be cut off, not scaled."""
_ALLOWED = f"give an image file ({', '.join(FORMATS)}) or digits:N, e.g. digits:1348"


@dataclass(frozen=True)
class Picture:
    """An RGB picture and what is known about it."""

    name: str
    image: Image
    label: str = ""
    """What it shows, where the data set says so."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


def read_picture(source: str) -> Picture:
    """Open what a user typed as a vision model's input; raises ``BadInput`` saying what was wrong with it."""
    source = source.strip()
    if source.startswith("digits:"):
        return _digit(source)
    path = Path(source).expanduser()
    if not source or "\x00" in source or not path.is_file():
        raise BadInput(f"there is no image file {source!r}; {_ALLOWED}")
    return _read_file(path)


def _digit(source: str) -> Picture:
    from PIL import Image

    row = source.removeprefix("digits:").strip()
    if not (row.isascii() and row.isdigit()):
        raise BadInput(
            f"{source!r} names no row of the digits; write digits:N with a number, e.g. digits:1348"
        )
    grey, label = digit(int(row))
    return Picture(source, Image.fromarray(grey).convert("RGB"), str(label))


def _read_file(path: Path) -> Picture:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise BadInput(
                    f"{path.name} is {width} × {height} pixels, more than {MAX_PIXELS:,}; make it smaller"
                )
            if opened.mode in _DEEP:
                raise BadInput(
                    f"{path.name} has more than 8 bits a channel (mode {opened.mode}); save it with 8 bits a channel"
                )
            notes = (
                ("Only the first frame of the animation is read.",)
                if getattr(opened, "n_frames", 1) > 1
                else ()
            )
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                notes = (*notes, "Transparent parts are shown to the model as white.")
                paper = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(paper, upright.convert("RGBA"))
            return Picture(path.name, upright.convert("RGB"), notes=notes)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise BadInput(f"{path.name} is not a picture that can be read; {_ALLOWED}") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise BadInput(f"{path.name} is damaged ({error}); save it anew, or {_ALLOWED}") from None
