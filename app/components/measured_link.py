"""From a finished job that measured something to the part of the Profile page that shows it."""

from __future__ import annotations

import streamlit as st

from app import engine
from core.types import Job

PARTS = {"race": ("race", "race"), "where": ("where", "look"), "machine": ("roofline", "")}
"""Kind of job → the part of the page, and the name of its run in the address."""


def measured_link(job: Job) -> None:
    """Draw the link of a job of one of ``PARTS`` that succeeded."""
    part, name = PARTS[job.kind]
    query = {"part": part} | ({name: str(job.result["run"])} if name else {})
    variant = job.result.get("variant") or str(job.spec["model"]).removeprefix("variant:")
    query["base"] = engine.variant_of(str(variant)).base_id
    st.page_link("../pages/profile.py", label="Open the result", icon=":material/speed:", query_params=query)
