"""Pictures that a user gives to a vision model: checked, named by their content, kept in the data folder.

The address carries the name only, never a path; what is no picture or too large is refused here.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from core.errors import BadInput
from core.paths import data_dir

LIMIT_BYTES = 8_000_000
LIMIT_PIXELS = 40_000_000
KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp"}
DIGITS = re.compile(r"digits:\d{1,5}")
_NAME = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp|bmp)")


def keep(content: bytes) -> str:
    """Store a picture and return its name; raises ``BadInput`` for anything that is none."""
    from PIL import Image

    if len(content) > LIMIT_BYTES:
        raise BadInput(f"the image has {len(content):,} bytes, {LIMIT_BYTES:,} is the most; make it smaller")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            kind, (width, height) = picture.format, picture.size
            if width * height > LIMIT_PIXELS:
                raise BadInput(
                    f"the image has {width}×{height} pixels, {LIMIT_PIXELS:,} is the most; make it smaller"
                )
            picture.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise BadInput("this file is no image that can be read; give a PNG, JPEG, WebP or BMP file") from None
    if kind not in KINDS:
        raise BadInput(f"{kind} images are not read here; give a PNG, JPEG, WebP or BMP file")
    name = f"{hashlib.sha256(content).hexdigest()}.{KINDS[kind]}"
    path = _folder() / name
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(path)
    return name


def source_of(name: str) -> str:
    """What a probe takes as image: ``digits:N`` as it is, a kept picture's path; raises ``BadInput``."""
    if DIGITS.fullmatch(name):
        return name
    if not _NAME.fullmatch(name) or not (_folder() / name).is_file():
        raise BadInput(f"there is no image {name[:80]!r} here; upload one, or give digits:N, e.g. digits:7")
    return str(_folder() / name)


def name_of(source: str) -> str:
    """The name in the address of what a probe was given."""
    return source if DIGITS.fullmatch(source) else Path(source).name


def _folder() -> Path:
    folder = data_dir() / "images"
    folder.mkdir(exist_ok=True)
    return folder
