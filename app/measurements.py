"""What the Profile and Devices pages read: profiles, races and looks of a base, cells of a grid, roofs, shapes.

Belongs to ``app.engine``, whose caches it uses: everything is as of a revision of the catalog. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd
import streamlit as st

from app import engine
from core.catalog import queries
from core.predict import anchors, track_record
from core.predict.anchors import Observed
from core.predict.model import Shape
from core.predict.track_record import By
from core.profile import grid, offers
from core.profile.grid import Cell
from core.profile.offers import Offer
from core.profile.shapes import known_shape
from core.registry import get
from core.types import Run, Variant

SHOWN_VARIANTS = 200
"""Variants offered for measuring: the base, then the newest."""


@st.cache_data(max_entries=8, show_spinner=False)
def variants(base_id: str, revision: int) -> list[Variant]:
    """The base, then its newest visible variants."""
    known = engine.catalog().variants(base_id)
    own = [variant for variant in known if variant.id == base_id]
    made = [variant for variant in known if variant.id != base_id]
    return own + made[::-1][:SHOWN_VARIANTS]


@st.cache_data(max_entries=4, show_spinner=False)
def speed_runs(base_id: str, revision: int) -> dict[str, list[Run]]:
    """Variant → its profiles and races, newest first."""
    return queries.runs_of_base(engine.catalog(), base_id, ("profile", "race"))


@st.cache_data(max_entries=4, show_spinner=False)
def looks(base_id: str, revision: int) -> dict[str, list[Run]]:
    """Variant → the runs that kept a whole result, newest first; ``app.where_views.looks`` picks those of time."""
    return queries.runs_of_base(engine.catalog(), base_id, ("probe",))


@st.cache_data(max_entries=2, show_spinner=False)
def observed(revision: int) -> tuple[list[Observed], str]:
    """What own measurements say of devices, and why nothing is said; empty where something is.

    Only where every measured model is counted already: counting starts a process, which is a job's to do.
    """
    known = engine.catalog().variants()
    if len(known) > SHOWN_VARIANTS:
        return [], f"own measurements scale predictions in catalogs of up to {SHOWN_VARIANTS} models"
    measured = [v for v in known if any(run.kind == "profile" for run in engine.catalog().runs(v.id))]
    if any(known_shape(variant.fingerprint) is None for variant in measured):
        return [], "own measurements are not counted yet: Profile, Roofline counts them"
    return anchors.observed(engine.catalog()), "" if measured else "nothing was measured here yet"


@st.cache_data(max_entries=2, show_spinner=False)
def held_out(by: By) -> pd.DataFrame:
    """Every published rate beside what would have been said without its device, or its chip."""
    return track_record.track_record(by=by)


@st.cache_data(max_entries=128, show_spinner=False)
def frame_of(run_id: str, name: str) -> pd.DataFrame:
    """A frame that a run kept; runs never change. Raises ``BadInput``, ``CatalogError``."""
    return engine.catalog().frame(run_id, name)


@st.cache_data(max_entries=32, show_spinner=False)
def cells(
    chosen: tuple[str, ...],
    runtimes: tuple[str, ...],
    axes: Mapping[str, tuple[str, ...]],
    others: Mapping[str, tuple[str, ...]],
    revision: int,
) -> list[Cell]:
    """The grid of these variants, runtimes and values, each runtime with the forms of weights it has; raises ``BadInput``."""
    found: list[Cell] = []
    for runtime in runtimes:
        own = {name: values for name, values in others.items() if name != "weights"}
        if kept := tuple(form for form in others.get("weights", ()) if form in forms_of(runtime)):
            own["weights"] = kept
        found += grid.cells(
            engine.catalog(),
            chosen,
            (runtime,),
            threads=axes.get("threads", ()),
            batches=axes.get("batch", ()),
            prompts=axes.get("prompt_tokens", ()),
            depths=axes.get("depth", ()),
            others=own,
        )
    return found


def forms_of(runtime: str) -> tuple[str, ...]:
    """The forms in which a runtime can keep the weights; none where it has no choice."""
    field = get("profile", runtime).settings.model_fields.get("weights")
    return () if field is None else tuple(str(value) for value in get_args(field.annotation))


@st.cache_resource(max_entries=1, show_spinner=False)
def runtimes() -> tuple[Offer, ...]:
    """Every runtime and whether it can run here."""
    return offers.offers()


def shapes(known: Sequence[Variant]) -> dict[str, Shape]:
    """The shapes that were counted already, by fingerprint."""
    found: dict[str, Any] = {variant.fingerprint: known_shape(variant.fingerprint) for variant in known}
    return {mark: shape for mark, shape in found.items() if shape is not None}
