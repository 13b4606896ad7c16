"""How a variant will be measured: the settings of its evaluation and of its profile, folded away until they matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app.forms import settings_form
from app.reproduce import changed
from app.text import esc
from core.loop import EVALUATION_OF
from core.registry import Method, Settings, get
from core.types import Family

PYDOC = "pydoc"


@dataclass(frozen=True)
class Measured:
    """What the jobs of a variant are told about measuring it, as ``core.jobs.plan`` takes it."""

    evaluate: dict[str, Any]
    profile: dict[str, Any]


def measuring_form(family: Family | None) -> Measured | None:
    """Draw both forms; None while a setting is refused. The evaluation's wait until the model's family is known."""
    evaluation = None if family is None else get("evaluate", EVALUATION_OF[family])
    runtime = get("profile", "torch_eager")
    folded = st.expander("Measured how", icon=":material/straighten:")
    with folded:
        documents = st.text_input(
            "Evaluation text",
            PYDOC,
            key="documents",
            bind="query-params",
            help="pydoc (the reference prose every Python ships), a text file's path, or hub:ID",
        )
        quality = None if evaluation is None else _form(evaluation, "Quality", "evaluate")
        speed = _form(runtime, "Speed", "profile")
    if speed is None or (evaluation is not None and quality is None):
        return None
    evaluate: dict[str, Any] = {"documents": {"source": documents.strip() or PYDOC}}
    if evaluation is not None and quality is not None and changed(quality):
        evaluate |= {"method": evaluation.id, "settings": changed(quality)}
    return Measured(evaluate, {"settings": changed(speed)})


def _form(method: Method, title: str, prefix: str) -> Settings | None:
    with st.container(gap="xsmall"):
        st.markdown(f"**{title}**: {esc(method.title)}")
        return settings_form(method, prefix=prefix, columns=4)
