"""Opening a stored run on the page of its probe: the address's ``run`` fills the page with what was asked then.

As soon as anything is changed the page asks anew, and ``run`` leaves the address.
"""

from __future__ import annotations

import streamlit as st

from app import engine
from app import format as fmt
from app.components.heading import About, heading
from app.components.prompt_box import fill
from app.components.result_panel import result_panel
from app.engine import Question
from app.text import esc
from core.errors import BadInput
from core.registry import get
from core.types import ModelRef, Prompt, Result, Run


def take_up_run() -> Run | None:
    """The run that the address names, a probe's question put into the widgets once; call before those are drawn.

    Raises ``BadInput`` for a run that is unknown or did not look inside.
    """
    id_ = st.query_params.get("run")
    if not id_:
        st.session_state.pop("run_taken_up", None)
        return None
    run = engine.run_of(id_)
    if run.kind not in ("probe", "train"):
        raise BadInput(f"run {id_} is of kind {run.kind}; only a probe's or a training's result opens here")
    if run.kind == "train":
        return run
    if st.session_state.get("run_taken_up") == id_:
        return run
    asked = run.conditions
    if st.session_state.get("model") != asked["model"]:
        st.query_params["model"] = asked["model"]
        st.rerun()
    st.session_state["run_taken_up"] = id_
    probe = get("probe", asked["method"])
    cell = st.query_params.get("cell")
    fill(probe, Prompt(**asked["prompt"]), dict(asked["settings"]))
    if cell:
        st.query_params["cell"] = cell
    st.query_params["probe"] = st.session_state["probe"] = probe.id
    if asked["reference"]:
        st.query_params["reference"] = asked["reference"]
    return run


def still(run: Run, question: Question) -> bool:
    """Whether the page still asks what the run answered; otherwise the run leaves the address."""
    asked = run.conditions
    same = (
        asked["model"] == ModelRef.parse(question.source).located
        and asked["method"] == question.method
        and Prompt(**asked["prompt"]) == question.prompt
        and asked["settings"] == question.values
        and asked["reference"] == question.reference
    )
    if not same:
        forget()
    return same


def reopened(run: Run) -> Result:
    """The run's result, after saying where it comes from."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(esc(f"Stored run {run.id}, computed {fmt.ago(run.ended_at)}"), width="stretch")
        st.button("Ask anew", icon=":material/refresh:", type="tertiary", on_click=forget, key="forget")
    return engine.result_of(run.id)


def training(run: Run) -> None:
    """How a training went, as a page of its own: what it found is asked for by the probe that uses it."""
    method = get("train", run.conditions["method"])
    heading(f"{method.title} trained on {run.conditions['model']}", about=About.of(method))
    result = reopened(run)
    st.caption(esc(f"Artifact {run.conditions['artifact']}"))
    result_panel(result, name=f"train_{method.id}", settings=None)


def forget() -> None:
    """Ask anew."""
    st.query_params.pop("run", None)
    st.session_state.pop("run_taken_up", None)
