"""What can be asked of a made student: its course of training, a look inside beside its teacher, and its baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import streamlit as st

from app import engine
from app import format as fmt
from app.components.loss_curve import loss_curve
from app.distil_views import training_index
from app.live_training import finished
from app.text import esc
from app.training_views import equal_bytes
from core.recipe import Recipe
from core.registry import methods
from core.types import Variant

TWIN_VIEWS = (
    ("layer_alignment", "Which layer became which", "align_items_stretch"),
    ("matched_heads", "Heads matched", "join_inner"),
    ("lost_tokens", "What it dropped", "difference"),
    ("compression_drift", "Where it drifts", "trending_down"),
)
"""Probes of two models that show a student beside its teacher, with their links' titles and icons."""


def student_after(made: Sequence[str], model: str, *, make: Callable[[Sequence[Recipe]], None]) -> None:
    """Draw every made student of ``made`` (variant ids); ``make`` queues its baseline."""
    for id_ in made:
        variant = engine.variant_of(id_)
        if variant.recipe is None or training_index(Recipe.parse(json.loads(variant.recipe))) is None:
            continue
        with st.container(border=True):
            _student(variant, model, make)


def _student(variant: Variant, model: str, make: Callable[[Sequence[Recipe]], None]) -> None:
    source, teacher = f"variant:{variant.id}", teacher_of(variant)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header("Student beside teacher", anchor=False, width="stretch")
        st.caption(
            esc(f"{variant.name} · {fmt.size(variant.bytes)}, {fmt.count(variant.parameters)} parameters"),
            width="content",
        )
    shown = finished(variant.id, engine.revision())
    if shown is not None:
        loss_curve(shown, key=f"made_{variant.id}")
    with st.container(horizontal=True, vertical_alignment="center"):
        known = methods("probe")
        for probe, title, icon in TWIN_VIEWS:
            if probe in known:
                st.page_link(
                    "../pages/inspect.py",
                    label=title,
                    icon=f":material/{icon}:",
                    query_params={"model": source, "probe": probe, "reference": teacher},
                )
        st.page_link(
            "../pages/tradeoffs.py",
            label="Trade-offs",
            icon=":material/scatter_plot:",
            query_params={"base": variant.base_id, "variant": variant.id},
        )
        st.button(
            f"Make the quantized model of equal bytes ({fmt.size(variant.bytes)})",
            icon=":material/balance:",
            on_click=make,
            args=([equal_bytes(variant.bytes)],),
            key=f"baseline_{variant.id}",
            help="Mixed precision of the model that the student was made from: the same bytes, spent the other way",
        )


def teacher_of(variant: Variant) -> str:
    """The source of a student's teacher: its second parent, or its only one."""
    return engine.variant_of(variant.parents[-1]).source
