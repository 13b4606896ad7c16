"""The start: open a model in one click, and see what was made lately."""

from __future__ import annotations

import streamlit as st

from app import engine, state
from app.components.empty_state import empty_state
from app.components.heading import About, heading
from app.text import esc
from app.views import recent_jobs, recent_variants
from core.models.demo import demos

ABOUT = About(
    "Slimscope opens a transformer, shows what it computes inside, makes smaller variants of it, and measures each "
    "variant after reloading it in a fresh process.\n\n"
    "The loop is: open, inspect, compress, prove that it reloads, evaluate, profile, compare. Every number keeps its "
    "unit, its conditions and its interval.\n\n"
    "Everything runs on this machine. The network is used only when you name a hub model."
)

heading("What do you want to look at?", about=ABOUT)
st.caption(
    "Pick a model here, or type a hub id, a folder, a GGUF file or a variant into the box on the left."
)

cards = st.grid(2, min_column_width=340)
for name, demo in demos().items():
    source = f"demo:{name}"
    with cards.container(border=True, height="stretch", key=f"demo_{name}"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header(esc(demo.title), anchor=False, width="stretch")
            st.badge(demo.licence, color="gray")
        st.markdown(esc(demo.description))
        if demo.caveat:
            st.caption(esc(demo.caveat))
        with st.container(horizontal=True, gap="small", height="stretch", vertical_alignment="bottom"):
            for page, label, icon, kind in (
                ("inspect", "Look inside", "troubleshoot", "secondary"),
                ("model", "See its bytes", "deployed_code", "tertiary"),
                ("compress", "Make it smaller", "compress", "tertiary"),
            ):
                if st.button(
                    label,
                    icon=f":material/{icon}:",
                    type=kind,
                    key=f"{name}_{page}",
                    on_click=state.choose_model,
                    args=(source,),
                ):
                    st.switch_page(f"../pages/{page}.py")

left, right = st.columns([6, 4], gap="small")
with left.container(border=True, height="stretch"):
    st.header("Recent variants", anchor=False)
    newest = engine.newest_models(engine.revision()).head(8)
    said = engine.verdicts_of(tuple(newest["base_id"].unique()), engine.revision())
    variants = recent_variants(newest, said)
    if variants.empty:
        empty_state(
            "No variants yet: a smaller copy is one click away.",
            page="compress",
            action="Make one",
            border=False,
        )
    else:
        st.dataframe(
            variants,
            hide_index=True,
            height="content",
            column_config={
                "variant": st.column_config.TextColumn("Variant", pinned=True),
                "name": st.column_config.TextColumn("Name", width=190),
                "size": "Size",
                "bits_per_weight": st.column_config.NumberColumn("Bits per weight", format="%.2f"),
                "proven": st.column_config.CheckboxColumn(
                    "Proven", help="Reloaded in a fresh process", width=70
                ),
                "made": "Made",
                "to_know": st.column_config.TextColumn(
                    "To know", help="Where it is slower, broken or larger than its base beyond the intervals"
                ),
            },
            alt="The newest variants with size and proof",
        )
        st.page_link("../pages/tradeoffs.py", label="Compare them", icon=":material/scatter_plot:")
with right.container(border=True, height="stretch"):
    st.header("Recent jobs", anchor=False)
    jobs = recent_jobs(engine.queue().jobs(limit=6))
    if jobs.empty:
        empty_state("The queue is empty.", icon="manufacturing", border=False)
    else:
        st.dataframe(
            jobs,
            hide_index=True,
            height="content",
            column_config={
                "kind": "Job",
                "state": "State",
                "progress": st.column_config.ProgressColumn("Progress", format="percent"),
                "when": "Queued",
            },
            alt="The newest jobs with state and progress",
        )
        st.page_link("../pages/jobs.py", label="All jobs", icon=":material/manufacturing:")
