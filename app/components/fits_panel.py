"""On which devices a model fits and how fast it would be there: modelled, with the band that past errors allow."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import streamlit as st

from app import device_charts, device_views, engine, measurements, state
from app import format as fmt
from app.components.card_head import card_head
from app.components.error_card import error_card
from app.components.waiting import settled
from app.text import esc
from core.errors import SlimscopeError
from core.predict.anchors import known_devices
from core.predict.config import of_config
from core.predict.fits import fits_on
from core.predict.model import Shape, of_card
from core.predict.predict import Workload
from core.predict.published import config_of, formats, models
from core.predict.source import variant_shape
from core.profile.shapes import known_shape

NAMED = "named:"
"""What the address of a well-known model begins with, which need not be here."""


def fits_panel() -> None:
    """Choose a model and a workload, and read the table of all devices."""
    shape = _shape()
    if shape is None:
        return
    workload = _workload(shape)
    seen, silence = measurements.observed(engine.revision())
    try:
        fits = fits_on(shape, workload=workload, known=known_devices(), seen=seen)
    except SlimscopeError as error:
        error_card(error, key="fits_error")
        return
    _answer(fits, shape)
    chart_rows = device_views.bands(fits)
    with st.container(border=True):
        chart = device_charts.bands(chart_rows) if len(chart_rows) else None
        card_head("Fits on…", device_views.fits_table(fits), chart, key="fits")
        st.caption(
            "Modelled, not measured: bytes and multiplications through the share of its peaks that a class of devices reaches; "
            "a band covers nine of ten past errors."
            + (f" {silence[:1].upper()}{silence[1:]}." if silence else "")
        )
        _table(fits)
    if chart is not None:
        with st.container(border=True):
            card_head("How fast it would be", chart_rows, chart, key="fits-rates")
            st.altair_chart(
                chart, key="fits_bands", alt=f"Predicted rates of {len(chart_rows)} devices with their bands"
            )


def _shape() -> Shape | None:
    """The chosen model's shape; None after drawing what there is instead."""
    newest = engine.newest_models(engine.revision())
    known = {str(row["id"]): f"{row['name']} ({fmt.size(row['bytes'])})" for _, row in newest.iterrows()}
    named = {f"{NAMED}{name}": f"{name}, by its config" for name in models()}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        titles = known | named
        fitting = newest.loc[newest["source"] == state.model(), "id"]
        default = str(fitting.iloc[0]) if len(fitting) else next(iter(titles))
        chosen = state.choice(st.selectbox, "Model or variant", titles, key="variant", default=default)
        if chosen.startswith(NAMED):
            kinds = {name: name for name in formats()}
            format_ = state.choice(st.selectbox, "Format", kinds, key="format", default="q4_k_m", width=150)
            name = chosen.removeprefix(NAMED)
            return of_config(name, config_of(name), formats()[format_])
    variant = engine.variant_of(chosen)
    try:
        if known_shape(variant.fingerprint) is not None:
            return variant_shape(engine.catalog(), chosen)
        card = settled(engine.open_model(variant.source), key="open_fits")
    except SlimscopeError as error:
        error_card(error, key="fits_source")
        return None
    return None if card is None else replace(of_card(card), name=variant.name)


def _workload(shape: Shape) -> Workload:
    longest = shape.context_length
    with st.grid(4, min_column_width=150):
        context = st.number_input(
            "Context", 1, longest, min(2048, longest), key="context", bind="query-params",
            help="Tokens in the cache, for which there must be room and at which a step is timed",
        )  # fmt: skip
        prompt = st.number_input("Prompt", 1, longest, min(512, longest), key="prompt", bind="query-params")
        batch = st.number_input("Sequences", 1, 1024, 1, key="sequences", bind="query-params")
        cache = state.choice(
            st.segmented_control,
            "KV cache",
            {"16": "16 bits", "8": "8 bits"},
            key="kv",
            default="16",
            required=True,
        )
    return Workload(int(context), min(int(prompt), int(context)), int(batch), int(cache) / 8)


def _answer(fits: pd.DataFrame, shape: Shape) -> None:
    """How many devices, why not the others, what is needed."""
    n = device_views.counts(fits)
    needed = fits.iloc[0]
    with st.grid(4, min_column_width=150, gap="small"):
        st.metric(
            "Fits on",
            f"{n['fits']} of {n['all']}",
            border=True,
            height="stretch",
            help="devices of the registry",
        )
        st.metric(
            "Context too long on",
            n["context too long"],
            border=True,
            height="stretch",
            help="a shorter one fits",
        )
        st.metric(
            "Weights too big on",
            n["weights too big"],
            border=True,
            height="stretch",
            help="no context would help",
        )
        st.metric(
            "Needs", fmt.size(float(needed["weights_bytes"]) + float(needed["kv_bytes"])), border=True, height="stretch",
            delta=f"{fmt.size(float(needed['weights_bytes']))} weights", delta_color="off", delta_arrow="off",
            delta_description=f"{fmt.size(float(needed['kv_bytes']))} cache", help=esc(f"counted: {shape.counted}"),
        )  # fmt: skip


def _table(fits: pd.DataFrame) -> None:
    column = st.column_config
    shown = device_views.fits_table(fits)
    st.dataframe(
        shown,
        hide_index=True,
        height=460,
        key="fits_table",
        alt="Every device: whether the model fits, why not, and how fast it would be",
        column_config={
            "slug": None,
            "name": column.TextColumn("Device", pinned=True, width="medium"),
            "kind": "Kind",
            "state": column.MultiselectColumn(
                "Fits",
                options=["fits", "context too long", "weights too big"],
                color=["green", "orange", "red"],
                width=130,
            ),
            "share": column.ProgressColumn("Of its memory", format="percent", min_value=0.0, max_value=1.0),
            "needed": "Needs",
            "decode": column.NumberColumn("tok/s", format="%.3g", width=70, help="predicted"),
            "decode_band": column.TextColumn("9 of 10 within", width=120),
            "ttft": column.NumberColumn("TTFT ms", format="%.3g", width=80, help="predicted, of the prompt"),
            "ttft_band": column.TextColumn("within", width=120),
            "longest": column.NumberColumn("Longest context", format="compact"),
            "told": column.TextColumn("How", width=100),
            "next": column.TextColumn("What would help", width="medium"),
            "basis": column.TextColumn("Rests on", width="medium"),
            "confidence": column.TextColumn("Sure", help="of the device's own figures"),
            "source": "Source",
        },
    )
