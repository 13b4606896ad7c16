"""What was measured: the answer at the top, every sample as a distribution, the ranked table, one run in a drawer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from app import format as fmt
from app import measurements, profile_charts, profile_views, sample_views, state
from app.components.card_head import card_head
from app.components.export_menu import export_menu
from app.profile_views import Phase
from app.text import esc
from core.errors import SlimscopeError
from core.profile.comparability import MEANINGS, tier_of
from core.types import Run

READING = {
    "strip": "Each tick is one sample, dark where it was contended; the diamond below is the median in its 95 % interval, hollow "
    "where the run is flagged",
    "ecdf": "Each line is the share of samples at or below a time; the point is the median",
}
"""How each drawing is read."""
FLAGS = {
    "contention": "other programs were busy",
    "load_too_high": "the machine was busy at the start",
    "no_steady_state": "it had not settled when its time was up",
    "n_too_small": "too few samples",
    "frequency_drop": "the processor's clock fell",
    "parity_loss": "the runtime's answers have moved",
}


def headline_cards(rows: pd.DataFrame, tolerance: float) -> None:
    """Four figures, each with its loss beside it: fastest within the tolerance, at any loss, lightest, plain torch."""
    with st.grid(4, min_column_width=170, gap="small"):
        for headline in profile_views.headlines(rows, tolerance):
            if headline.row is None:
                st.metric(
                    headline.title, headline.value, delta="none", delta_color="off", delta_arrow="off",
                    delta_description=headline.beside, border=True, height="stretch",
                )  # fmt: skip
                continue
            times = (
                "the yardstick" if headline.times is None else f"{fmt.significant(headline.times)} × torch"
            )
            st.metric(
                headline.title,
                headline.value,
                delta=headline.beside,
                delta_color="off",
                delta_arrow="off",
                delta_description=times,
                border=True,
                height="stretch",
                help=esc(
                    f"{headline.row['label']}; 95 % {_interval(headline.row)}, run {headline.row['run']}"
                ),
            )


def _interval(row: pd.Series) -> str:
    return fmt.interval(row["rate_low"], row["rate_high"], row["rate_unit"])


def headline_sentence(rows: pd.DataFrame, runs: Mapping[str, Run], tolerance: float) -> None:
    """How far the figures may be compared, and that only a race gives a verdict."""
    told = [headline.row for headline in profile_views.headlines(rows, tolerance)]
    first, plain = told[0], told[3]
    flagged = [row for row in told if row is not None and row["status"] != "valid"]
    if first is not None and plain is not None and first["run"] != plain["run"]:
        badge = tier_of(runs[first["run"]], runs[plain["run"]])
        st.caption(
            esc(
                f"Medians against plain torch: badge {profile_views.badge_words(badge)}. No verdict; A against B gives one."
                + (f" {len(flagged)} of these figures rest on flagged runs." if flagged else "")
            )
        )


# --- distributions --------------------------------------------------------------------------------------


def distributions(rows: pd.DataFrame, phase: Phase, domain: list[str]) -> str | None:
    """Every sample of the newest run of each cell; returns the picked run, which a click changes."""
    shown = rows.head(sample_views.DRAWN)
    picked = st.query_params.get("run")
    picked = picked if picked in set(rows["run"]) else None
    head = st.container(horizontal=True, vertical_alignment="center")
    with head:
        st.header(f"{profile_views.TITLES[phase]}: every sample of a step", anchor=False, width="stretch")
        shape = state.choice(
            st.segmented_control, "Drawn as", {"strip": "Strips", "ecdf": "ECDF"}, key="shape", default="strip",
            required=True, label_visibility="collapsed",
        )  # fmt: skip
    samples = {run: found for run in shown["run"] if (found := _samples(run)) is not None}
    strips = sample_views.strips(shown, samples, phase)
    chart = profile_charts.distributions(
        strips,
        sample_views.medians(shown),
        shape="ecdf" if shape == "ecdf" else "strip",
        title=f"ms of a {phase} step" if phase != "forward" else "ms of a forward pass",
        picked=picked,
        domain=domain,
    )
    with head:
        export_menu(strips, chart, name=f"samples-{phase}", key="samples")
    key = f"distributions_{st.session_state.get('distributions_version', 0)}"
    st.altair_chart(
        chart,
        key=key,
        on_select=lambda: _clicked(key),
        selection_mode=[profile_charts.PICK],
        alt=f"Every sample of {len(shown)} cells as a distribution, with the median and its 95 % interval",
    )
    more = (
        f" · the {len(shown)} fastest of {len(rows)} cells; the table has all"
        if len(rows) > len(shown)
        else ""
    )
    st.caption(READING["ecdf" if shape == "ecdf" else "strip"] + more)
    return picked


def _samples(run: str) -> pd.DataFrame | None:
    try:
        return measurements.frame_of(run, "samples")
    except SlimscopeError:  # an imported run has none
        return None


def _clicked(key: str) -> None:
    points = st.session_state[key]["selection"].get(profile_charts.PICK) or []
    if points:
        st.query_params["run"] = points[0]["run"]


def _pick(run: str | None) -> None:
    st.session_state["distributions_version"] = st.session_state.get("distributions_version", 0) + 1
    if run is None:
        st.query_params.pop("run", None)
    else:
        st.query_params["run"] = run


# --- table ----------------------------------------------------------------------------------------------


def ranked_table(rows: pd.DataFrame, runs: Mapping[str, Run], phase: Phase, picked: str | None) -> None:
    """The cells ranked by speed, the loss and a badge beside each; a click on a row picks its run."""
    reference = picked or rows["run"].iloc[0]
    card_head(
        f"Ranked by {phase}",
        profile_views.table(rows, runs, reference).assign(run=rows["run"]),
        None,
        key=f"speeds-{phase}",
    )
    shown = profile_views.table(rows.head(200), runs, reference)
    ids = rows["run"].tolist()
    marked = [ids.index(picked)] if picked in ids[:200] else []
    if (st.session_state.get("speeds") or {}).get("selection", {}).get("rows") != marked:
        st.session_state["speeds"] = {"selection": {"rows": marked}}
    column = st.column_config
    st.dataframe(
        shown,
        hide_index=True,
        height="content" if len(shown) <= 10 else 388,
        key="speeds",
        on_select=lambda: _row_clicked(ids),
        selection_mode="single-row",
        alt=f"Measured cells ranked by {phase} speed",
        column_config={
            "name": column.TextColumn("Variant", pinned=True, width="medium"),
            "runtime": "Runtime",
            "settings": "Settings",
            "rate": column.ProgressColumn(
                f"{fmt.short_unit(rows['rate_unit'].iloc[0])}", format="%.4g", min_value=0, max_value=float(rows["rate"].max())
            ),
            "rate_interval": column.TextColumn("95 %", width=110),
            "time_ms": column.NumberColumn("ms", format="%.4g", width=70),
            "loss": column.NumberColumn("KL to base", format="%.2g", width=90, help="nats per token, of this very process"),
            "parity_kl": column.NumberColumn(
                "Parity KL", format="%.2g", width=90, help="to the same files in float32: what the runtime itself changes"
            ),
            "memory": column.NumberColumn("Peak MB", format="%.0f", width=80),
            "n": column.NumberColumn("n", width=50),
            "badge": column.MultiselectColumn(
                "Badge", options=[*MEANINGS, "–"], color=["green", "blue", "gray", "orange", "red", "gray"], width=70,
                help="How far it may be compared with the picked row: " + "; ".join(f"{k} {v}" for k, v in MEANINGS.items()),
            ),
            "why": column.TextColumn("Because", width="small"),
            "flags": "Flags",
            "measured": column.TextColumn("Measured", width=90),
        },
    )  # fmt: skip


def _row_clicked(ids: Sequence[str]) -> None:
    chosen = st.session_state["speeds"]["selection"]["rows"]
    if chosen:
        _pick(ids[chosen[0]])


# --- the drawer -----------------------------------------------------------------------------------------


def run_drawer(run: Run, row: pd.Series, phase: Phase) -> None:
    """One run in full: what it measured, under which conditions, its samples in order, its notes."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header(esc(row["label"]), anchor=False, width="stretch")
        st.button(
            "Clear", type="tertiary", icon=":material/close:", on_click=_pick, args=(None,), key="clear_run"
        )
    with st.container(horizontal=True, gap="xsmall"):
        for flag in run.flags:
            st.markdown(f":orange-badge[{esc(FLAGS.get(flag, flag))}]")
        if not run.flags:
            st.markdown(":green-badge[valid]")
        st.markdown(":gray-badge[energy unavailable: no counter was read]")
    left, right = st.columns([1, 1.2], gap="medium")
    with left:
        st.table(_numbers(run), border="horizontal")
    with right:
        samples = _samples(run.id)
        if samples is not None:
            chart = profile_charts.in_order(sample_views.in_order(samples, phase))
            st.altair_chart(chart, key="in_order", alt="The samples of this run in the order they were taken")
        seen = run.conditions
        st.caption(
            esc(
                f"Run {run.id} · {run.protocol} · {seen.get('dtype', '')} · {seen.get('threads', '?')} threads · batch "
                f"{seen.get('batch', '?')} · prompt {seen.get('prompt_tokens', '?')} · depth {seen.get('depth', '?')} · "
                f"other programs {seen.get('other_cpu_at_start', 0):.0%} at the start"
            )
        )
        for note in seen.get("notes", ()):
            st.caption(esc(note))


def _numbers(run: Run) -> pd.DataFrame:
    rows = [
        (
            esc(fmt.label(m.name)),
            esc(fmt.number(m.value, m.unit)),
            esc(fmt.interval(m.low, m.high, m.unit)),
            m.n or "",
        )
        for m in run.measurements
    ]
    return pd.DataFrame(rows, columns=["Number", "Value", "95 %", "n"]).set_index("Number").astype(str)
