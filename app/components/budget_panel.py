"""A budget instead of a menu: a slider over bytes, what it is expected to cost, pins by click, and three plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

from app import budget, drafts, engine, state
from app import format as fmt
from app.components.asking import expected, words
from app.components.error_card import error_card
from app.components.heat_canvas import Cell
from app.components.job_card import live_jobs
from app.components.token_grid import token_grid
from app.compress_views import work_words
from app.engine import Question
from app.text import esc
from core.budget.assignment import read_assignment
from core.budget.plans import Plan, Sensitivity
from core.errors import BadInput, SlimscopeError
from core.jobs.plan import submit_probe
from core.jobs.states import ACTIVE
from core.models.sizes import ModelCard
from core.planning import PROBE
from core.recipe import Recipe
from core.registry import get
from core.types import ModelRef, Prompt

MEASURES = {
    "fisher": "Estimate: one backward pass",
    "both": "Measure: every part in every format",
}
WRITE_AS = "write_as"
"""The key, in session and address, of how a recipe is written."""
Make = Callable[[Sequence[Recipe]], None]
"""Queues the jobs of recipes; from a callback."""


def budget_panel(model: str, opening: engine.Call, *, make: Make) -> Recipe | None:
    """Draw the panel for an opening model; the recipe of the first plan that can be made, or None while there is none.

    Nothing of the model runs but where sensitivities were never measured, which is a job. ``make`` queues a plan's recipe.
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
    recipe = None
    if run is not None:
        try:
            recipe = spend(
                run.id, budget.sensitivity(run.id), make=make, told=lambda recipe: work_words(card, recipe)
            )
        except BadInput as error:
            error_card(error, key="budget_refused")
    _measure(model, card, again=run is not None)
    return recipe


def _measure(model: str, card: ModelCard, *, again: bool) -> None:
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
            "What each part of each layer loses in each format was not measured for this model yet. It is done once and "
            "kept; then a budget is spent at once."
        )
    with st.expander("Measure the losses again", icon=":material/refresh:") if again else st.container():
        measure = state.choice(
            st.segmented_control, "How", MEASURES, key="budget_measure", default="fisher", required=True
        )
        probe = get("probe", PROBE)
        settings = probe.parse({"measure": measure})
        cost = expected(Question.of(model, probe, Prompt(""), settings), probe, card)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.button(
                "Measure sensitivity",
                icon=":material/straighten:",
                key="budget_ask",
                on_click=_ask,
                args=(model, settings.model_dump(mode="json")),
            )
            if cost is not None:
                st.caption(esc(f"{words(cost)}, as a job"), width="content")


def _ask(model: str, settings: dict[str, Any]) -> None:
    try:
        submit_probe(engine.queue(), model=model, method=PROBE, prompt=Prompt(""), settings=settings)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state["refusal"] = error


def spend(run_id: str, table: Sensitivity, *, make: Make, told: Callable[[Recipe], str]) -> Recipe | None:
    """Slider, expectation, grid and plans. Raises ``BadInput`` for pins or a tolerance that cannot be.

    ``told`` says what making a recipe takes.
    """
    left, right = st.columns([9, 13], gap="medium")
    with left:
        first, limits_slot = st.container(), st.grid(2, min_column_width=150)
    typed = limits_slot.text_input(
        "Pins", key="budget_pins", bind="query-params", placeholder="3.down:int8, embedding:bfloat16",
        help="Choices made beforehand, as layer.part:format; a click on a cell sets or takes away one",
    )  # fmt: skip
    tolerance = limits_slot.text_input(
        "Tolerance", key="budget_tolerance", bind="query-params", placeholder="0.1 or 0.05bpb",
        help=f"Largest loss: in {table.unit}, or as bits per byte more; empty: none",
    )  # fmt: skip
    pins = read_assignment(typed or "", "pin")
    key = tuple(sorted(pins.items()))
    with first:
        wanted = _slider(budget.budget_range(run_id, ()), table)
        limits = budget.budget_range(run_id, key)
        if wanted < limits.smallest:
            st.markdown(
                f":orange[:material/warning: Infeasible with these pins: the minimum is {fmt.size(limits.smallest)}, "
                "shown instead.]"
            )
        size = max(limits.smallest, wanted)
        best = table.allocate(size, pins)
        grid = st.grid(2, min_column_width=140)
        grid.metric(
            "Expected size", fmt.size(best.bytes), f"{best.bytes / limits.whole:.0%} of now", border=True,
            delta_color="off", delta_arrow="off", help=f"As it is, the model takes {fmt.size(limits.whole)}",
        )  # fmt: skip
        grid.metric(
            "Expected loss", fmt.number(best.loss, table.unit), budget.how(table), border=True,
            delta_color="off", delta_arrow="off", help=f"{budget.meaning(table)}, added up over the parts",
        )  # fmt: skip
        st.altair_chart(
            budget.curve(table, pins, best, limits), key="budget_curve", alt="Expected loss over size"
        )
        st.caption("The line: no file that plain transformers reads loses less at that size.")
    with right:
        _grid(table, best.choice_of, pins)
    found = budget.planned(run_id, size, (tolerance or "").strip() or None, key)
    return plan_cards(found, table, make=make, told=told)


