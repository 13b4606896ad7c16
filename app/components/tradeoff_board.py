"""The parts of the Trade-offs page: headline figures, the chart with its selection, the table that follows it.

The address is the truth of what is picked (``variant``) and brushed (``brush``): the chart and the table write it,
and both are drawn from it, because a chart's own selection can neither be set from Python nor trusted when stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from app import tradeoff_chart, tradeoff_views
from app.text import esc
from app.tradeoff_views import Scene
from core.constraints import Constraint, Verdict, parse_constraints
from core.errors import BadInput
from core.tradeoff import OBJECTIVES, Headline, Headlines, Objective, available

# --- the address --------------------------------------------------------------------------------------


def pick(variant: str | None) -> None:
    """Make ``variant`` the picked one, or none."""
    if variant is None:
        st.query_params.pop("variant", None)
    else:
        st.query_params["variant"] = variant


def repick(variant: str | None) -> None:
    """Pick from outside the chart; the chart is mounted anew, for its own stale pick would swallow a click."""
    st.session_state["chart_version"] = st.session_state.get("chart_version", 0) + 1
    pick(variant)


def picked(frame: pd.DataFrame) -> str | None:
    """The picked variant if this frame has it."""
    variant = st.query_params.get("variant")
    return variant if variant in set(frame["variant"]) else None


def box() -> list[float] | None:
    """The brushed box ``[x0, x1, y0, y1]`` of the address; None without one, or when it is no box."""
    try:
        ends = [float(end) for end in st.query_params.get("brush", "").split(",")]
    except ValueError:
        return None
    return ends if len(ends) == 4 and all(map(math.isfinite, ends)) else None


def clear_brush() -> None:
    """Forget the brushed box, in the address and in the chart."""
    st.query_params.pop("brush", None)
    repick(st.query_params.get("variant"))


def axis(title: str, name: str, columns: Sequence[str], *, default: str) -> str:
    """A select box of objectives whose address parameter ``name`` is the column, not the label that is shown."""
    asked = st.query_params.get(name)
    chosen = asked if asked in columns else default
    key = f"axis_{name}"

    def follow() -> None:
        st.query_params[name] = st.session_state[key]
        clear_brush()  # a box on other axes means nothing

    return st.selectbox(
        title,
        columns,
        index=columns.index(chosen),
        format_func=lambda column: OBJECTIVES[column].label,
        key=key,
        on_change=follow,
    )


def constraints_of(text: str) -> tuple[Constraint, ...]:
    """The limits as typed; says beneath the field what cannot be read, and then limits nothing."""
    try:
        return parse_constraints(text)
    except BadInput as error:
        st.markdown(f":red[{esc(error)}]")
        return ()


# --- headline figures ---------------------------------------------------------------------------------


def headline_row(figures: Headlines, scene: Scene) -> None:
    """Four cards: how many are on the front, closest to the base, smallest and fastest within the tolerance."""
    quality = figures.quality
    sign = "≤" if quality.better == "lower" else "≥"
    within = f"{_short(quality)} {sign} {figures.tolerance:g}"
    with st.grid(4, min_column_width=150, gap="small"):
        share = f"{scene.n_front / scene.n_judged:.0%}" if scene.n_judged else "–"
        _card(
            "On the front",
            f"{scene.n_front} of {scene.n_judged}",
            share,
            "of those measured",
            help="Not beaten on both axes by any other usable variant that keeps the limits",
        )
        _figure(f"{'Lowest' if quality.better == 'lower' else 'Highest'} {_short(quality)}", figures.closest)
        _figure(f"Smallest, {within}", figures.smallest)
        _figure(f"Fastest, {within}", figures.fastest)


def _short(quality: Objective) -> str:
    return quality.title.split(" ")[0]


def _figure(label: str, figure: Headline | None) -> None:
    if figure is None:
        _card(label, "–", "none", "qualifies yet")
        return
    value = figure.objective.show(figure.value)
    if figure.flagged:
        _card(label, value, "flagged run", "see its conditions")
        return
    if math.isnan(figure.change):
        _card(label, value, esc(figure.name), "", help=f"Variant {figure.variant}")
        return
    st.metric(
        label,
        value,
        delta=f"{figure.change:+.0%}",
        delta_color="inverse" if figure.objective.better == "lower" else "normal",
        delta_description="vs. base",
        border=True,
        height="stretch",
        help=f"{esc(figure.name)}, variant {figure.variant}",
    )


def _card(label: str, value: str, delta: str, description: str, *, help: str | None = None) -> None:
    st.metric(
        label,
        value,
        delta=delta,
        delta_color="off",
        delta_arrow="off",
        delta_description=description,
        border=True,
        height="stretch",
        help=help,
    )


# --- chart --------------------------------------------------------------------------------------------


def front_chart(scene: Scene, *, variant: str | None) -> Any:
    """The scatter, which is also returned; clicks and drags go to the address."""
    key = f"front_{st.session_state.get('chart_version', 0)}"
    chart = tradeoff_chart.scatter(scene, picked=variant, box=box())
    st.altair_chart(
        chart,
        key=key,
        on_select=lambda: _selected(key),
        selection_mode=[tradeoff_chart.POINT, tradeoff_chart.BRUSH],
        alt=f"Scatter of {len(scene.marks)} variants, {scene.y.label} against {scene.x.label}; "
        f"the dashed line joins the {scene.n_front} on the front",
    )
    st.caption(_reading(scene))
    return chart


def _selected(key: str) -> None:
    """What changed in the chart since its last word: a click, a drag, or both.

    An empty selection changes nothing: a chart that is drawn again says so too, and on a slow machine later than
    the click that made it be drawn again. The Clear buttons are what clears.
    """
    selection = st.session_state[key]["selection"]
    seen = st.session_state.setdefault(f"{key}_seen", {})
    points = selection.get(tradeoff_chart.POINT) or []
    if points and points[0]["variant"] != seen.get("variant"):
        seen["variant"] = points[0]["variant"]
        pick(seen["variant"])
    drag = selection.get(tradeoff_chart.BRUSH) or {}
    if {"x", "y"} <= set(drag) and drag != seen.get("drag"):
        seen["drag"] = drag
        st.query_params["brush"] = ",".join(f"{end:.6g}" for end in [*drag["x"], *drag["y"]])


def _reading(scene: Scene) -> str:
    states = set(scene.marks["state"])
    parts = ["Large and joined by the line: on the front", "the fainter, the less likely there"]
    parts += ["grey diamond: the base"] if "base" in states else []
    parts += ["hollow: flagged run"] if "flagged" in states else []
    parts += ["cross: no reload proof, not usable"] if "unproven" in states else []
    parts += [f"{scene.hidden:,} dominated points not drawn"] if scene.hidden else []
    parts += [f"{scene.at_edge} at 0, drawn on the edge of the log axis"] if scene.at_edge else []
    parts += [f"{scene.unmeasured:,} not measured on both axes"] if scene.unmeasured else []
    return " · ".join(parts)


def nothing_picked() -> None:
    """What the panel says before anything is picked."""
    st.header("Variant", anchor=False)
    with st.container(height="stretch", vertical_alignment="center", horizontal_alignment="center"):
        st.markdown(
            ":material/ads_click: :gray[Click a point or a table row to see one variant.]",
            text_alignment="center",
        )


def limits_line(verdict: Verdict) -> None:
    """What the limits leave; when nothing, the closest variant with a button that shows it."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f":gray[{esc(verdict.sentence())}]", width="stretch")
        if verdict.closest is not None:
            st.button("Show it", on_click=repick, args=(verdict.closest,), key="show_closest")


