"""The formats a group of weights can be stored in, by short names that people type. Torch-free."""

from __future__ import annotations

import re

from core.errors import BadInput
from core.numerics.schemes import FloatScheme, IntegerScheme

Format = IntegerScheme | FloatScheme | None
"""What a group is stored as; None: as it is."""
KEEP = "keep"
FLOATS = {
    "float8": FloatScheme("float8_e4m3fn"),
    "float8row": FloatScheme("float8_e4m3fn", "row"),
    "bfloat16": FloatScheme("bfloat16"),
}
"""Without scales, with a scale per row (for matrices: their weights are small), 16 bits."""
EXAMPLES = (
    "int2g32, int4g32, int4g32a (with zero points), int8 (a scale per row), float8, float8row, bfloat16, keep"
)
_INTEGER = re.compile(r"int(?P<bits>[2-8])(?:g(?P<group>32|64|128))?(?P<affine>a?)")


def read_format(text: str) -> Format:
    """A format by its short name. Raises ``BadInput`` listing what there is."""
    name = text.strip().lower()
    if name == KEEP:
        return None
    if name in FLOATS:
        return FLOATS[name]
    found = _INTEGER.fullmatch(name)
    if found is None:
        raise BadInput(f"format {text.strip()!r} is not known; write e.g. {EXAMPLES}")
    group = found["group"]
    return IntegerScheme(int(found["bits"]), None if group is None else int(group), not found["affine"])


def read_formats(text: str) -> dict[str, Format]:
    """Formats by name from a list, e.g. ``int4g32, float8``; raises ``BadInput`` for an unknown one or none."""
    names = [part.lower() for part in re.split(r"[,\s]+", text.strip()) if part]
    if not names:
        raise BadInput(f"no format is given; write e.g. {EXAMPLES}")
    return {name: read_format(name) for name in names}


def is_plain(format_: Format) -> bool:
    """Whether it is stored as floats without scales, which fits beside anything."""
    return format_ is None or (isinstance(format_, FloatScheme) and format_.scale == "none")


def is_symmetric(format_: Format) -> bool:
    """Whether it has scales and no zero points."""
    return not is_plain(format_) and not (isinstance(format_, IntegerScheme) and not format_.symmetric)
