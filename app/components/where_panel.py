"""Where the time of a step goes: by component, as nested spans, by module and operator; one model, or two joined by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from app import engine, measurements, state, where_charts, where_views
from app import format as fmt
from app.components.card_head import card_head
from app.components.error_card import error_card
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.where_plan import submit_where
from core.profile.runtimes._base import PLAIN
from core.profile.where.trace import chrome_trace
from core.types import Result, Run, Variant

NONE = "none"
REFUSED = "where_refused"


def where_panel(known: Sequence[Variant], runs: Mapping[str, Sequence[Run]]) -> None:
    """Look at a model, or pick a look that was kept; a second one stands beside it."""
    _look_at(known)
    if refusal := st.session_state.pop(REFUSED, None):
        error_card(refusal, key="where_refusal")
    titles = where_views.looks(known, runs)
    if not titles:
        st.caption(
            "No look yet. A look runs the model with clocks around its modules, apart from every timing."
        )
        return
    left, right = st.columns(2, gap="small")
    with left:
        first = _choose("Look", "look", list(titles), titles)
    others = {NONE: "nothing"} | {id_: title for id_, title in titles.items() if id_ != first}
    with right:
        second = _choose("Beside", "beside", list(others), others)
    names = {
        run.id: next(v.name for v in known if v.id == run.variant_id)
        for found in runs.values()
        for run in found
        if run.id in titles
    }
    chosen = [id_ for id_ in (first, second) if id_ != NONE]
    found = {id_: engine.result_of(id_) for id_ in chosen}
    phases = [
        p
        for p in where_views.phases_of(found[first])
        if all(p in where_views.phases_of(r) for r in found.values())
    ]
    if not phases:
        st.caption("The two looks have no phase in common.")
        return
    phase = state.choice(
        st.segmented_control, "Phase of a look", {name: fmt.label(name) for name in phases}, key="look_phase",
        default=phases[0], required=True, label_visibility="collapsed",
    )  # fmt: skip
    _drawn({titles[id_]: found[id_] for id_ in chosen}, [names[id_] for id_ in chosen], phase)


def _look_at(known: Sequence[Variant]) -> None:
    names = {variant.id: variant.name for variant in known}
    offered = [offer for offer in measurements.runtimes() if offer.available]
    titles = {offer.id: offer.title for offer in offered}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        variant = st.selectbox("Variant", list(names), format_func=lambda id_: names[id_], key="look_variant")
        runtime = st.selectbox(
            "Runtime", list(titles), format_func=lambda id_: titles[id_], key="look_runtime"
        )
        st.button(
            "Look",
            icon=":material/search:",
            on_click=_submit,
            args=(variant, runtime or PLAIN),
            key="look_now",
            help="A job of about half a minute: loads the model in a fresh process and notes where each step's time goes",
        )


def _submit(variant: str, runtime: str) -> None:
    try:
        submit_where(engine.queue(), variant, runtime=runtime)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state[REFUSED] = error


def _choose(title: str, name: str, ids: list[str], titles: Mapping[str, str]) -> str:
    """A select box whose address parameter is the run's id."""
    asked = st.query_params.get(name)
    key = f"{name}_box"

    def follow() -> None:
        st.query_params[name] = st.session_state[key]

    index = ids.index(asked) if asked in ids else 0
    found: str = st.selectbox(
        title, ids, index=index, format_func=lambda id_: titles[id_], key=key, on_change=follow
    )
    return found


# --- what was seen --------------------------------------------------------------------------------------


def _drawn(looks: Mapping[str, Result], names: Sequence[str], phase: str) -> None:
    first = next(iter(looks.values()))
    parts = where_views.components(looks, phase)
    chart = where_charts.component_bars(parts)
    with st.container(border=True):
        card_head(f"{fmt.label(phase)} by component", parts, chart, key=f"components-{phase}")
        st.altair_chart(chart, key="components", alt=f"Milliseconds of a {phase} step by component")
        for flag in dict.fromkeys(flag for look in looks.values() for flag in look.flags):
            st.markdown(f":orange-badge[{esc(flag)}] other programs were busy; look again when it is quiet")
    with st.container(border=True):
        _spans(first, names[0], phase)
    with st.container(border=True):
        if len(looks) == 2:
            one, two = looks.values()
            _joined(one, two, names, phase)
        else:
            _tables(first, phase)
    for note in dict.fromkeys(note for look in looks.values() for note in look.notes):
        st.caption(esc(note))


def _spans(look: Result, name: str, phase: str) -> None:
    """One step as a flame chart, and the file that Perfetto opens."""
    frame = where_views.spans(look, phase)
    chart = where_charts.flame(frame)
    card_head("One step, from left to right", frame, chart, key=f"spans-{phase}")
    st.altair_chart(chart, key="spans", alt=f"The spans of one {phase} step, nested")
    with st.container(horizontal=True, vertical_alignment="center"):
        whole = int((look.frames["events"]["phase"] == phase).sum())
        left = (
            f"The {len(frame):,} longest of {whole:,} spans" if whole > len(frame) else f"All {whole:,} spans"
        )
        st.caption(f"{left}, seen in a pass of its own with a profiler that slows them.", width="stretch")
        st.download_button(
            "Chrome trace",
            lambda: chrome_trace({name: look.frames["events"]}),
            "trace.json",
            "application/json",
            icon=":material/timeline:",
            type="tertiary",
            key="trace",
            on_click="ignore",
            help="Opens in ui.perfetto.dev or chrome://tracing",
        )


def _tables(look: Result, phase: str) -> None:
    """Modules and operators, the largest first."""
    by = state.choice(
        st.segmented_control, "Ranked by", {"module": "Module", "operator": "Operator"}, key="look_by",
        default="module", required=True, label_visibility="collapsed",
    )  # fmt: skip
    modules = by != "operator" and len(look.frames["modules"]) > 0
    frame = where_views.ranked_modules(look, phase) if modules else where_views.ranked_operators(look, phase)
    card_head(
        "Modules, by their own time" if modules else "Operators, traced", frame, None, key=f"ranked-{phase}"
    )
    _table(frame, "ranked", "Where the time goes, the largest first")


def _joined(first: Result, second: Result, names: Sequence[str], phase: str) -> None:
    """The second look's modules beside the first's, the largest change first."""
    frame = where_views.joined(first, second, phase)
    card_head("Module by module, the largest change first", frame, None, key=f"joined-{phase}")
    st.caption(
        esc(f"A is {names[0]}, B is {names[1]}; joined by path, looked at one after the other: no verdict.")
    )
    _table(frame, "joined", "Two models module by module")


def _table(frame: pd.DataFrame, key: str, alt: str) -> None:
    column = st.column_config
    config = {
        name: column.NumberColumn(fmt.label(name), format="percent" if name == "share" else "%.3g")
        for name in frame.columns
        if frame[name].dtype.kind == "f"
    }
    st.dataframe(
        frame.head(where_views.ROWS),
        hide_index=True,
        height=388 if len(frame) > 10 else "content",
        key=key,
        alt=alt,
        column_config={name: fmt.label(name) for name in frame.columns} | config,
    )
