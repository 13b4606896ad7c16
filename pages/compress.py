"""Compress: a workshop for smaller variants; steps in order, their cost before the click, their proof after it."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app import drafts, engine, making, state
from app.components.error_card import error_card
from app.components.group_card import GROUP, group_card, variants_of
from app.components.heading import About, Reproduction, heading
from app.components.measuring_form import measuring_form
from app.components.recipe_editor import recipe_editor, way
from app.components.sweep_panel import sweep_panel
from app.components.waiting import settled
from app.compress_views import presets, size_words, work_words
from app.reproduce import recipe_command, recipe_script
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.states import ACTIVE

ABOUT = About(
    "A recipe is a list of steps that make a variant of the model, usually a smaller one. Making one queues three jobs: compress, "
    "which ends with a reload of the saved files in a fresh process; evaluate, which takes the KL to the base on real "
    "text; and profile, which measures speed and memory on this machine.\n\n"
    "Predicted bytes are counted from the model's shapes before anything runs, and must equal the real ones within "
    "2 %. A variant whose reload fails is kept, marked, and never offered as usable; one that is slower, broken or "
    "larger than its base is said so beside it, where its intervals leave no doubt.",
    r"\text{bytes} = \tfrac{n\,b}{8} + \text{scales} + \text{zero points} + \text{headers}",
    "https://arxiv.org/abs/2210.17323",
)

model = state.model()
make = partial(making.make, model)


top = st.container()
st.caption(
    f"Of {esc(model)}, chosen on the left. Each button makes, proves, evaluates and profiles a variant."
)
try:
    opening = engine.open_model(model)
except SlimscopeError as error:
    with top:
        heading("Compress", about=ABOUT)
    error_card(error, key="compress_source")
    st.stop()
card = opening.ticket.result() if opening.ticket.succeeded else None

# --- presets --------------------------------------------------------------------------------------------
cards = st.grid(5, min_column_width=150)
slots, offered = {}, presets(card.offers if card else None)
for preset in offered:
    with cards.container(border=True, height="stretch", key=f"preset_{preset.id}", gap="xsmall"):
        st.header(preset.title, anchor=False)
        st.markdown(f":gray[{preset.sentence}]")
        with st.container(height="stretch", vertical_alignment="bottom", gap="xsmall"):
            slots[preset.id] = st.empty()
            slots[preset.id].caption("Size not predicted yet")
            st.button(
                "Make variant",
                icon=":material/add:",
                on_click=make,
                args=([preset.recipe],),
                key=f"make_{preset.id}",
                width="stretch",
            )
opening_slot = st.container()  # filled last: nothing else on the page waits for the model to open
if refusal := st.session_state.pop(making.REFUSAL, None):
    error_card(refusal, key="refused")

# --- the jobs just queued, or those of this model that still run ----------------------------------------
group = st.query_params.get("group")
jobs = engine.queue().jobs(GROUP, group_id=group) if group else []
jobs = jobs or [
    job
    for job in engine.queue().jobs()
    if job.state in ACTIVE and job.spec.get("model") == model and "recipe" in job.spec
]
if jobs:
    with st.container(border=True):
        made = variants_of(jobs)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header("Under way" if any(job.state in ACTIVE for job in jobs) else "Done", anchor=False)
            st.space("stretch")
            st.page_link("../pages/jobs.py", label="All jobs", icon=":material/manufacturing:")
            st.page_link(
                "../pages/tradeoffs.py",
                label=f"Ladder of {len(made)} variants" if len(made) > 1 else "Trade-offs",
                icon=":material/scatter_plot:",
                query_params={"among": ",".join(made)} if len(made) > 1 else {},
            )
        group_card(jobs[::-1], prefix="made")

# --- any recipe -----------------------------------------------------------------------------------------
with st.container(border=True):
    recipe = recipe_editor(model, opening, card, make=make)
    measured = measuring_form(card.family if card else None)
    if measured is not None:
        st.session_state["measured"] = measured
    if way() != "budget":  # whose plans have buttons of their own
        sweeping = st.expander("Sweep a setting", icon=":material/stairs:", key="sweep", on_change="rerun")
        if sweeping.open and recipe is not None and card is not None:
            with sweeping:
                sweep_panel(recipe, drafts.current().chosen, card, submit=make)
        told, go = st.columns([4, 1], vertical_alignment="center")
        slots["own"] = told.empty()
        go.button(
            "Make variant",
            icon=":material/add:",
            disabled=recipe is None or measured is None,
            on_click=make,
            args=([recipe],),
            key="make_own",
            width="stretch",
        )

# --- predictions, as soon as the model is open ----------------------------------------------------------
with opening_slot:
    known, card = card, settled(opening, key="open")
if known is None and card is not None:
    st.rerun()  # what is above was drawn without it, and nothing else would draw it again
with top:
    shown = recipe or offered[0].recipe
    script = recipe_script(shown, card.folder if card else model)
    heading("Compress", about=ABOUT, reproduce=Reproduction(script, recipe_command(shown, model)))
if card is not None:
    for preset in offered:
        slots[preset.id].caption(size_words(card, preset.recipe))
    if recipe is not None and "own" in slots:
        slots["own"].markdown(esc(f"{size_words(card, recipe)} · {work_words(card, recipe)}"))
