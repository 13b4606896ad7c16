"""The parts of the page Model: facts, components, modules, formats and the KV cache of one open model."""

from __future__ import annotations

import altair as alt
import pandas as pd
import streamlit as st

from app import format
from app.charts import PADDING
from app.components.card_head import card_head
from app.text import esc
from app.views import component_totals, heads_line, kv_at, moe_line, windows_line
from core.models.sizes import ModelCard

CACHE_DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of one cached value in the dtypes a cache is kept in."""


def facts(card: ModelCard) -> None:
    """The headline: size on disk, shape, heads, experts, context."""
    anatomy = card.anatomy
    cards = [
        (
            "Weights",
            format.size(card.bytes),
            f"{card.dtype} in memory, {format.size(card.file_bytes)} on disk",
        ),
        ("Layers", f"{anatomy.n_layers}", f"width {anatomy.d_model:,}, MLP {anatomy.d_ff:,}"),
        ("Heads", f"{anatomy.n_heads}", heads_line(anatomy)),
        ("Vocabulary", f"{anatomy.vocab_size:,}", "embedding and head tied" if anatomy.tied else "not tied"),
    ]
    grid = st.grid(4, min_column_width=200)
    for label, value, beneath in cards:
        grid.metric(
            label, value, delta=beneath, delta_color="off", delta_arrow="off", border=True, height="stretch"
        )
    st.caption(
        esc(
            f"{anatomy.architecture} · {card.family} · context {anatomy.context_length:,} · "
            f"{moe_line(anatomy)} · {windows_line(anatomy)} · {card.device} · fingerprint {card.fingerprint[:12]}"
        )
    )


def components(card: ModelCard) -> None:
    """Bytes per component as one bar each."""
    totals = component_totals(card.components)
    chart = (
        alt.Chart(totals)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            y=alt.Y("component:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False)),
            x=alt.X("megabytes:Q", title="MB", axis=alt.Axis(tickCount=6)),
            tooltip=[
                alt.Tooltip("component", title="Component"),
                alt.Tooltip("parameters", title="Parameters", format=",d"),
                alt.Tooltip("megabytes", title="MB", format=",.1f"),
                alt.Tooltip("share", title="Share", format=".1%"),
            ],
        )
    )
    label = chart.mark_text(align="left", dx=5, color="#7C869A").encode(
        text=alt.Text("share:Q", format=".1%")
    )
    card_head("Where the bytes are", totals, chart, key="components")
    drawn = (chart + label).properties(height=34 * len(totals) + 40, padding={**PADDING, "right": 40})
    st.altair_chart(drawn, key="components_chart", alt="Bytes of each component")


def modules(card: ModelCard) -> None:
    """Every module that owns parameters, the largest first."""
    card_head("Every module", card.components, None, key="modules")
    frame = card.components.sort_values("bytes", ascending=False, kind="stable")
    frame = frame.assign(megabytes=frame["bytes"] / 1e6)
    st.dataframe(
        frame[["module", "component", "parameters", "megabytes", "share", "dtype", "tied"]],
        hide_index=True,
        height=620,
        column_config={
            "module": st.column_config.TextColumn("Module", pinned=True),
            "component": "Component",
            "parameters": st.column_config.NumberColumn("Parameters", format="localized"),
            "megabytes": st.column_config.NumberColumn("MB", format="%.2f"),
            "share": st.column_config.NumberColumn("Share", format="percent"),
            "dtype": "Dtype",
            "tied": st.column_config.CheckboxColumn("Tied", width="small"),
        },
        alt="Every module with its parameters and bytes",
    )


def formats(card: ModelCard) -> None:
    """Predicted bytes of the weight file in each storage format."""
    card_head("What it would weigh", card.predicted, None, key="formats")
    same = st.toggle(
        "Quantize embedding and head too",
        key="outer",
        bind="query-params",
        help="Off: they keep their precision, as most 4-bit checkpoints do.",
    )
    kept = "same" if same else "kept"
    frame = card.predicted
    frame = frame[(frame["embedding_and_head"] == kept) | ~frame["format"].str.startswith("int")]
    frame = frame.assign(megabytes=frame["bytes"].astype(float) / 1e6)
    st.dataframe(
        frame.loc[frame["note"] == "", ["format", "megabytes", "bits_per_weight"]],
        hide_index=True,
        height="content",
        column_config={
            "format": st.column_config.TextColumn("Format", pinned=True),
            "megabytes": st.column_config.ProgressColumn(
                "File (MB)", format="%.1f", min_value=0, max_value=float(frame["megabytes"].max())
            ),
            "bits_per_weight": st.column_config.NumberColumn("Bits per weight", format="%.2f"),
        },
        alt="Predicted bytes of every storage format",
    )
    for name, note in frame.loc[frame["note"] != "", ["format", "note"]].itertuples(index=False):
        st.caption(esc(f"Not {name}: {note}"))


def kv_cache(card: ModelCard) -> None:
    """What the cache costs per token and at a chosen context."""
    if card.kv_cache.empty:
        st.header("KV cache", anchor=False)
        st.markdown(":gray[This model reads its whole input at once and keeps no cache.]")
        return
    head = st.container()
    limit = card.anatomy.context_length
    context = st.slider("Context (tokens)", 1, limit, min(2048, limit), key="context", bind="query-params")
    dtype = st.segmented_control(
        "Cache dtype", list(CACHE_DTYPES), default="bfloat16", required=True, key="cache", bind="query-params"
    )
    at = kv_at(card.anatomy, dtype_bytes=CACHE_DTYPES[dtype], context=context)
    left, right = st.columns(2)
    left.metric("Per further token", format.size(at.per_token))
    right.metric(f"At {context:,} tokens", format.size(at.total))
    chart = (
        alt.Chart(at.curve)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("context:Q", title="Context (tokens)", axis=alt.Axis(tickCount=4)),
            y=alt.Y("megabytes:Q", title="MB"),
            tooltip=[
                alt.Tooltip("context", format=",d"),
                alt.Tooltip("megabytes", title="MB", format=",.1f"),
            ],
        )
    )
    weights = pd.DataFrame({"megabytes": [card.bytes / 1e6], "what": ["the weights"]})
    rule = alt.Chart(weights).mark_rule(strokeDash=[5, 3], color="#8A93A6").encode(y="megabytes:Q")
    drawn = (chart + rule).properties(height=150, padding=PADDING)
    st.altair_chart(drawn, key="kv_chart", alt="Cache bytes against context; the dashed line is the weights")
    st.caption("Batch 1. The dashed line is the weights as they are held now.")
    with head:
        card_head("KV cache", at.curve, chart, key="kv")


def verified(card: ModelCard) -> str:
    """What was proved about the anatomy when the model was opened."""
    worst = max(card.checks.values(), default=0.0)
    return f"Anatomy verified by {len(card.checks)} identities, largest relative difference {worst:.1e}"
