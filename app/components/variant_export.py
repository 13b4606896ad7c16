"""Taking a variant elsewhere: a small form that queues an export, and the packages that are ready."""

from __future__ import annotations

from urllib.parse import quote

import streamlit as st

from app import engine, forms
from app import format as fmt
from app.components.job_card import RECENT, live_jobs
from app.text import esc
from core.catalog.queries import exports
from core.delivery import package_of
from core.errors import SlimscopeError
from core.jobs.plan import submit_export
from core.jobs.states import ACTIVE
from core.registry import Settings, methods
from core.types import ModelRef, Run, Variant


def variant_export(variant: Variant) -> None:
    """Draw a popover: format, its settings, the button that queues the job, and links to finished packages."""
    with st.popover("Export", icon=":material/package_2:", type="tertiary", key="variant_export"):
        fitting = {
            id_: m
            for id_, m in methods("export").items()
            if "decoder" not in m.needs or variant.family == "decoder"
        }
        chosen = st.selectbox(
            "Format", list(fitting), format_func=lambda id_: fitting[id_].title, key="export_format"
        )
        method = fitting[chosen]
        st.caption(esc(method.summary))
        settings = forms.settings_form(method, prefix=f"export_{chosen}", columns=1, bind=False)
        st.button(
            "Export",
            disabled=settings is None,
            key="export_go",
            on_click=_queue,
            args=(variant.source, chosen, settings),
        )
        if refusal := st.session_state.pop("export_refusal", None):
            st.markdown(f":red[{esc(refusal)}]")
        _under_way(variant.source)
        for run in exports(engine.catalog(), variant.id):
            if "package" in run.conditions:
                _package(run, variant)


def _queue(model: str, method: str, settings: Settings) -> None:
    try:
        submit_export(engine.queue(), model=model, method=method, settings=settings.model_dump(mode="json"))
        engine.start_work()
    except SlimscopeError as error:
        st.session_state["export_refusal"] = str(error)


def _under_way(model: str) -> None:
    """The exports of this variant that wait, run or went wrong; a package appears when it was checked in its runtime."""
    located = ModelRef.parse(model).located
    jobs = [
        job
        for job in engine.queue().jobs(RECENT)
        if job.kind == "export" and job.spec.get("model") == located
    ]
    active = [job for job in jobs if job.state in ACTIVE]
    shown = active or [job for job in jobs[:1] if job.state != "succeeded"]
    if shown:
        live_jobs(shown, prefix="export")


def _package(run: Run, variant: Variant) -> None:
    """One finished package: what it is, how far from the model, and the link that sends it from disk."""
    measured = {m.name: m.value for m in run.measurements}
    nbytes = int(measured["exported_bytes"])
    st.link_button(
        f"{run.conditions['format']}, {fmt.size(nbytes)}",
        f"/api/artifacts/{quote(package_of(run))}",
        icon=":material/download:",
        width="stretch",
    )
    larger = f"Larger than the variant's own {fmt.size(variant.bytes)}. " if nbytes > variant.bytes else ""
    st.caption(
        f"{larger}Outputs differ by {measured['relative_rms_difference']:.2%} (root mean square), at most by "
        f"{fmt.number(measured['max_output_difference'])}, in {esc(run.conditions['runtime'])}."
    )
