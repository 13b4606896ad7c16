"""What a calibration text is worth for the open model: the calibration report, run when asked and drawn as any result."""

from __future__ import annotations

import streamlit as st

from app.arrangement import Look
from app.components.asking import answer
from app.components.error_card import error_card
from app.components.result_panel import result_panel
from app.engine import Question
from app.text import esc
from core.errors import SlimscopeError
from core.models.sizes import ModelCard
from core.recipe import Step
from core.registry import get
from core.types import Prompt

PROBE = "calibration_report"
SHARED = ("samples", "sample_tokens", "seed")
"""Settings of calibrated steps that the report has too: it then looks at the windows that the step would read."""


def text_check(text: str, model: str, card: ModelCard, step: Step) -> None:
    """Draw the report on ``text`` for this model, or its cost and progress, or why it cannot be made."""
    probe = get("probe", PROBE)
    shared = {name: step.settings[name] for name in SHARED if name in step.settings}
    try:
        settings = probe.parse({"text": text, **shared})
        probe.refuse_if(probe.needs - card.offers, model)
        result = answer(Question.of(model, probe, Prompt(), settings), probe, card, key=PROBE)
    except SlimscopeError as error:
        error_card(error, key=f"{PROBE}_refused")
        return
    if result is not None:
        with st.container(border=True):
            st.caption(esc(f"{text}, as a calibrated step would read it"))
            result_panel(result, name=PROBE, settings=None, look=Look(narrow=True))
