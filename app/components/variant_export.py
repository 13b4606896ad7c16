"""Taking a variant elsewhere: a small form that queues an export, and the packages that are ready."""

from __future__ import annotations

from urllib.parse import quote

import streamlit as st

from app import engine, forms
from app import format as fmt
from app.text import esc
from core.catalog.queries import exports
from core.delivery import package_of
from core.jobs.plan import submit_export
from core.registry import methods
from core.types import Run, Variant


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
        if st.button("Export", type="primary", disabled=settings is None, key="export_go") and settings:
            values = settings.model_dump(mode="json")
            submit_export(engine.queue(), model=variant.source, method=chosen, settings=values)
            st.caption(
                "Queued: it appears here when it was checked in its runtime. Jobs shows how far it is."
            )
        for run in exports(engine.catalog(), variant.id):
            if "package" in run.conditions:
                _package(run)


def _package(run: Run) -> None:
    """One finished package: what it is, how far from the model, and the link that sends it from disk."""
    measured = {m.name: m.value for m in run.measurements}
    st.link_button(
        f"{run.conditions['format']}, {fmt.size(int(measured['exported_bytes']))}",
        f"/api/artifacts/{quote(package_of(run))}",
        icon=":material/download:",
        width="stretch",
    )
    st.caption(
        f"Largest output difference {fmt.number(measured['max_output_difference'])} in {esc(run.conditions['runtime'])}."
    )
