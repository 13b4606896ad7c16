"""Number formats as frames and words for the Formats page; plain functions, no drawing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import format as fmt
from app.components.number_bits import BitRow, Part
from core.errors import BadInput
from core.numerics.catalogue import (
    FORMATS,
    NumberFormat,
    Stored,
    round_blocks,
    sqnr_db,
    store,
)
from core.numerics.schemes import ScaleRule

LARGEST_NUMBER = 3.4e38
WIDE = 16
"""Formats of so many bits or more have too many values to draw each."""
NEIGHBOURS = 12
"""Values on each side of a number that the close view shows."""
SMALLEST_ERROR = 1e-8
"""Relative error at which the error's bar has no length left."""
_POWER = re.compile(r"(-?)2\^(-?\d{1,3})")


def parse_number(text: str) -> float:
    """A number as people type it: ``0.1``, ``1e-3``, ``1/3``, ``2^-9``. Raises ``BadInput``."""
    said = text.strip().replace("−", "-").replace(",", ".")
    power = _POWER.fullmatch(said)
    above, _, below = said.partition("/")
    try:
        value = float(f"{power[1]}1") * 2.0 ** int(power[2]) if power else float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"{text!r} is no number; type one like 0.1, -3, 1e-3, 1/3 or 2^-9") from None
    if not abs(value) <= LARGEST_NUMBER:
        raise BadInput(f"{text} is beyond float32; type a number between -3.4e38 and 3.4e38")
    return value


def exact(value: float) -> str:
    """A number with the digits that tell it from its neighbours, at most ten."""
    return f"{value:.10g}"


def bit_rows(number: float, largest: float, rule: ScaleRule) -> list[BitRow]:
    """What every format stores of a number."""
    return [_bit_row(number, one, store(number, one, largest=largest, rule=rule)) for one in FORMATS.values()]


def _bit_row(number: float, format_: NumberFormat, stored: Stored) -> BitRow:
    error = relative_error(number, stored.value)
    length = 0.0 if error == 0 else 1 - math.log(min(error, 1)) / math.log(SMALLEST_ERROR)
    parts = tuple(Part(kind, bits) for kind, bits in stored.parts)
    return BitRow(
        format_.title,
        format_.bits,
        parts,
        f"{stored.value:.7g}",
        off_by(number, stored.value),
        max(0.02 if error else 0.0, length),
        stored.clipped,
    )


def relative_error(number: float, stored: float) -> float:
    """|stored - number| / |number|; 0 for a zero that is kept."""
    return abs(stored - number) / abs(number) if number else float(stored != 0)


def off_by(number: float, stored: float) -> str:
    """The relative error in words."""
    error = relative_error(number, stored)
    if error == 0:
        return "exact"
    if error >= 0.0001:
        return f"{'+' if abs(stored) > abs(number) else '−'}{fmt.significant(100 * error, 2)} %"
    return f"{error:.0e}".replace("e-0", "e-")


def meanings(format_: NumberFormat, stored: Stored) -> list[Part]:
    """The fields of a stored number with what each stands for."""
    fields = dict(stored.parts)
    says = {"sign": "−" if fields.get("sign") == "1" else "+"}
    if format_.element is not None:
        element = format_.element
        exponent, mantissa = int(fields["exponent"], 2), int(fields["mantissa"], 2)
        says["exponent"] = f"2^{max(exponent, 1) - element.bias}"
        says["mantissa"] = f"{mantissa / 2**element.mantissa_bits + (exponent > 0):.10g}"
    else:
        says["code"] = "code"
    return [Part(kind, bits, says[kind]) for kind, bits in stored.parts]


def formula(format_: NumberFormat, stored: Stored) -> str:
    """How the bits become the number, in LaTeX."""
    scale = "" if format_.block is None else rf" \times {_latex(stored.scale)}"
    fields = dict(stored.parts)
    if format_.element is None:
        return rf"{_latex(stored.value / stored.scale)}{scale} = {_latex(stored.value)}"
    element = format_.element
    exponent, mantissa = int(fields["exponent"], 2), int(fields["mantissa"], 2)
    significand = mantissa / 2**element.mantissa_bits + (exponent > 0)
    power = f"{exponent} - {element.bias}" if exponent else f"1 - {element.bias}"
    sign = "-" if fields["sign"] == "1" else ""
    return rf"{sign}2^{{{power}}} \times {significand:.10g}{scale} = {_latex(stored.value)}"


def _latex(value: float) -> str:
    mantissa, _, exponent = f"{value:.8g}".partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


def alike(format_: NumberFormat) -> list[NumberFormat]:
    """The formats of as many bits, the one itself first."""
    return [format_, *(one for one in FORMATS.values() if one.bits == format_.bits and one is not format_)]


