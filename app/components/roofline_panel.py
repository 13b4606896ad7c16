"""Every measured phase under this machine's roofs, why one of them takes its time, and what to try next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from app import engine, measurements, where_charts, where_views
from app import format as fmt
from app.components.card_head import card_head
from app.components.empty_state import empty_state
from app.profile_charts import PICK
from app.text import esc
from app.where_views import Placed
from core.jobs.where_plan import submit_machine
from core.profile.bottleneck import CAUSES
from core.profile.machine import Roofs, known_roofs
from core.types import Run, Variant


def roofline_panel(
    base_id: str,
    known: Sequence[Variant],
    runs: Mapping[str, Sequence[Run]],
    chosen: Sequence[str],
    domain: list[str],
) -> None:
    """The chart, the verdict of the picked phase, the table; what is missing for it is one job."""
    roofs = known_roofs()
    shapes = measurements.shapes(known)
    measured = [v for v in known if any(run.kind == "profile" for run in runs.get(v.id, ()))]
    uncounted = [v for v in measured if v.fingerprint not in shapes]
    if roofs is None:
        _offer(
            base_id,
            "The roofs of this machine are not measured yet: how fast it reads memory, multiplies, and calls a layer.",
        )
        return
    _roofs_line(base_id, roofs, len(uncounted))
    points, found = where_views.under_roofs(known, runs, shapes, chosen, roofs)
    if points.empty:
        st.caption("No phase that was measured on this machine has been counted yet.")
        return
    asked = st.query_params.get("phase_at")
    picked = asked if asked in found else points.sort_values("share_of_roof")["key"].iloc[0]
    _verdict(found[picked], points[points["key"] == picked].iloc[0])
    chart = where_charts.roofline(points, where_views.roofs_for(points, roofs), domain=domain, picked=picked)
    with st.container(border=True):
        card_head("Under the roofs", points.drop(columns="key"), chart, key="roofline")
        key = "roofline_chart"
        st.altair_chart(
            chart,
            key=key,
            on_select=lambda: _clicked(key),
            selection_mode=[PICK],
            alt=f"{len(points)} measured phases under the roofs of this machine",
        )
        st.caption(
            "The line is the most that this machine can do at an intensity; a click on a point explains it."
        )
        _table(points, picked)


def _offer(base_id: str, sentence: str) -> None:
    empty_state(sentence, icon="roofing")
    st.button(
        "Measure the roofs", icon=":material/speed:", on_click=_submit, args=(base_id, False), key="roofs_now",
        help="A job of under a minute, alone on this machine; kept for this machine and software",
    )  # fmt: skip


def _submit(base_id: str, again: bool) -> None:
    submit_machine(engine.queue(), base_id, again=again)
    engine.start_work()


def _roofs_line(base_id: str, roofs: Roofs, uncounted: int) -> None:
    busy = f"; other programs took {roofs.other_cpu:.0%} of the processors" if roofs.flags else ""
    missing = f" {uncounted} measured variants are not counted yet." if uncounted else ""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(
            esc(
                f"This machine reads {roofs.read_bytes_per_s() / 1e9:.3g} GB/s and multiplies "
                f"{roofs.flops_per_s('float32') / 1e9:.3g} GFLOP/s in float32 (best of several, taken {roofs.taken_at[:16]}{busy}).{missing}"
            ),
            width="stretch",
        )
        st.button(
            "Count them" if uncounted and not roofs.flags else "Measure again",
            icon=":material/refresh:",
            type="tertiary",
            on_click=_submit,
            args=(base_id, not uncounted),
            key="roofs_again",
        )


def _verdict(placed: Placed, row: pd.Series) -> None:
    said = placed.verdict
    with st.container(border=True):
        st.header(esc(f"{row['label']}: {CAUSES[said.cause]}"), anchor=False)
        left, right = st.columns([1.2, 1], gap="medium")
        with left:
            st.markdown(esc(said.sentence))
            st.markdown(f":material/arrow_forward: **Next:** {esc(said.action)}")
            for action in said.actions[1:4]:
                st.caption(esc(f"or {action.text}: at most {action.gain:.2f} × as fast, modelled"))
            st.caption(
                esc(
                    f"{row['share_of_bandwidth']:.0%} of the measured bandwidth, {row['share_of_matrix_rate']:.0%} of the "
                    f"matrix rate; {fmt.size(row['bytes'])} a step, counted {row['counted']}"
                )
            )
        with right:
            parts = where_views.parts_of(said)
            st.dataframe(
                parts,
                hide_index=True,
                key="verdict_parts",
                alt="What the step would take at the roofs, part by part",
                column_config={
                    "part": st.column_config.TextColumn("Part", width="medium"),
                    "ms": st.column_config.ProgressColumn(
                        "ms", format="%.3g", min_value=0, max_value=float(parts["ms"].max())
                    ),
                    "how": "How",
                },
            )


def _clicked(key: str) -> None:
    points = st.session_state[key]["selection"].get(PICK) or []
    if points:
        st.query_params["phase_at"] = points[0]["key"]


def _table(points: pd.DataFrame, picked: str) -> None:
    shown = where_views.roofline_table(points)
    ids = shown["key"].tolist()
    rows = [ids.index(picked)]
    if (st.session_state.get("roofline_table") or {}).get("selection", {}).get("rows") != rows:
        st.session_state["roofline_table"] = {"selection": {"rows": rows}}
    column = st.column_config
    share = {
        name: column.ProgressColumn(title, format="percent", min_value=0.0, max_value=1.0)
        for name, title in (
            ("share_of_roof", "Of the roof"),
            ("share_of_bandwidth", "Of the bandwidth"),
            ("share_of_matrix_rate", "Of the matrix rate"),
        )
    }
    st.dataframe(
        shown,
        hide_index=True,
        height="content" if len(shown) <= 10 else 388,
        key="roofline_table",
        on_select=lambda: _row_clicked(ids),
        selection_mode="single-row",
        alt="Measured phases, the furthest from its roof first",
        column_config={
            "key": None,
            "label": column.TextColumn("Cell", pinned=True, width="medium"),
            "phase": "Phase",
            "ms": column.NumberColumn("ms", format="%.4g"),
            "read": column.NumberColumn("Read (MB)", format="%.4g"),
            "bound": "Bound by",
            "counted": "Counted",
            **share,
        },
    )


def _row_clicked(ids: Sequence[str]) -> None:
    rows = st.session_state["roofline_table"]["selection"]["rows"]
    if rows:
        st.query_params["phase_at"] = ids[rows[0]]
