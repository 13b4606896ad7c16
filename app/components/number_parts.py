"""The cards of the Formats page's first half: one number in every format, one format's values, all formats beside."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st

from app import number_views as views
from app import state
from app.components import number_charts as charts
from app.components.card_head import card_head
from app.components.number_bits import bit_strip, bit_table
from app.text import esc
from core.errors import BadInput
from core.numerics.catalogue import FORMATS, NumberFormat, Stored, store
from core.numerics.schemes import ScaleRule

RULES: dict[str, str] = {"even": "even", "floor": "floor", "ceil": "ceil"}
ZOOMS = {"block": "The whole block", "all": "Everything", "near": "Around the number"}
AXES = {"linear": "linear", "log": "log"}
CURVES = {"error": "Relative error", "spacing": "Spacing"}
SIGNALS = {"gaussian_db": "Gaussian", "uniform_db": "Uniform"}


@dataclass(frozen=True)
class Asked:
    """What the reader typed and chose."""

    number: float
    largest: float
    rule: ScaleRule
    format: NumberFormat

    @property
    def stored(self) -> Stored:
        """What the chosen format makes of the number."""
        return store(self.number, self.format, largest=self.largest, rule=self.rule)


def question() -> Asked | None:
    """Draw the inputs; None after saying what is wrong with one."""
    with st.container(border=True):
        columns = st.grid(4, min_column_width=180)
        with columns.container():
            number = _number("Number", "number", "0.1", "0.1, -3, 1e-3, 1/3 or 2^-9")
        with columns.container():
            largest = _number(
                "Largest of its block",
                "largest",
                "1",
                "The largest magnitude among the values that share a scale with it: it sets the scale",
            )
        with columns.container():
            titles = {one.id: one.title for one in FORMATS.values()}
            chosen = state.choice(st.selectbox, "Format", titles, key="format", default="e4m3")
        with columns.container():
            rule = state.choice(
                st.segmented_control,
                "Scale rule of MX formats",
                RULES,
                key="rule",
                default="even",
                required=True,
                help="How a microscaling block's power of two is chosen: floor clips, ceil never does, even rounds first",
            )
    if number is None or largest is None:
        return None
    if largest == 0:
        largest = abs(number) or 1.0
    scale_rule: ScaleRule = "floor" if rule == "floor" else "ceil" if rule == "ceil" else "even"
    return Asked(number, max(abs(largest), abs(number)), scale_rule, FORMATS[chosen])


def _number(label: str, key: str, default: str, help_: str) -> float | None:
    text = st.text_input(label, default, key=key, bind="query-params", max_chars=32, help=help_)
    try:
        return views.parse_number(text)
    except BadInput as error:
        st.markdown(f":red[{esc(error)}]")
        return None


def every_format(asked: Asked) -> None:
    """The number's bits in every format; a click chooses the format."""
    ids = list(FORMATS)
    rows = views.bit_rows(asked.number, asked.largest, asked.rule)
    frame = pd.DataFrame(
        {
            "format": row.title,
            "bits": " ".join(part.bits for part in row.parts),
            "reads_back": row.value,
            "off_by": row.off,
        }
        for row in rows
    )
    with st.container(border=True, height="stretch"):
        title = f"{views.exact(asked.number)} in every format"
        card_head(title, frame, None, key="number_bits")

        def pick(index: int) -> None:
            st.session_state["format"] = st.query_params["format"] = ids[index]

        bit_table(
            rows, key="number_bits_table", label=title, selected=ids.index(asked.format.id), on_pick=pick
        )
        if asked.largest > abs(asked.number):
            st.caption(
                esc(
                    f"Formats with a scale: in a block whose largest magnitude is {views.exact(asked.largest)}. "
                    "A longer orange bar is a larger relative error (logarithmic)."
                )
            )


def one_format(asked: Asked) -> None:
    """The chosen format: its bits large, the formula, and what it can hold."""
    format_, stored = asked.format, asked.stored
    with st.container(border=True, height="stretch"):
        st.header(esc(f"{format_.title}: {_sentence(format_)}"), anchor=False)
        bit_strip(
            views.meanings(format_, stored), key="number_strip", label=f"Bits of {views.exact(asked.number)}"
        )
        st.latex(views.formula(format_, stored))
        if stored.clipped:
            st.markdown(":red-badge[:material/content_cut: Beyond the largest value: clipped]")
        grid = st.grid(2, min_column_width=130)
        for label, value, help_ in _facts(asked):
            grid.metric(label, value, help=esc(help_) if help_ else None, border=True)
        around = [
            f"**{esc(value)}**" if value == views.exact(stored.value) else esc(value)
            for value in views.neighbours(format_, stored)
        ]
        st.caption(f"Its neighbours: {' · '.join(around)}")
        if format_.block is not None:
            st.caption(esc(f"Scale: {format_.scale}; here {stored.scale:.6g}."))


def _sentence(format_: NumberFormat) -> str:
    """A format in a few words."""
    if format_.element is not None:
        element = format_.element
        body = f"1 sign, {element.exponent_bits} exponent, {element.mantissa_bits} mantissa bits"
        return body if format_.block is None else f"{body}, scaled"
    n = len(format_.points)
    return f"{n} codes, evenly spaced, scaled" if format_.family == "integer" else f"{n} values, scaled"


