"""From a click to queued jobs: what the pages that make variants have in common."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from app import engine
from core.errors import SlimscopeError
from core.jobs.plan import submit_sweep
from core.recipe import Recipe

REFUSAL = "refusal"
"""Where the session keeps why the last click was refused."""


def make(model: str, recipes: Sequence[Recipe]) -> None:
    """Queue the recipes' jobs in one group, which the address names; measured as the form on the page says. From a callback."""
    measured = st.session_state["measured"]
    try:
        jobs = submit_sweep(
            engine.queue(), model=model, recipes=recipes, evaluate=measured.evaluate, profile=measured.profile
        )
        engine.start_work()
        st.query_params["group"] = jobs[0].group_id
    except SlimscopeError as error:
        st.session_state[REFUSAL] = error