# --- table --------------------------------------------------------------------------------------------


def variant_table(
    frame: pd.DataFrame,
    chosen: pd.Series,
    scene: Scene,
    *,
    variant: str | None,
    said: Mapping[str, Sequence[str]],
) -> None:
    """The chosen rows; a click picks one, and the picked one is marked wherever it was picked."""
    shown = tradeoff_views.table(frame, chosen, scene.marks, scene.y, said)
    ids = shown["variant"].tolist()
    rows = [ids.index(variant)] if variant in ids else []
    if (st.session_state.get("variants") or {}).get("selection", {}).get("rows") != rows:
        st.session_state["variants"] = {"selection": {"rows": rows}}
    st.dataframe(
        shown,
        hide_index=True,
        height=min(38 + 35 * max(len(shown), 1), 318),
        key="variants",
        on_select=lambda: _row_selected(ids),
        selection_mode="single-row",
        column_config=_columns(frame, scene.domain),
        alt="Variants with size, quality and speed",
    )
    if len(shown) < int(chosen.sum()):
        st.caption(f"The best {len(shown):,} of {int(chosen.sum()):,}; the CSV holds all of them.")


def _row_selected(ids: Sequence[str]) -> None:
    """A table that is drawn again may report no row, as the chart does; see ``_selected``."""
    rows = st.session_state["variants"]["selection"]["rows"]
    if rows:
        repick(ids[rows[0]])


def _columns(frame: pd.DataFrame, domain: Sequence[str]) -> dict[str, Any]:
    column = st.column_config
    states = ["proven", "flagged", "unproven", "base"]
    config: dict[str, Any] = {
        "variant": None,
        "name": column.TextColumn("Variant", pinned=True),
        "method": column.MultiselectColumn("Method", options=[*domain, "base"], color="auto", width=90),
        "state": column.MultiselectColumn(
            "State", options=states, color=["green", "orange", "red", "gray"], width=90
        ),
        "on_front": column.NumberColumn(
            "On front",
            format="%.0f %%",
            width=80,
            help="Share of draws from the intervals with it on the front",
        ),
        "to_know": column.TextColumn(
            "To know",
            width="medium",
            help="Where it is slower, broken, larger or no smaller than its base beyond the intervals",
        ),
    }
    for aim in available(frame):
        if aim.column in ("bytes", "decode_tokens_per_s"):
            top = float((frame[aim.column] / aim.scale).max())
            config[aim.column] = column.ProgressColumn(
                aim.label, format=f"%.{0 if top >= 100 else 2}f", min_value=0, max_value=top
            )
        else:
            config[aim.column] = column.NumberColumn(aim.label, format=_printf(frame, aim))
    return config


def _printf(frame: pd.DataFrame, aim: Objective) -> str:
    """One number of decimals for the whole column; significant digits where values span orders of magnitude."""
    if aim.log and aim.group == "quality":
        return "%.3g"
    typical = float((frame[aim.column] / aim.scale).abs().median())
    if not typical or math.isnan(typical):
        return "%.4g"
    return f"%.{min(6, max(0, aim.digits - 1 - math.floor(math.log10(typical))))}f"
