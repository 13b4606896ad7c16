"""Compress: make a smaller variant with one click, and watch it being proved, evaluated and profiled."""

from __future__ import annotations

import streamlit as st

from app import engine, state
from app import format as fmt
from app.components.error_card import error_card
from app.components.heading import About, Reproduction, heading
from app.components.job_card import live_jobs
from app.components.recipe_editor import PRESETS, recipe_editor
from app.components.waiting import settled
from app.compress_views import predicted_bytes
from app.reproduce import recipe_command, recipe_script
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.plan import submit_variant
from core.jobs.states import ACTIVE
from core.models.sizes import ModelCard
from core.recipe import Recipe

ABOUT = About(
    "A recipe is a list of steps that make a variant of the model, usually a smaller one. Making one queues three jobs: compress, "
    "which ends with a reload of the saved files in a fresh process; evaluate, which takes the KL to the base on real "
    "text; and profile, which measures speed and memory on this machine.\n\n"
    "Predicted bytes are counted from the model's shapes before anything runs, and must equal the real ones within "
    "2 %. A variant whose reload fails is kept, marked, and never offered as usable.",
    r"\text{bytes} = \tfrac{n\,b}{8} + \text{scales} + \text{zero points} + \text{headers}",
    "https://arxiv.org/abs/2210.17323",
)

model = state.model()


def make(recipe: Recipe) -> None:
    """Queue the recipe's jobs; the address names their group."""
    evaluate = {"documents": {"source": st.session_state.get("documents") or "pydoc"}}
    profile = {"settings": {"tier": st.session_state.get("tier") or "quick"}}
    try:
        jobs = submit_variant(engine.queue(), model=model, recipe=recipe, evaluate=evaluate, profile=profile)
        engine.start_work()
        st.query_params["group"] = jobs[0].group_id
    except SlimscopeError as error:
        st.session_state["refusal"] = error


def size_line(card: ModelCard, recipe: Recipe) -> str:
    """The predicted size and its share of the same weights in float32."""
    nbytes = predicted_bytes(card, recipe)
    if nbytes is None:
        return "Size not predicted for this recipe"
    return f"About {fmt.size(nbytes)}, {nbytes / (card.parameters * 4):.0%} of float32"


top = st.container()
st.caption(
    f"Of {esc(model)}, chosen on the left. Each button makes, proves, evaluates and profiles a variant."
)

# --- presets --------------------------------------------------------------------------------------------
try:
    opening = engine.open_model(model)
except SlimscopeError as error:
    with top:
        heading("Compress", about=ABOUT)
    error_card(error, key="compress_source")
    st.stop()
cards = st.grid(4, min_column_width=200)
slots = {}
for preset in PRESETS:
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
                args=(preset.recipe,),
                key=f"make_{preset.id}",
                width="stretch",
            )
offers = opening.ticket.result().offers if opening.ticket.succeeded else None
opening_slot = st.container()  # filled last: nothing else on the page waits for the model to open
if refusal := st.session_state.pop("refusal", None):
    error_card(refusal, key="refused")

# --- the jobs just queued, or those of this model that still run ----------------------------------------
group = st.query_params.get("group")
jobs = engine.queue().jobs(group_id=group) if group else []
jobs = jobs or [
    job
    for job in engine.queue().jobs()
    if job.state in ACTIVE and job.spec.get("model") == model and "recipe" in job.spec
]
if jobs:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header("Under way" if any(job.state in ACTIVE for job in jobs) else "Done", anchor=False)
            st.space("stretch")
            st.page_link("../pages/jobs.py", label="All jobs", icon=":material/manufacturing:")
            st.page_link("../pages/tradeoffs.py", label="Trade-offs", icon=":material/scatter_plot:")
        live_jobs(jobs[::-1], prefix="made")

# --- any recipe -----------------------------------------------------------------------------------------
with st.container(border=True):
    recipe = recipe_editor(offers)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control(
            "Profile",
            ["rapid", "quick", "full"],
            default="quick",
            required=True,
            key="tier",
            bind="query-params",
            help="How long speed is measured: half a minute, one or two minutes, or until the interval is narrow",
        )
        st.text_input(
            "Evaluation text",
            "pydoc",
            key="documents",
            bind="query-params",
            help="pydoc (the reference prose every Python ships), a text file's path, or hub:ID",
        )
        st.space("stretch")
        slots["own"] = st.empty()
        st.button(
            "Make variant",
            icon=":material/add:",
            disabled=recipe is None,
            on_click=make,
            args=(recipe,),
            key="make_own",
        )

# --- predicted sizes, as soon as the model is open ------------------------------------------------------
with opening_slot:
    card = settled(opening, key="open")
with top:
    shown = recipe or PRESETS[0].recipe
    script = recipe_script(shown, card.folder if card else model)
    heading("Compress", about=ABOUT, reproduce=Reproduction(script, recipe_command(shown, model)))
if card is not None:
    for preset in PRESETS:
        slots[preset.id].caption(size_line(card, preset.recipe))
    if recipe is not None:
        slots["own"].caption(size_line(card, recipe), width="content")
