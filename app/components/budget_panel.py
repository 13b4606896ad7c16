"""A budget instead of a menu: a slider over bytes, what it is expected to cost, pins by click, and three plans."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from app import budget, engine, state
from app import format as fmt
from app.components.error_card import error_card
from app.components.heat_canvas import Cell
from app.components.job_card import live_jobs
from app.components.token_grid import token_grid
from app.text import esc
from core.budget.assignment import read_assignment
from core.budget.planning import PROBE
from core.budget.plans import Plan, Sensitivity
from core.errors import BadInput, SlimscopeError
from core.jobs.plan import submit_probe
from core.jobs.states import ACTIVE
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import get
from core.types import ModelRef, Prompt

MEASURES = {
    "fisher": "Estimate: one backward pass",
    "both": "Measure: every part in every format",
}
GRID_HEIGHT = 480


def budget_panel(model: str, opening: engine.Call) -> Recipe | None:
    """Draw the panel for an opening model; the recipe of the chosen plan, or None while there is none.

    Nothing of the model runs but where sensitivities were never measured, which is a job.
    """
    if not opening.ticket.succeeded:
        st.caption("The budget needs the model's shapes; it is still being opened.")
        return None
    card: ModelCard = opening.ticket.result()
    ref = ModelRef.parse(model)
    id_ = (
        ref.source.removeprefix("variant:")
        if ref.kind == "variant"
        else engine.base_of(model, card.fingerprint)
    )
    run = budget.newest(id_, engine.revision())
    _measure(model, again=run is not None)
    if run is None:
        return None
    table = budget.sensitivity(run.id)
    try:
        return spend(run.id, table)
    except BadInput as error:
        error_card(error, key="budget_refused")
        return None


def _measure(model: str, *, again: bool) -> None:
    """Ask for the sensitivities: needed once per model, and then kept."""
    jobs = [
        job
        for job in engine.queue().jobs()
        if job.state in ACTIVE and job.kind == "probe" and job.spec.get("method") == PROBE
        and job.spec.get("model") == ModelRef.parse(model).located
    ]  # fmt: skip
    if jobs:
        live_jobs(jobs, prefix="sensitivity")
        return
    if not again:
        st.markdown(
            "What each part of each layer costs in each format was not measured yet. It is done once and kept."
        )
    with st.expander("Measure again", icon=":material/refresh:") if again else st.container():
        measure = state.choice(
            st.segmented_control, "How", MEASURES, key="budget_measure", default="fisher", required=True
        )
        st.button(
            "Measure sensitivity",
            icon=":material/straighten:",
            key="budget_ask",
            on_click=_ask,
            args=(model, measure),
        )


def _ask(model: str, measure: str) -> None:
    settings = get("probe", PROBE).parse({"measure": measure}).model_dump(mode="json")
    try:
        submit_probe(engine.queue(), model=model, method=PROBE, prompt=Prompt(""), settings=settings)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state["refusal"] = error


def spend(run_id: str, table: Sensitivity) -> Recipe | None:
    """Slider, expectation, grid and plans. Raises ``BadInput`` for pins or a tolerance that cannot be."""
    left, right = st.columns([5, 4], gap="medium")
    with left:
        typed = st.text_input(
            "Pins", key="budget_pins", bind="query-params", placeholder="3.down:int8, embedding:bfloat16",
            help="Choices made beforehand, as layer.part:format; a click on a cell sets or takes away one",
        )  # fmt: skip
    pins = read_assignment(typed or "", "pin")
    key = tuple(sorted(pins.items()))
    limits = budget.budget_range(run_id, key)
    low, high = limits.smallest / 1e6, limits.whole / 1e6
    step = max(0.01, round((high - low) / 500, 2))
    with left:
        wanted = st.slider(
            "Budget, MB", low, max(high, low + step), min(high, 1.25 * low), step, key="budget_mb",
            help=f"Of the weight file; the smallest possible is {low:.2f} MB, as it is the model takes {high:.2f} MB",
        )  # fmt: skip
        size = max(limits.smallest, int(wanted * 1e6))
        best = table.allocate(size, pins)
        grid = st.grid(3, min_column_width=110)
        grid.metric("Expected size", fmt.size(best.bytes), border=True)
        grid.metric("Expected loss", fmt.number(best.loss, table.unit), border=True)
        grid.metric("Of the model's bytes", f"{best.bytes / limits.whole:.0%}", border=True)
        st.altair_chart(budget.curve(table, pins, best), key="budget_curve", alt="Expected loss over size")
    with right:
        _grid(table, best.choice_of, pins)
    tolerance = left.text_input(
        "Tolerance", key="budget_tolerance", bind="query-params", placeholder="0.1 or 0.05bpb",
        help=f"Largest loss: in {table.unit}, or as bits per byte more; empty: none",
    )  # fmt: skip
    return choose_plan(budget.planned(run_id, size, (tolerance or "").strip() or None, key), table)


def _grid(table: Sensitivity, chosen: Mapping[str, str], pins: Mapping[str, str]) -> None:
    drawn = budget.cut_grid(table, chosen, pins)

    def pick(cell: Cell) -> None:
        st.session_state["budget_pins"] = budget.toggled(pins, drawn.rows[cell.row], drawn.cols[cell.col])

    st.caption(f"{budget.CUT} chosen in this budget, {budget.PINNED} pinned; a click pins a cell")
    with st.container(height=GRID_HEIGHT, key="budget_grid"):
        token_grid(
            drawn.words, drawn.values_RC, key="budget_cells", label="Loss of each part in each format", corner="part",
            rows=drawn.rows, cols=drawn.cols, hover=drawn.hover, unit=budget.cell_loss(table), selected=None, on_pick=pick,
            log=True,
        )  # fmt: skip


def choose_plan(found: tuple[Plan, ...], table: Sensitivity) -> Recipe | None:
    """The plans as cards; the recipe of the one that is chosen."""
    runnable = [plan.kind for plan in found if plan.recipe is not None]
    picked = st.session_state.get("budget_plan")
    if picked not in runnable:
        picked = runnable[0] if runnable else None
    cards = st.grid(3, min_column_width=220)
    for plan in found:
        with cards.container(
            border=True, height="stretch", key=f"plan_{plan.kind.replace(' ', '_')}", gap="xsmall"
        ):
            st.header(plan.kind.capitalize(), anchor=False)
            st.markdown(_expected(plan))
            st.caption(esc(plan.words))
            if plan.recipe is not None:
                st.button(
                    "Chosen" if plan.kind == picked else "Choose", key=f"choose_{plan.kind.replace(' ', '_')}",
                    icon=":material/check:" if plan.kind == picked else None, disabled=plan.kind == picked,
                    on_click=st.session_state.__setitem__, args=("budget_plan", plan.kind), width="stretch",
                )  # fmt: skip
    st.caption(
        f"Losses are {budget.cell_loss(table)}, summed over parts; the made variant is measured beside them."
    )
    return next((plan.recipe for plan in found if plan.kind == picked), None)


def _expected(plan: Plan) -> str:
    size = "" if plan.bytes is None else fmt.size(plan.bytes)
    if plan.loss is None:
        return f"{size}, loss not predicted"
    badge = {None: "", True: " :green-badge[within tolerance]", False: " :orange-badge[beyond tolerance]"}[
        plan.within
    ]
    return f"{size}, expected loss {fmt.number(plan.loss, plan.unit)}{badge}"