def _facts(asked: Asked) -> list[tuple[str, str, str]]:
    format_, stored = asked.format, asked.stored
    scale = stored.scale
    scaled = (
        "" if format_.block is None else f"With this block's scale {scale:.6g}. The scale is {format_.scale}"
    )
    share = f"{format_.scale_bits} / {format_.block} bits are the scale's" if format_.block else ""
    return [
        ("Bits per weight", f"{format_.bits_per_weight:.4g}", share),
        ("Spacing here", f"{stored.spacing:.7g}", "Distance of neighbouring values around the number"),
        ("Largest", f"{format_.largest * scale:.5g}", scaled),
        ("Smallest above 0", f"{format_.smallest * scale:.4g}", scaled or f"{format_.smallest:.10g}"),
        (
            "Dynamic range",
            f"{format_.dynamic_range_db:,.0f} dB",
            "20 log10 of the largest magnitude over the smallest above 0, within one block",
        ),
        ("Off by", views.off_by(asked.number, stored.value), "Relative to the number"),
    ]


def line(asked: Asked) -> None:
    """The values of the format, and of the others with as many bits, on a number line."""
    with st.container(border=True):
        head = st.container(horizontal=True, vertical_alignment="center")
        with st.container(horizontal=True, gap="small"):
            zoom = state.choice(
                st.segmented_control, "Zoom", ZOOMS, key="zoom", default="block", required=True,
                label_visibility="collapsed",
            )  # fmt: skip
            axis = state.choice(
                st.segmented_control, "Axis", AXES, key="axis", default="linear", required=True,
                label_visibility="collapsed",
            )  # fmt: skip
        shown = views.on_a_line(asked.format, asked.number, asked.largest, asked.rule, zoom=zoom, axis=axis)
        drawn = charts.number_line(
            shown.values,
            shown.marks,
            axis="log" if axis == "log" else "linear",
            domain=shown.domain,
            chosen=asked.format.title,
        )
        with head:
            card_head(
                f"The values of {asked.format.bits}-bit formats", shown.values, drawn, key="number_line"
            )
        st.altair_chart(drawn, key="number_line_chart", alt="Every value of the format as a tick on a line")
        if asked.format.bits >= views.WIDE and zoom != "near":
            n = 2**asked.format.element.mantissa_bits if asked.format.element else 0
            st.caption(esc(f"Only powers of two are drawn: between one and the next lie {n:,} values."))


def curves(asked: Asked) -> None:
    """How far values are apart, or how far numbers move, over the magnitude."""
    with st.container(border=True, height="stretch"):
        head = st.container()
        kind = state.choice(
            st.segmented_control, "Curve", CURVES, key="curve", default="error", required=True,
            label_visibility="collapsed",
        )  # fmt: skip
        formats = views.alike(asked.format)
        if kind == "spacing":
            frame = pd.concat(
                [
                    views.spacing_steps(
                        one, store(asked.number, one, largest=asked.largest, rule=asked.rule).scale
                    )
                    for one in formats
                ],
                ignore_index=True,
            )
            drawn = charts.spacing_chart(frame, number=asked.number)
        else:
            frame = pd.concat(
                [views.error_curve(one, asked.largest, asked.rule) for one in formats], ignore_index=True
            )
            drawn = charts.error_chart(frame, number=asked.number)
        with head:
            title = "How far values lie apart" if kind == "spacing" else "How far numbers move"
            card_head(title, frame, drawn, key="number_curve")
        st.altair_chart(drawn, key="number_curve_chart", alt=title)


def all_formats(asked: Asked) -> None:
    """Every format's signal to noise against its bits, and the table of them."""
    table = views.format_table(asked.rule)
    with st.container(border=True, height="stretch"):
        head = st.container()
        column = state.choice(
            st.segmented_control, "Signal", SIGNALS, key="signal", default="gaussian_db", required=True,
            label_visibility="collapsed",
        )  # fmt: skip
        drawn = charts.sqnr_chart(table, column=column, chosen=asked.format.title)
        with head:
            card_head("What a bit buys", table, drawn, key="number_sqnr")
        st.altair_chart(drawn, key="number_sqnr_chart", alt="SQNR against bits per weight for every format")
        st.caption(
            "Dashed: 6.02 dB per bit, which no code of a Gaussian can pass."
            if column == "gaussian_db"
            else "Integers that fill their range gain 6.02 dB per bit."
        )


def table(asked: Asked) -> None:
    """Every format in one table."""
    frame = views.format_table(asked.rule)
    with st.container(border=True):
        card_head("Every format", frame, None, key="number_formats")
        # As text: the browser prints float32's largest number with all its digits whatever the format says.
        shown = frame.assign(largest=frame["largest"].map("{:.6g}".format))
        st.dataframe(
            shown,
            hide_index=True,
            height="content",
            column_config={
                "format": st.column_config.TextColumn("Format", pinned=True, width=105),
                "family": st.column_config.TextColumn("Family", width=80),
                "bits": st.column_config.NumberColumn("Bits", width=50),
                "bits_per_weight": st.column_config.NumberColumn("Bits per weight", format="%.3f", width=105),
                "scale": st.column_config.TextColumn("Scale", width=175),
                "largest": st.column_config.TextColumn("Largest", width=105, alignment="right"),
                "smallest": st.column_config.NumberColumn("Smallest above 0", format="%.4g", width=115),
                "range_db": st.column_config.NumberColumn("Range (dB)", format="%.1f", width=85),
                "gaussian_db": st.column_config.NumberColumn("Gaussian (dB)", format="%.1f", width=100),
                "uniform_db": st.column_config.NumberColumn("Uniform (dB)", format="%.1f", width=95),
            },
            alt="Every number format with its bits, range and signal to noise",
        )
        st.caption(
            "Largest and smallest are before scaling. Gaussian and uniform: the signal over the quantization noise (SQNR), measured "
            "on 65,536 seeded numbers of width 1, each format with blocks of its own, to about 0.1 dB."
        )