def grid_values(format_: NumberFormat, scale: float, *, near: float | None = None) -> pd.DataFrame:
    """Columns value, kind: the values of a format times a scale.

    All of them; of wide formats the powers of two, or with ``near`` the neighbours of that number.
    """
    element = format_.element
    if element is not None and near is not None:
        code = int(element.encode(abs(near) / scale))
        codes = np.arange(max(0, code - NEIGHBOURS), min(element.largest_code, code + NEIGHBOURS) + 1)
        values = element.decode(codes) * (-1 if near < 0 else 1)
    elif element is not None and format_.bits >= WIDE:
        exponents = np.arange(1 - element.bias, element.largest_exponent + 1)
        powers = np.ldexp(1.0, exponents)
        values = np.concatenate([-powers[::-1], [0.0], powers])
    else:
        values = format_.grid()
    kind = np.full(len(values), "normal", dtype=object)
    if element is not None:
        kind[np.abs(values) < element.smallest_normal] = "subnormal"
    kind[values == 0] = "zero"
    return pd.DataFrame({"format": format_.title, "value": values * scale, "kind": kind})


def spacing_steps(format_: NumberFormat, scale: float) -> pd.DataFrame:
    """Columns format, value, spacing: the distance to the next value, from each value (wide: each power of two) on."""
    element = format_.element
    if element is not None:
        exponents = np.arange(1 - element.bias - element.mantissa_bits, element.largest_exponent + 2)
        values = np.minimum(np.ldexp(1.0, exponents), element.largest)
        spacing = np.array([element.spacing(value) for value in values])
    else:
        positive = np.array([point for point in format_.points if point >= 0])
        values, spacing = positive[1:], np.diff(positive)
        values, spacing = np.append(values[:1] / 4, values), np.append(spacing[:1], spacing)
    return pd.DataFrame({"format": format_.title, "value": values * scale, "spacing": spacing * scale})


def error_curve(format_: NumberFormat, largest: float, rule: ScaleRule) -> pd.DataFrame:
    """Columns format, value, relative_error: the largest among numbers of each of 30 parts of a decade.

    The numbers are in a block with this largest magnitude, from it down to a ten thousandth of it.
    """
    steps = np.linspace(0, 4, 4 * 30 * 24, endpoint=False)[::-1]
    numbers = largest * 10.0**-steps
    blocks = np.stack([numbers, np.full_like(numbers, largest)], axis=-1)
    stored = round_blocks(blocks, format_, rule=rule).values_NK[:, 0]
    error = (np.abs(stored - numbers) / numbers).reshape(-1, 24).max(-1)
    return pd.DataFrame(
        {"format": format_.title, "value": numbers.reshape(-1, 24)[:, 12], "relative_error": error}
    )


def neighbours(format_: NumberFormat, stored: Stored) -> list[str]:
    """The stored value between the two below and the two above it."""
    grid = grid_values(format_, stored.scale, near=stored.value or stored.scale * format_.smallest)["value"]
    near = np.unique(np.append(grid, stored.value))
    at = int(np.searchsorted(near, stored.value))
    return [exact(value) for value in near[max(0, at - 2) : at + 3]]


def format_table(rule: ScaleRule) -> pd.DataFrame:
    """One row per format: sizes, range, and what remains of two known distributions."""
    rows = [
        {
            "format": one.title,
            "family": one.family,
            "bits": one.bits,
            "bits_per_weight": one.bits_per_weight,
            "scale": one.scale or "none",
            "largest": one.largest,
            "smallest": one.smallest,
            "range_db": one.dynamic_range_db,
            "gaussian_db": sqnr_db(one, "gaussian", rule),
            "uniform_db": sqnr_db(one, "uniform", rule),
        }
        for one in FORMATS.values()
    ]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Line:
    """What the number line shows."""

    values: pd.DataFrame
    """Columns format, value, kind: the chosen format first."""
    marks: pd.DataFrame
    """Columns format, number, stored: where each format keeps the number."""
    domain: tuple[float, float]


def on_a_line(
    format_: NumberFormat, number: float, largest: float, rule: ScaleRule, *, zoom: str, axis: str
) -> Line:
    """The values of a format and of those with as many bits; a logarithmic axis shows magnitudes."""
    if axis == "log":
        number = abs(number)
    formats = alike(format_)
    stored = [store(number, one, largest=largest, rule=rule) for one in formats]
    near = number if zoom == "near" else None
    pairs = zip(formats, stored, strict=True)
    values = pd.concat([grid_values(one, kept.scale, near=near) for one, kept in pairs], ignore_index=True)
    titles, kept_values = [one.title for one in formats], [kept.value for kept in stored]
    marks = pd.DataFrame({"format": titles, "number": number, "stored": kept_values})
    return Line(values, marks, _domain(values, number, largest, zoom=zoom, axis=axis))


def _domain(
    values: pd.DataFrame, number: float, largest: float, *, zoom: str, axis: str
) -> tuple[float, float]:
    """The ends of the number line: of the block, of everything, or of the first format's values near the number."""
    first = values[values["format"] == values["format"].iloc[0]]["value"]
    if zoom == "near":
        gap = first[first != number].sub(number).abs().min()
        low, high = number - 8.5 * gap, number + 8.5 * gap
    elif zoom == "all":
        low, high = float(values["value"].min()), float(values["value"].max())
    else:
        low, high = -1.08 * largest, 1.08 * largest
    if axis == "linear":
        return low, high
    positive = values["value"][values["value"] > 0]
    least = float(positive.min()) if zoom == "all" else max(float(positive.min()), largest * 1e-4)
    start = max(low, least) if zoom == "near" else least
    return (min(start, number / 1.5) if number > 0 else start), max(high, least * 2)
