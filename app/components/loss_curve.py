"""The course of a training: its newest figures, loss on training and held-out rows, gradient norm, and what it writes.

Generated text is shown as plain text, never as Markdown or HTML.
"""

from __future__ import annotations

import streamlit as st

from app.live_training import Course, headlines, loss_chart, small_chart
from app.text import esc, visible

MOST_SAMPLES = 3


def loss_curve(shown: Course, *, key: str, narrow: bool = False) -> None:
    """Draw a course; ``key`` begins the keys of its charts, ``narrow`` puts all below each other."""
    figures = headlines(shown)
    grid = st.grid(max(1, 3 if narrow else len(figures)), min_column_width=120)
    for label, value, told in figures:
        with grid.container(gap=None):
            st.caption(esc(label))
            st.markdown(f"**{esc(value)}**")
            st.caption(esc(told))
    if not len(shown.updates):
        st.caption("Nothing was learned yet: the first measurement comes before the first update.")
        return
    left, right = (st.container(), st.container()) if narrow else st.columns([7, 3], gap="small")
    with left:
        st.altair_chart(loss_chart(shown), key=f"{key}_loss", alt="Loss over the tokens read")
    with right:
        if not narrow:
            for column, title in (("gradient_norm", "Gradient norm"), ("tokens_per_s", "Tokens/s")):
                chart = small_chart(shown, column, title)
                st.altair_chart(chart, key=f"{key}_{column}", alt=f"{title} over the tokens read")
    _samples(shown, key)


def _samples(shown: Course, key: str) -> None:
    """What it writes now, and what it wrote before it learned anything."""
    if shown.samples.empty:
        return
    with st.expander("What it writes", icon=":material/edit_note:", key=f"{key}_samples", expanded=True):
        ends = shown.samples["tokens"].drop_duplicates().iloc[[0, -1]].drop_duplicates().iloc[::-1]
        for tokens in ends:
            st.caption(f"After {tokens:,.0f} tokens: the text it was given ❘ how it went on")
            for _, row in shown.samples[shown.samples["tokens"] == tokens].head(MOST_SAMPLES).iterrows():
                st.text(f"{visible(row['prompt'])} ❘ {visible(row['continuation'])}")
