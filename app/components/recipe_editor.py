"""The workbench of the Compress page: a recipe as ordered steps with a form each, as a budget to keep, or as JSON."""

from __future__ import annotations

import json
from functools import partial

import streamlit as st

from app import drafts, engine, state
from app.components.budget_panel import WRITE_AS, Make, budget_panel
from app.components.step_list import step_list
from app.components.step_picker import step_picker
from app.components.text_check import text_check
from app.compress_views import clash, telling
from app.drafts import Draft
from app.forms import settings_form
from app.text import esc
from core.models.sizes import ModelCard
from core.recipe import CALIBRATION, Recipe, Step
from core.registry import get

WAYS = {"steps": "Steps", "budget": "Fit a budget", "json": "JSON"}
CHECK = "check_text"


def way() -> str:
    """How the recipe is written: a key of ``WAYS``."""
    return str(st.session_state[WRITE_AS])


def recipe_editor(model: str, opening: engine.Call, card: ModelCard | None, *, make: Make) -> Recipe | None:
    """Draw the recipe as the reader wants it; None after saying what is wrong or missing.

    ``card`` is None until the model is open: then every method is offered, and those that do not fit refuse later.
    ``make`` queues the plan of a budget.
    """
    draft = drafts.current()
    if draft.wrong:
        st.session_state[WRITE_AS] = st.query_params[WRITE_AS] = "json"
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header("Your own recipe", anchor=False, width="stretch")
        how = state.choice(
            st.segmented_control,
            "Write it as",
            WAYS,
            key=WRITE_AS,
            default="steps",
            required=True,
            label_visibility="collapsed",
        )
    if how == "json":
        return _as_json(draft)
    if how == "budget":
        return budget_panel(model, opening, make=make)
    return _as_steps(draft, model, card)


def _as_steps(draft: Draft, model: str, card: ModelCard | None) -> Recipe | None:
    offers = card.offers if card else None
    left, right = st.columns([3, 7], gap="medium")
    with right:
        step = _form(draft)
        calibration = draft.calibration
        if draft.recipe.reads_text:
            calibration = _calibration(draft, may_check=card is not None)
    if step is not None:
        draft = drafts.edited(draft, step, calibration)
    with left:
        step_list(
            [(get("compress", s.method).title, telling(s)) for s in draft.steps],
            key="steps",
            selected=draft.chosen,
            on_pick=drafts.choose,
            on_move=partial(drafts.move, version=draft.version),
            version=draft.version,
        )
        step_picker(offers, version=draft.version)
        if wrong := clash(draft.recipe):
            st.markdown(f":orange[:material/warning: {esc(wrong)}]")
    if card is not None and draft.recipe.reads_text and st.session_state.get(CHECK):
        text_check(draft.calibration or CALIBRATION, model, card, draft.steps[draft.chosen])
    return None if step is None else draft.recipe


def _form(draft: Draft) -> Step | None:
    """The chosen step: its name, what can be done with it, its settings; None where a setting is refused."""
    at, step = draft.chosen, draft.steps[draft.chosen]
    method = get("compress", step.method)
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        st.markdown(f"**{esc(method.title)}**", width="stretch")
        last = len(draft.steps) - 1
        for icon, name, possible, act, *where in (
            ("arrow_upward", "Up", at > 0, drafts.move, at, at - 1),
            ("arrow_downward", "Down", at < last, drafts.move, at, at + 1),
            ("content_copy", "Duplicate", True, drafts.duplicate, at),
            ("delete", "Remove", last > 0, drafts.remove, at),
        ):
            st.button(
                name,
                icon=f":material/{icon}:",
                type="tertiary",
                disabled=not possible,
                key=f"step_{name.lower()}_{draft.version}",
                on_click=act,
                args=where,
                kwargs={"version": draft.version},
            )
    st.caption(esc(method.summary))
    settings = settings_form(method, prefix=f"step{draft.version}", start=step.settings, bind=False)
    return None if settings is None else Step(method=step.method, settings=settings.model_dump(mode="json"))


def _calibration(draft: Draft, *, may_check: bool) -> str:
    """The text that calibrated steps read, and whether it is to be checked."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input(
            "Calibration text",
            draft.calibration or CALIBRATION,
            key=f"calibration{draft.version}",
            help="What calibrated steps measure the model on: pydoc (the reference prose every Python ships), domains, "
            "domain:NAME, a text file's path, or hub:ID. Evaluation reads other documents.",
        )
        st.toggle("Check this text", key=CHECK, disabled=not may_check)
    return text.strip() or CALIBRATION


def _as_json(draft: Draft) -> Recipe | None:
    """Typed or uploaded; whatever is there is in the address, so that a recipe is a link."""
    st.file_uploader("Recipe file", type="json", key="recipe_file", max_upload_size=1, on_change=_take_upload)
    key = f"recipe_text{draft.version}"
    st.text_area(
        "Recipe JSON",
        draft.text if draft.wrong else written(draft.recipe),
        key=key,
        height=260,
        max_chars=drafts.LONGEST,
        help="Steps are applied in order; a setting that is missing takes its default",
        on_change=lambda: drafts.take(st.session_state[key] or ""),
    )
    st.caption("The same JSON is a file for the command line: `slimscope run recipe.json --model MODEL`")
    if draft.wrong:
        st.markdown(f":red[{esc(draft.wrong)}]")
        return None
    return draft.recipe


def _take_upload() -> None:
    file = st.session_state["recipe_file"]
    if file is not None:
        drafts.take(file.getvalue()[: drafts.LONGEST].decode("utf-8", errors="replace"))


def written(recipe: Recipe) -> str:
    """The recipe as people read it."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2)