def _slider(limits: budget.Range, table: Sensitivity) -> int:
    """The bytes that are asked for. Its ends know no pins: a click on a cell does not move the budget."""
    low, high = limits.smallest / 1e6, budget.useful_bytes(limits, table) / 1e6
    usual = budget.USUAL_BITS * table.parameters / 8e6
    step = max(0.01, round((high - low) / 500, 2))
    wanted = st.slider(
        "Budget, MB", low, max(high, low + step), min(high, max(low, usual)), step, key="budget_mb", bind="query-params",
        help=f"Of the weight file; the smallest possible is {low:.2f} MB, as it is the model takes {limits.whole / 1e6:.2f} MB",
    )  # fmt: skip
    return max(limits.smallest, int(wanted * 1e6))


def _grid(table: Sensitivity, chosen: Mapping[str, str], pins: Mapping[str, str]) -> None:
    drawn = budget.cut_grid(table, chosen, pins)

    def pick(cell: Cell) -> None:
        st.session_state["budget_pins"] = budget.toggled(pins, drawn.rows[cell.row], drawn.cols[cell.col])

    st.caption(f"{budget.CUT} chosen in this budget, {budget.PINNED} pinned; a click pins a cell")
    with st.container(key="budget_grid"):
        token_grid(
            drawn.words, drawn.values_RC, key="budget_cells", label="Loss of each part in each format", corner="layer.part",
            rows=drawn.rows, cols=drawn.cols, hover=drawn.hover, unit=f"{table.unit}, {budget.how(table)}", selected=None, on_pick=pick,
            log=True, centred=True,
        )  # fmt: skip


def plan_cards(
    found: tuple[Plan, ...], table: Sensitivity, *, make: Make, told: Callable[[Recipe], str]
) -> Recipe | None:
    """The plans as cards, each with the button that makes it; the recipe of the first that can be made."""
    cards = st.grid(3, min_column_width=220)
    for plan in found:
        key = plan.kind.replace(" ", "_")
        with cards.container(border=True, height="stretch", key=f"plan_{key}", gap="xsmall"):
            st.header(plan.kind.capitalize(), anchor=False)
            st.markdown(_expected(plan))
            st.caption(esc(plan.words))
            if plan.recipe is None:
                continue
            with st.container(height="stretch", vertical_alignment="bottom", gap="xsmall"):
                st.caption(esc(told(plan.recipe)))
                st.button(
                    "Make variant", key=f"make_{key}", icon=":material/add:", width="stretch",
                    on_click=make, args=([plan.recipe],),
                )  # fmt: skip
                st.button(
                    "Edit its steps", key=f"edit_{key}", icon=":material/edit:", width="stretch", type="tertiary",
                    on_click=_edit, args=(plan.recipe,),
                )  # fmt: skip
    st.caption(
        f"Losses are in {budget.meaning(table)}, {budget.how(table)}, added up over the parts. What is made is measured: "
        "its Layers tab on Trade-offs holds predicted and measured loss side by side."
    )
    return next((plan.recipe for plan in found if plan.recipe is not None), None)


def _edit(recipe: Recipe) -> None:
    """Take a plan to the steps; from a callback."""
    drafts.use(recipe)
    st.session_state[WRITE_AS] = st.query_params[WRITE_AS] = "steps"


def _expected(plan: Plan) -> str:
    size = "" if plan.bytes is None else fmt.size(plan.bytes)
    if plan.loss is None:
        return f"{size}, loss not predicted"
    badge = {None: "", True: " :green-badge[within tolerance]", False: " :orange-badge[beyond tolerance]"}[
        plan.within
    ]
    return f"{size}, expected loss {fmt.number(plan.loss, plan.unit)}{badge}"
