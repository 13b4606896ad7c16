"""The rows that a training would read: how many tokens, how long, what they look like, and what would be refused.

Looked at when asked, in the process that holds the tokenizer; rows are shown as text in tables, never as Markdown.
"""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from app.arrangement import Look
from app.components.asking import answer
from app.components.error_card import error_card
from app.components.result_panel import result_panel
from app.distil_views import training_index
from app.engine import Question
from app.text import esc
from core.errors import SlimscopeError
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import get
from core.types import Prompt, Result

PROBE = "data_preview"
SHARED = ("data", "window", "held_out", "seed")
"""Settings of a training that say which rows it reads, and how."""


def data_preview(recipe: Recipe, model: str, card: ModelCard) -> int | None:
    """Draw the preview when it is open; tokens that are learned from in one epoch, or None where they are not counted."""
    at = training_index(recipe)
    assert at is not None, "the page shows recipes that train"
    told = recipe.steps[at].settings
    opened = st.expander("Look at the rows", icon=":material/table_rows:", key="rows", on_change="rerun")
    if not opened.open:
        return None
    with opened:
        st.caption(esc(told["data"]))
        result = _looked(told, model, card)
        if result is None:
            return None
        for refusal in result.flags:
            st.markdown(f":orange[:material/warning: {esc(refusal)}]")
        result_panel(replace(result, flags=()), name=PROBE, settings=None, look=Look())
    counted = next((m.value for m in result.metrics if m.name == "tokens"), None)
    return None if counted is None else round(float(counted) * (1 - float(told["held_out"])))


def _looked(told: dict[str, object], model: str, card: ModelCard) -> Result | None:
    """The preview of the rows that these settings name; None after drawing what there is instead."""
    probe = get("probe", PROBE)
    measured = str(st.session_state.get("documents") or "pydoc")
    try:
        settings = probe.parse({**{name: told[name] for name in SHARED}, "against": measured})
        probe.refuse_if(probe.needs - card.offers, model)
        return answer(Question.of(model, probe, Prompt(), settings), probe, card, key=PROBE)
    except SlimscopeError as error:
        error_card(error, key=f"{PROBE}_refused")
        return None
