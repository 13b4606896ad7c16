"""Distil: a smaller student made from a model, trained to say what its teacher says, beside its honest baselines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import streamlit as st

from app import drafts, engine, making, state
from app.components.data_preview import data_preview
from app.components.error_card import error_card
from app.components.group_card import GROUP, group_card, variants_of
from app.components.heading import About, Reproduction, heading
from app.components.measuring_form import measuring_form
from app.components.recipe_templates import recipe_templates
from app.components.student_after import student_after
from app.components.student_map import parts_table, student_map
from app.components.training_form import controls, cost_lines, training_form
from app.components.waiting import settled
from app.distil_templates import chosen, fitting
from app.distil_views import parts_frame, size_line, speed_line, student_of, toggled, training_index
from app.drafts import Draft
from app.reproduce import recipe_command, recipe_script
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.states import ACTIVE
from core.recipe import Recipe

QUESTION = "What small model should learn what from whom?"
ABOUT = About(
    "A student is a recipe: steps that make a smaller model, then a step that trains it to give the probabilities of its "
    "teacher, the model that it was made from. It is saved, reloaded, evaluated and profiled like every variant.\n\n"
    "A student is worth its bytes where it beats the teacher quantized to as many: that model, and the same student "
    "trained without a teacher, can be made beside it.\n\n"
    "Times are estimates from this model's measured pace on this machine; sizes are counted from its shapes.",
    r"\mathcal{L} = w_{kd}\, T^2\, \mathrm{KL}(p_T \,\|\, q_T) + w_{task}\, \mathrm{CE}",
    "https://arxiv.org/abs/1503.02531",
)
model = state.model()
make = partial(making.make, model)


def toggle(recipe: Recipe, block: int) -> None:
    """Keep or drop a block of the teacher."""
    new = toggled(recipe, card, block)
    if new is not None:
        drafts.use(new)


top = st.container()
try:
    card = settled(engine.open_model(model), key="open")
except SlimscopeError as error:
    with top:
        heading(QUESTION, about=ABOUT)
    error_card(error, key="distil_source")
    st.stop()
offered = fitting(card) if card is not None else []
if not offered:
    with top:
        heading(QUESTION, about=ABOUT)
    if card is not None:
        st.markdown(f":gray[No student can be made of {esc(model)}: it reads no text.]")
    st.stop()

# --- whose recipe: the one on the workbench if it trains, else the first template ------------------------
draft = drafts.current()
at = training_index(draft.recipe)
if at is None:
    first = offered[0].recipe(card.anatomy.n_layers)
    draft, at = Draft(first.steps, first.calibration, version=draft.version), len(first.steps) - 1
draft = replace(draft, chosen=at)
st.caption(
    f"From {esc(state.model_name(model))}, chosen on the left. What it becomes, and how that is trained, is a recipe like any other."
)
recipe_templates(offered, card, chosen=chosen(card, draft.recipe), on_choose=drafts.use)
if refusal := st.session_state.pop(making.REFUSAL, None):
    error_card(refusal, key="refused")
under_way = st.container()

# --- the student and its training -----------------------------------------------------------------------
with st.container(border=True):
    drawn = st.container()
    left, right = st.columns([5, 7], gap="medium")
    with right:
        st.header("How it learns", anchor=False)
        recipe = training_form(draft, card)
    shown = recipe or draft.recipe
    student = student_of(card, shown)
    with drawn:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header("Who teaches whom", anchor=False, width="stretch")
            st.page_link(
                "../pages/compress.py",
                label="Edit as recipe",
                icon=":material/list_alt:",
                query_params={"recipe": shown.canonical()},
            )
        may = toggled(shown, card, (student.kept or (0,))[-1]) is not None or student.n_layers == 1
        student_map(
            card,
            student,
            key="student_map",
            version=draft.version,
            on_toggle=partial(toggle, shown) if may else None,
        )
    with left:
        st.header("What it costs", anchor=False)
        st.caption(esc(size_line(card, student)))
        st.caption(esc(speed_line(card, student)))
        cost = st.container(gap="xsmall")
        if student.parts is not None:
            parts_table(parts_frame(card, student.parts))
    n_tokens = data_preview(shown, model, card)
    with cost:
        cost_lines(card, shown, n_tokens=n_tokens)
    measured = measuring_form(card.family)
    if measured is not None:
        st.session_state["measured"] = measured
    with st.container(horizontal=True, vertical_alignment="center"):
        wished = controls(card, shown)
        st.space("stretch")
        st.button(
            "Train the student",
            icon=":material/school:",
            disabled=None in (recipe, measured, wished),
            on_click=make,
            args=([shown, *(wished or ())],),
            key="train",
        )
with top:
    script = recipe_script(shown, card.folder) or "# one step at a time: slimscope run recipe.json"
    heading(QUESTION, about=ABOUT, reproduce=Reproduction(script, recipe_command(shown, model)))

# --- what runs, and what it became ----------------------------------------------------------------------
group = st.query_params.get("group")
jobs = engine.queue().jobs(GROUP, group_id=group) if group else []
if jobs:
    with under_way, st.container(border=True):
        busy = any(job.state in ACTIVE for job in jobs)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header("Under way" if busy else "Done", anchor=False, width="stretch")
            st.page_link("../pages/jobs.py", label="All jobs", icon=":material/manufacturing:")
        group_card(jobs[::-1], prefix="made")
    with under_way:
        student_after(variants_of(jobs), model, make=make)
