"""A training as it runs and after it: the points of its curve, from the worker's scratch folder or the catalog.

A running worker appends to a file that this reads; what was made keeps the same as frames of its compress run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from app import engine
from app import format as fmt
from app.charts import PADDING, SELECTED
from core.distill.curve import NAME, curve_frame, held_out_frame, read_points, samples_frame
from core.errors import SlimscopeError
from core.recipe import Recipe
from core.scratch import PREFIX
from core.types import Job

NEUTRAL = "#8A93A6"
IN_NATS = ("kl", "task")
"""Held-out measures in nats; the first there is shares the training loss' axis."""
SHARES = ("accuracy", "top1_agreement")
LABELS = {
    "kl": "KL to teacher",
    "task": "Loss of the task",
    "accuracy": "Accuracy",
    "top1_agreement": "Same top token",
}
FRAMES = ("curve", "held_out", "samples")
NO_SAMPLES = pd.DataFrame(columns=["tokens", "prompt", "continuation"])


@dataclass(frozen=True, eq=False)
class Course:
    """The course of a training so far."""

    updates: pd.DataFrame
    """``core.distill.curve.curve_frame``."""
    held_out: pd.DataFrame
    samples: pd.DataFrame
    seconds_left: float | None = None
    """At the pace of the last updates; None where it does not run."""


def running(job: Job) -> Course | None:
    """The course of a job that makes a student; None where it has none yet, or trains nothing."""
    variant = _variant_id(job)
    if variant is None:
        return None
    folder = engine.catalog().folder / "scratch" / f"{PREFIX}{variant}"
    files = sorted(folder.rglob(NAME), key=lambda file: file.stat().st_mtime)
    points = read_points(files[-1]) if files else []
    return course(points) if points else None


def course(points: list[dict[str, Any]]) -> Course:
    """The frames of a curve's points."""
    updates = [point for point in points if point["kind"] == "update"]
    left = updates[-1].get("seconds_left") if updates else None
    return Course(curve_frame(points), held_out_frame(points), samples_frame(points), left)


@st.cache_data(max_entries=32, show_spinner=False)
def finished(variant_id: str, revision: int) -> Course | None:
    """The course that a made variant keeps; None where it was not trained."""
    detail = engine.variant_detail(variant_id, revision)
    run = next((run for run, name in detail.frames if name == "curve"), None)
    if run is None:
        return None
    kept = {name for of, name in detail.frames if of == run}  # a profile has "samples" of its own
    if "held_out" not in kept:
        return None
    frames = {name: engine.catalog().frame(run, name) for name in FRAMES if name in kept}
    return Course(frames["curve"], frames["held_out"], frames.get("samples", NO_SAMPLES))


def _variant_id(job: Job) -> str | None:
    """The id of the variant that a compress job makes; None while the model it starts from is not in the catalog."""
    if job.kind != "compress":
        return None
    try:
        recipe = Recipe.parse(job.spec["recipe"])
        source = str(job.spec["model"])
        if source.startswith("variant:"):
            return recipe.variant_id(engine.variant_of(source.removeprefix("variant:")).fingerprint)
        known = engine.bases(engine.revision())
        ids = known.loc[known["source"] == source, "id"]
        return recipe.variant_id(engine.variant_of(ids.iloc[0]).fingerprint) if len(ids) else None
    except SlimscopeError:
        return None


# --- what is said and drawn -----------------------------------------------------------------------------


def headlines(shown: Course) -> list[tuple[str, str, str]]:
    """The newest figures: label, value with unit, and what the figure is."""
    found = []
    for measure, values in shown.held_out.groupby("measure", sort=False)["value"]:
        first, last = (said(str(measure), float(values.iloc[at])) for at in (0, -1))
        found.append(
            (f"{LABELS.get(str(measure), fmt.label(str(measure)))}, held out", last, f"{first} before")
        )
    if len(shown.updates):
        now = shown.updates.iloc[-1]
        left = f"{fmt.seconds(shown.seconds_left)} left, " if shown.seconds_left else ""
        found += [
            ("Training loss", fmt.number(float(now["loss"]), "nats"), "per target, parts weighted"),
            (
                "Gradient norm",
                fmt.number(float(now["gradient_norm"])),
                f"learning rate {now['learning_rate']:.1e}",
            ),
            (
                "Pace",
                fmt.number(float(now["tokens_per_s"]), "tokens/s"),
                f"{left}{fmt.count(float(now['tokens']))} read",
            ),
        ]
    return found


def said(measure: str, value: float) -> str:
    """A held-out measure's value with its unit."""
    if measure in SHARES:
        return f"{fmt.significant(value * 100)} %"
    return fmt.number(value, "nats" if measure in IN_NATS else "")


def loss_chart(shown: Course) -> Any:
    """The training loss, and what it is to bring down on held-out rows: KL to the teacher, or the task's loss without one."""
    measures = list(shown.held_out["measure"].drop_duplicates())
    main = next((name for name in IN_NATS if name in measures), None)
    held = shown.held_out[shown.held_out["measure"] == main]
    held = held.assign(series=f"{LABELS.get(str(main), str(main))}, held out")
    train = shown.updates.assign(series="Training loss", value=shown.updates["loss"])
    names = ["Training loss", *held["series"].drop_duplicates()]
    x = alt.X("tokens:Q", title="Training tokens read", axis=alt.Axis(format="~s", tickCount=6))
    y = alt.Y("value:Q", title="nats per target", scale=alt.Scale(zero=False))
    color = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=names, range=[NEUTRAL, SELECTED][: len(names)]),
        legend=alt.Legend(orient="top"),
    )
    tooltip = [
        alt.Tooltip("series:N", title=" "),
        alt.Tooltip("tokens:Q", title="Tokens", format=",.0f"),
        alt.Tooltip("value:Q", title="nats", format=".4f"),
    ]
    return alt.layer(
        alt.Chart(train[["tokens", "value", "series"]])
        .mark_line(strokeWidth=1.2)
        .encode(x=x, y=y, color=color, tooltip=tooltip),
        alt.Chart(held)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=40))
        .encode(x=x, y=y, color=color, tooltip=tooltip),
    ).properties(height=230, padding=PADDING)


def small_chart(shown: Course, column: str, title: str) -> Any:
    """One column of the updates over the tokens read."""
    y = alt.Y(
        f"{column}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=3, format="~g")
    )
    return (
        alt.Chart(shown.updates)
        .mark_line(strokeWidth=1.2, color=NEUTRAL)
        .encode(
            x=alt.X("tokens:Q", title=None, axis=alt.Axis(format="~s", tickCount=4)),
            y=y,
            tooltip=[alt.Tooltip("tokens:Q", format=",.0f"), alt.Tooltip(f"{column}:Q", format=".4~g")],
        )
        .properties(height=100, padding=PADDING)
    )
