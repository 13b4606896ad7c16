"""A against B: two measured cells in turn in one session, and the verdict that only this gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from app import engine, measurements, profile_charts, profile_views, sample_views
from app import format as fmt
from app.components.card_head import card_head
from app.components.error_card import error_card
from app.profile_views import Phase
from app.text import esc
from core.errors import SlimscopeError
from core.jobs.profile_plan import submit_race
from core.profile.comparability import tier_of
from core.profile.runtimes._base import PLAIN
from core.types import Run

REFUSED = "race_refused"


def race_panel(rows: pd.DataFrame, runs: Mapping[str, Run], races: Sequence[Run], phase: Phase) -> None:
    """Choose two cells, race them, and read the verdicts so far."""
    titles = dict(zip(rows["run"], rows["label"], strict=True))
    if len(titles) < 2:
        st.caption("Two measured cells are needed: measure another variant or runtime under Measure.")
    else:
        _choose(rows, titles, runs, phase)
    if refusal := st.session_state.pop(REFUSED, None):
        error_card(refusal, key="race_refusal")
    if races:
        _races(races)
    else:
        st.caption("No race yet.")


def _choose(rows: pd.DataFrame, titles: Mapping[str, str], runs: Mapping[str, Run], phase: Phase) -> None:
    plain = rows[rows["is_base"] & (rows["runtime"] == PLAIN)]["run"]
    ids = list(titles)
    first = _picked("a", ids, plain.iloc[0] if len(plain) else ids[-1])
    second = _picked("b", ids, next(id_ for id_ in ids if id_ != first))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        a, b = (_box(side, ids, titles, id_) for side, id_ in (("a", first), ("b", second)))
        st.button(
            "Race them",
            icon=":material/flag:",
            disabled=a == b,
            on_click=_submit,
            args=(runs[a], runs[b], phase),
            key="race",
            help="Both are loaded and measured in turn, in blocks of A B B A, in one session; it runs as a job",
        )
    if a == b:
        return
    badge = tier_of(runs[a], runs[b])
    one, two = (rows[rows["run"] == id_].iloc[0] for id_ in (a, b))
    st.caption(
        esc(
            f"So far: B's median is {two['rate'] / one['rate']:.3g} × A's; A: {profile_views.loss_words(one)}, "
            f"B: {profile_views.loss_words(two)}. Badge {profile_views.badge_words(badge)}: no verdict."
        )
    )


def _picked(side: str, ids: Sequence[str], default: str) -> str:
    asked = st.query_params.get(side)
    return asked if asked is not None and asked in ids else default


def _box(side: str, ids: list[str], titles: Mapping[str, str], chosen: str) -> str:
    key = f"race_{side}"

    def follow() -> None:
        st.query_params[side] = st.session_state[key]

    found: str = st.selectbox(
        side.upper(),
        ids,
        index=ids.index(chosen),
        format_func=lambda id_: titles[id_],
        key=key,
        on_change=follow,
    )
    return found


def _submit(a: Run, b: Run, phase: Phase) -> None:
    try:
        submit_race(
            engine.queue(),
            a.variant_id,
            b.variant_id,
            phase="prefill" if phase == "prefill" else "decode",
            runtime_a=str(a.conditions["method"]),
            runtime_b=str(b.conditions["method"]),
            settings_a=_settings(a, a),
            settings_b=_settings(b, a),
        )
        engine.start_work()
    except SlimscopeError as error:
        st.session_state[REFUSED] = error


def _settings(side: Run, work: Run) -> dict[str, Any]:
    """A side's own settings, with the workload and the tier of A: both must do the same."""
    own, other = dict(side.conditions["settings"]), work.conditions["settings"]
    return {
        **own,
        **{name: other[name] for name in ("tier", "prompt_tokens", "new_tokens", "batch", "depth", "seed")},
    }


# --- the verdicts ---------------------------------------------------------------------------------------


def _races(races: Sequence[Run]) -> None:
    ids = [run.id for run in races]
    asked = st.query_params.get("race")
    chosen = races[ids.index(asked)] if asked in ids else races[0]
    with st.container(border=True):
        _race(chosen)
    if len(races) > 1:
        card_head("Every race", race_table(races), None, key="races")
        rows = [ids.index(chosen.id)]
        if (st.session_state.get("races_table") or {}).get("selection", {}).get("rows") != rows:
            st.session_state["races_table"] = {"selection": {"rows": rows}}
        st.dataframe(
            race_table(races),
            hide_index=True,
            height="content" if len(races) <= 8 else 318,
            key="races_table",
            on_select=lambda: _race_clicked(ids),
            selection_mode="single-row",
            alt="Every race with its verdict, newest first",
            column_config={
                "ratio": st.column_config.NumberColumn("B ÷ A", format="%.3f"),
                "interval": "95 %",
            },
        )


def _race_clicked(ids: Sequence[str]) -> None:
    rows = st.session_state["races_table"]["selection"]["rows"]
    if rows:
        st.query_params["race"] = ids[rows[0]]


def _race(run: Run) -> None:
    said, sides = run.conditions["verdict"], run.conditions["sides"]
    badge = tier_of(sides["a"], sides["b"])
    ratios = sample_views.block_ratios(measurements.frame_of(run.id, "blocks"))
    chart = profile_charts.block_ratios(
        ratios, said["ratio"], said["low"], said["high"], float(said.get("delta", 0.03))
    )
    card_head(said["verdict"].capitalize(), ratios, chart, key=f"race-{run.id}")
    with st.container(horizontal=True, gap="xsmall"):
        st.markdown(f":green-badge[badge {badge.letter}: {esc(badge.why)}]")
        for flag in run.flags:
            st.markdown(f":orange-badge[{esc(flag)}]")
    st.markdown(esc(said["sentence"]))
    for side in "ab":
        st.caption(esc(f"{side.upper()}: {_side(sides[side])}"))
    st.altair_chart(
        chart, key=f"race_chart_{run.id}", alt=f"The speed of B over A in each of {said['n_blocks']} blocks"
    )
    st.caption(
        f"Each point is one block of four stretches; grey is within {float(said.get('delta', 0.03)):.0%}, which counts as equal; "
        "orange is the ratio with its 95 % interval"
    )


def _side(side: Mapping[str, Any]) -> str:
    kl = side.get("parity_kl")
    told = f"parity KL {fmt.significant(kl, 2)}" if kl is not None else "parity not measured"
    return f"{side['name']} in {profile_views.runtime_title(side['runtime'])}, {side['dtype']}, {side['threads']} thread{'s' * (side['threads'] != 1)}, {told}"


def race_table(races: Sequence[Run]) -> pd.DataFrame:
    """One row per race: who, the verdict, the ratio with its interval, blocks, when."""
    rows = []
    for run in races:
        said, sides = run.conditions["verdict"], run.conditions["sides"]
        rows.append(
            {
                "A": f"{sides['a']['name']}, {sides['a']['runtime']}",
                "B": f"{sides['b']['name']}, {sides['b']['runtime']}",
                "phase": fmt.label(str(run.conditions["phase"])),
                "verdict": said["verdict"],
                "ratio": said["ratio"],
                "interval": fmt.interval(said["low"], said["high"]),
                "blocks": said["n_blocks"],
                "flags": " ".join(run.flags),
                "when": fmt.ago(run.ended_at),
            }
        )
    return pd.DataFrame(rows)
