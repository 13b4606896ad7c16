"""Profile: how fast every variant is in every runtime, at what loss, and why; measured on this machine."""

from __future__ import annotations

import streamlit as st

from app import engine, measurements, profile_views, state
from app.components import profile_results as results
from app.components.empty_state import empty_state
from app.components.heading import About, Reproduction, heading
from app.components.profile_grid import profile_grid
from app.components.race_panel import race_panel
from app.components.roofline_panel import roofline_panel
from app.components.where_panel import where_panel
from app.components.work_queue import work_queue
from app.reproduce import profile_command, profile_script
from core.types import content_hash

ABOUT = About(
    "Each cell is one variant in one runtime under one workload, measured in a fresh process after its answers were held "
    "against the same files in float32; the KL beside a speed is what that runtime's answers have lost. Every sample is "
    "shown, with the median and its order-statistics interval.\n\n"
    "Medians of different sessions are not a verdict: the same program settles elsewhere the next time. A against B loads "
    "both and measures them in turn; only that says faster, equivalent or inconclusive.\n\n"
    "A step must read its weights and cache and do its multiplications; the roofline holds it against what this machine "
    "was measured to do.",
    r"t \ge \max\!\left(\tfrac{\text{bytes}}{\text{bandwidth}},\ \tfrac{\text{FLOP}}{\text{matrix rate}}\right)",
    "https://doi.org/10.1145/1498765.1498785",
)
PARTS = {
    "results": "Results",
    "race": "A against B",
    "where": "Where the time goes",
    "roofline": "Roofline",
    "measure": "Measure",
}
KINDS = ("profile", "race", "where", "machine")

head = st.container()
bases = engine.bases(engine.revision())
if bases.empty:
    with head:
        heading("Profile", about=ABOUT)
    empty_state(
        "No model yet. Open one and make a variant, and both can be measured here.",
        icon="speed",
        page="compress",
        action="Make a variant",
    )
    st.stop()

# --- what is looked at: the address names it, else the model of the sidebar ------------------------------
names = state.distinct(dict(zip(bases["id"], bases["name"], strict=True)))
fitting = bases.loc[bases["source"] == state.model(), "id"]
asked = st.query_params.get("base")
base_id = asked if asked in names else fitting.iloc[0] if len(fitting) else bases["id"].iloc[0]
known = measurements.variants(base_id, engine.revision())
runs = measurements.speed_runs(base_id, engine.revision())
by_id = {run.id: run for found in runs.values() for run in found}
races = sorted((r for r in by_id.values() if r.kind == "race"), key=lambda r: r.ended_at, reverse=True)
phases = profile_views.PHASES_OF[known[0].family]
domain = [variant.name for variant in known]


def choose_base() -> None:
    """Another base: nothing picked among the old one's runs survives."""
    st.query_params["base"] = st.session_state["profile_base"]
    for name in ("run", "a", "b", "race", "look", "beside", "phase_at", "variants"):
        st.query_params.pop(name, None)
    st.session_state.pop("grid_variants", None)


with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
    st.selectbox(
        "Base", list(names), index=list(names).index(base_id), format_func=lambda id_: names[id_], key="profile_base",
        on_change=choose_base,
    )  # fmt: skip
    phase = state.choice(
        st.segmented_control,
        "Phase",
        {name: profile_views.TITLES[name] for name in phases},
        key="phase",
        default=phases[0],
        required=True,
    )
    every = profile_views.rows_of(known, runs, phase)
    loads = profile_views.workloads(every)
    if len(loads) > 1:
        titles = {content_hash(load)[:8]: load for load in loads}
        load = titles[state.choice(st.selectbox, "Workload", titles, key="load", default=next(iter(titles)))]
        every = every[every["workload"] == load]
    rows = every.reset_index(drop=True)
    tolerance = st.number_input(
        "Loss kept", 0.0, None, profile_views.TOLERANCE, format="%g", step=0.01, key="loss", bind="query-params", width=130,
        help="KL to the base, nats per token, that the fastest may have lost",
    )  # fmt: skip
newest = rows[rows["newest"]].reset_index(drop=True)
with head:
    shown = newest.iloc[0] if len(newest) else None
    chosen = by_id[shown["run"]] if shown is not None else None
    source = known[0].source if chosen is None else engine.variant_of(chosen.variant_id).source
    own = source.startswith("variant:") and chosen is not None
    folder = str(engine.catalog().variant_folder(chosen.variant_id)) if own else source
    again = Reproduction(profile_script(folder, chosen), profile_command(source, chosen))
    heading("Profile", about=ABOUT, reproduce=again)

if len(newest):
    results.headline_cards(rows, tolerance)
    results.headline_sentence(rows, by_id, tolerance)
part = state.choice(
    st.segmented_control,
    "Part",
    PARTS,
    key="part",
    default="results" if len(newest) else "measure",
    required=True,
    label_visibility="collapsed",
)
work_queue(KINDS, {f"variant:{variant.id}" for variant in known} | {known[0].source}, key="profile")


def explore() -> None:
    """The distributions, the table and one run; a fragment, so that a click redraws these alone."""
    with st.container(border=True):
        picked = results.distributions(newest, phase, domain)
    if picked is not None:
        with st.container(border=True):
            results.run_drawer(by_id[picked], rows[rows["run"] == picked].iloc[0], phase)
    with st.container(border=True):
        older = len(rows) - len(newest)
        every = older > 0 and st.toggle(f"With {older} earlier runs", key="earlier", bind="query-params")
        results.ranked_table(rows if every else newest, by_id, phase, picked)


if part == "measure" or (part == "results" and newest.empty):
    with st.container(border=True):
        st.header("What to measure", anchor=False)
        profile_grid(known)
elif part == "results":
    st.fragment(explore)()
elif part == "race":
    race_panel(newest, by_id, races, phase)
elif part == "where":
    where_panel(known, measurements.looks(base_id, engine.revision()))
else:
    roofline_panel(base_id, known, runs, list(newest["run"]), domain)
