"""The bridge from pages to the engine, and the only caches of the UI process.

Pages call these functions and nothing else of core that touches a disk, a database or another process. Nothing
here imports torch: models live in the inspector's child process, long work in jobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from core.paths import catalog_url

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.jobs.queue import Queue

    from core.inspector import Inspector


# --- catalog ------------------------------------------------------------------------------------------


@st.cache_resource(max_entries=2, show_spinner=False)
def _writer(url: str) -> Catalog:
    from core.catalog.store import Catalog

    return Catalog(url)


@st.cache_resource(max_entries=2, show_spinner=False)
def _reader(url: str) -> Catalog:
    from core.catalog.store import Catalog

    _writer(url)  # creates or upgrades the schema, which a reader may not
    return Catalog(url, read_only=True)


def catalog() -> Catalog:
    """The catalog, read-only: pages look, jobs write."""
    return _reader(catalog_url())


def writable_catalog() -> Catalog:
    """The catalog for the few commands of the page that write a row, such as hiding a variant."""
    return _writer(catalog_url())


def revision() -> int:
    """A number that changes with every write to the catalog; the key of everything cached from it."""
    number: int = catalog().revision()
    return number


@st.cache_data(max_entries=16, show_spinner=False)
def tradeoff_frame(base_id: str, revision: int) -> pd.DataFrame:
    """One row per variant of a base with its measurements, as of a revision of the catalog."""
    from core.catalog.queries import tradeoff_frame as query

    frame: pd.DataFrame = query(catalog(), base_id)
    return frame


@st.cache_resource(max_entries=2, show_spinner=False)
def _queue(url: str) -> Queue:
    from core.jobs.queue import Queue

    return Queue(_writer(url))


def queue() -> Queue:
    """The job queue: the page's way to start, cancel and retry work."""
    return _queue(catalog_url())


# --- models -------------------------------------------------------------------------------------------


@st.cache_resource(max_entries=1, show_spinner=False)
def inspector() -> Inspector:
    """The client of the process that holds warm models; a crash there costs an error card, not the page."""
    from core.inspector import Inspector

    return Inspector()
