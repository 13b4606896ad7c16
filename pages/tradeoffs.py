"""Trade-offs: which variant is worth keeping, on numbers measured on reloaded files only."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import engine, state, tradeoff_views
from app.components import among
from app.components import tradeoff_board as board
from app.components.empty_state import empty_state
from app.components.export_menu import export_menu
from app.components.heading import About, Reproduction, heading
from app.components.variant_panel import variant_evidence, variant_summary
from app.text import esc
from core.constraints import EXAMPLE, check
from core.tradeoff import OBJECTIVES, QUALITY_TOLERANCE, available, headlines, quality_column, usable

ABOUT = About(
    "Each point is one variant of the base, placed by numbers measured on its files after a reload in a fresh "
    "process. A variant is on the Pareto front when no other usable one is at least as good on both axes and better "
    "on one; the dashed line is the best that can be had for a budget.\n\n"
    "Measurements have intervals, so a dominated point is the fainter, the less often it reaches the front when "
    "every value is drawn anew from its 95 % interval. Hollow points rest on a flagged run, crosses have no reload "
    "proof and are never on the front.",
    r"i \succ j \iff \forall a:\ c_a(i) \le c_a(j)\ \wedge\ \exists a:\ c_a(i) < c_a(j)",
    "https://doi.org/10.1145/321906.321910",
)

REPRODUCE = Reproduction(tradeoff_views.FRONT_SCRIPT, "slimscope compare --json")

heading("Trade-offs", about=ABOUT, reproduce=REPRODUCE)

bases = engine.bases(engine.revision())
bases = bases[bases["variants"] > 0]
if bases.empty:
    empty_state(
        "No variant yet. Make a smaller copy of a model and it appears here with its numbers.",
        icon="scatter_plot",
        page="compress",
        action="Make one",
    )
    st.stop()

# --- what is compared: the address names it, else the model that is looked at ---------------------------
names = state.distinct(dict(zip(bases["id"], bases["name"], strict=True)))
fitting = bases.loc[bases["source"] == state.model(), "id"]
default = fitting.iloc[0] if len(fitting) else bases["id"].iloc[0]
together = among.among()
asked = st.query_params.get("base") or among.base_of(together)
base_id = asked if asked in names else default
frame = engine.tradeoff_frame(base_id, engine.revision())
said = engine.verdicts(base_id, engine.revision())
if together:
    frame = tradeoff_views.only(frame, together)
axes = [aim.column for aim in available(frame)]
quality = quality_column(frame)


def choose_base() -> None:
    """Another base: nothing picked among the old one's variants survives."""
    st.query_params["base"] = st.session_state["base_choice"]
    for name in ("variant", "brush", "among"):
        st.query_params.pop(name, None)


with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
    st.selectbox(
        "Base",
        list(names),
        index=list(names).index(base_id),
        format_func=lambda id_: names[id_],
        key="base_choice",
        on_change=choose_base,
        help="Only variants of one base are comparable",
    )
    x = board.axis("Across", "x", axes, default="bytes")
    y = board.axis("Upwards", "y", axes, default=quality if quality in axes else axes[1])
    limits = st.text_input("Limits", key="limits", bind="query-params", placeholder=EXAMPLE)
    tolerance = st.number_input(
        "Tolerance",
        0.0,
        None,
        QUALITY_TOLERANCE[quality],
        format="%g",
        step=0.01,
        key="tolerance",
        bind="query-params",
        width=130,
        help=f"{OBJECTIVES[quality].title} that the smallest and the fastest variant must keep",
    )
constraints = board.constraints_of(limits)
verdict = check(frame, constraints, eligible=usable(frame))
scene = tradeoff_views.scene(frame, x, y, verdict)
if constraints:
    board.limits_line(verdict)
if together:
    among.among_line(frame)
board.headline_row(headlines(frame, tolerance=tolerance), scene)


# --- chart, picked variant, table: a fragment, so that a click redraws these alone ------------------------
def explore() -> None:
    """The panel is sent before the chart, because it is what a click waits for."""
    variant = board.picked(frame)
    detail = engine.variant_detail(variant, engine.revision()) if variant else None
    left, right = st.columns([1.9, 1], gap="small")
    with right.container(border=True, height="stretch"):
        if detail is None:
            board.nothing_picked()
        else:
            mark = scene.mark(detail.variant.id)
            about = said.get(detail.variant.id, ())
            variant_summary(detail, frame, mark, said=about, clear=lambda: board.repick(None))
    with left.container(border=True, height="stretch"):
        st.header(f"{scene.y.title} against {scene.x.title.lower()}", anchor=False)
        chart = board.front_chart(scene, variant=variant)
    with st.container(border=True):
        variants(chart, variant)
    if detail is not None:
        with st.container(border=True):
            st.header(f"{esc(detail.variant.name)}: the evidence", anchor=False)
            base = engine.variant_detail(base_id, engine.revision()).variant
            has_files = detail.variant.artifact is not None
            folder = str(engine.catalog().variant_folder(detail.variant.id)) if has_files else None
            variant_evidence(detail, base, folder)


def variants(chart: Any, variant: str | None) -> None:
    """The table of what is brushed, and the export of it and of the chart."""
    brush = board.box()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header("Variants", anchor=False, width="stretch")
        only = st.toggle("Front only", value=False, key="only", bind="query-params")
        if brush:
            st.button("Clear brush", icon=":material/close:", on_click=board.clear_brush, key="clear_brush")
        chosen = tradeoff_views.brushed(frame, x, y, brush)
        if only:
            chosen &= frame["variant"].isin(scene.front["variant"])
        export_menu(
            lambda: tradeoff_views.export_table(frame, chosen, scene.front["variant"]),
            chart,
            name=f"tradeoffs-{base_id}",
            key="tradeoffs",
        )
    board.variant_table(frame, chosen, scene, variant=variant, said=said)


st.fragment(explore)()
