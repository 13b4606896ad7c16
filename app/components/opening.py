"""The model a page looks at, opened; until it is, or where it cannot be, the page says so and ends there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import engine, questions, state, stored
from app.components.error_card import error_card
from app.components.waiting import settled
from app.text import esc
from core.errors import SlimscopeError
from core.models.sizes import ModelCard
from core.types import Run


@dataclass(frozen=True)
class Opened:
    """An open model, and the stored run that the address names."""

    source: str
    card: ModelCard
    run: Run | None


def opened(page: questions.Page, top: Any) -> Opened:
    """Take up the address's run and open the model; stops the script after drawing progress or the refusal.

    An address that asks for a probe of another page is sent there. ``top`` is the container for the title.
    """
    title = page.capitalize()
    try:
        run = stored.take_up_run()
        belongs = questions.page_of_id(st.query_params.get("probe", ""))
        if belongs is not None and belongs != page:
            st.switch_page(f"../pages/{belongs}.py", query_params=st.query_params.to_dict())
        source = state.model()
        opening = engine.open_model(source)
    except SlimscopeError as error:
        top.title(title, anchor=False)
        error_card(error, key="source", retry=stored.forget if st.query_params.get("run") else None)
        st.stop()
    card = settled(opening, key="open")
    if card is None:
        top.title(esc(f"Opening {source}"), anchor=False)
        st.stop()
    return Opened(source, card, run)
