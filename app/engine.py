"""The bridge from pages to the engine, and the only caches of the UI process.

Pages call these functions and nothing else of core that touches a disk, a database or another process. Nothing
here imports torch: models live in the inspector's child process, long work in jobs.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core.catalog import queries, results
from core.catalog.store import Catalog, base_id
from core.errors import SlimscopeError
from core.inspector import Inspector, Ticket
from core.inspector.protocol import Stamp, stamp
from core.jobs.queue import Queue
from core.jobs.supervisor import ensure_supervisor
from core.models.demo import demo_files
from core.paths import catalog_url
from core.registry import Method, Settings
from core.types import ModelRef, Prompt, Result, Run, Variant, canonical_json
from core.verdict import verdicts as judge

# --- catalog ------------------------------------------------------------------------------------------


@st.cache_resource(max_entries=2, show_spinner=False)
def _writer(url: str) -> Catalog:
    return Catalog(url)


@st.cache_resource(max_entries=2, show_spinner=False)
def _reader(url: str) -> Catalog:
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
    return catalog().revision()


@st.cache_data(max_entries=16, show_spinner=False)
def tradeoff_frame(base_id: str, revision: int) -> pd.DataFrame:
    """One row per variant of a base with its measurements, as of a revision of the catalog."""
    return queries.tradeoff_frame(catalog(), base_id)


@st.cache_data(max_entries=16, show_spinner=False)
def verdicts(base_id: str, revision: int) -> dict[str, tuple[str, ...]]:
    """What must be said of the variants of a base, by variant, as of a revision of the catalog."""
    return judge(tradeoff_frame(base_id, revision))


def verdicts_of(base_ids: Sequence[str], revision: int) -> dict[str, tuple[str, ...]]:
    """The same for the variants of several bases together."""
    return {id_: said for base in base_ids for id_, said in verdicts(base, revision).items()}


@st.cache_data(max_entries=64, show_spinner=False)
def variant_of(variant_id: str) -> Variant:
    """A variant by its id; raises ``BadInput``."""
    return catalog().variant(variant_id)


@st.cache_data(max_entries=4, show_spinner=False)
def bases(revision: int) -> pd.DataFrame:
    """The bases that variants can be compared with, newest work first, as of a revision of the catalog."""
    return queries.bases(catalog())


@st.cache_data(max_entries=4, show_spinner=False)
def newest_models(revision: int, limit: int = 100) -> pd.DataFrame:
    """The latest bases and variants that a picker can offer, as of a revision of the catalog."""
    return queries.newest(catalog(), limit=limit)


def warm() -> None:
    """Read the newest base's trade-offs ahead, which for 100 000 runs takes most of a second."""
    known = bases(revision())
    if len(known):
        tradeoff_frame(known["id"].iloc[0], revision())


@st.cache_data(max_entries=64, show_spinner=False)
def variant_detail(variant_id: str, revision: int) -> queries.VariantDetail:
    """Everything about one variant, as of a revision of the catalog."""
    return queries.variant_detail(catalog(), variant_id)


@st.cache_resource(max_entries=2, show_spinner=False)
def _queue(url: str) -> Queue:
    return Queue(_writer(url))


def queue() -> Queue:
    """The job queue: the page's way to start, cancel and retry work."""
    return _queue(catalog_url())


def start_work() -> None:
    """Make sure that a supervisor lives to run what was just queued; an idle one has ended itself."""
    ensure_supervisor(catalog_url())


# --- models -------------------------------------------------------------------------------------------


@st.cache_resource(max_entries=1, show_spinner=False)
def inspector() -> Inspector:
    """The client of the process that holds warm models; a crash there costs an error card, not the page."""
    return Inspector()


@st.cache_resource(max_entries=64, show_spinner=False)
def _open(source: str, files: Stamp) -> Ticket:
    return inspector().submit("open", ModelRef.parse(source))


@dataclass(frozen=True)
class Question:
    """One probe call, as every session that asks the same asks it."""

    source: str
    files: Stamp
    method: str
    prompt: Prompt
    settings: str
    """Canonical JSON."""
    reference: str | None = None
    """Source of the original that a comparing probe holds the model against."""

    @classmethod
    def of(
        cls, source: str, method: Method, prompt: Prompt, settings: Settings, reference: str | None = None
    ) -> Question:
        """The call that these would make."""
        values, files = canonical_json(settings.model_dump(mode="json")), stamp(ModelRef.parse(source))
        if reference is not None:
            files += stamp(ModelRef.parse(reference))
        return cls(source, files, method.id, prompt, values, reference)

    @property
    def values(self) -> dict[str, Any]:
        """The settings as plain data."""
        values: dict[str, Any] = json.loads(self.settings)
        return values


class _Tickets:
    """The tickets of the latest probe calls, shared by all sessions."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._tickets: OrderedDict[Question, Ticket] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, question: Question) -> Ticket | None:
        with self._lock:
            return self._tickets.get(question)

    def ask(self, question: Question) -> Ticket:
        with self._lock:
            if question not in self._tickets:
                ref, original = ModelRef.parse(question.source), question.reference
                self._tickets[question] = inspector().submit(
                    "probe",
                    question.method,
                    ref,
                    question.prompt,
                    question.values,
                    None if original is None else ModelRef.parse(original),
                )
                while len(self._tickets) > self._most:
                    self._tickets.popitem(last=False)
            return self._tickets[question]

    def forget(self, question: Question) -> None:
        with self._lock:
            self._tickets.pop(question, None)


@st.cache_resource(max_entries=1, show_spinner=False)
def _probes() -> _Tickets:
    return _Tickets()


@dataclass(frozen=True)
class Call:
    """A ticket that every session and rerun shares, and how to ask again after it failed."""

    ticket: Ticket
    again: Callable[[], None]
    expected_s: float | None = None
    """Seconds it is expected to take when it never ran before; None where nothing is known."""


def open_model(source: str) -> Call:
    """Open a model in the inspector, or find it open; its result is a ``ModelCard``. Raises ``BadInput`` or ``CannotOpen``."""
    arguments = source, stamp(ModelRef.parse(source))
    expected_s = _opening_seconds(source)  # first, because it refuses a demo that does not exist
    return Call(_open(*arguments), partial(_open.clear, *arguments), expected_s)


def probe(question: Question) -> Call:
    """Run a probe in the inspector; its result is a ``Result``."""
    return Call(_probes().ask(question), partial(_probes().forget, question))


def was_asked(question: Question) -> bool:
    """Whether the call was made already, so that asking again costs nothing."""
    return _probes().get(question) is not None


TOKENIZE_WAIT_S = 1.0


@st.cache_data(max_entries=256, show_spinner=False)
def _n_tokens(source: str, files: Stamp, text: str) -> int:
    return len(inspector().submit("tokenize", ModelRef.parse(source), text).result(timeout=TOKENIZE_WAIT_S))


def n_tokens(source: str, text: str) -> int:
    """How many tokens a text has; a guess (four characters each) while the inspector is busy."""
    try:
        return _n_tokens(source, stamp(ModelRef.parse(source)), text)
    except (TimeoutError, SlimscopeError):
        return max(1, len(text) // 4)


# --- stored runs --------------------------------------------------------------------------------------


@st.cache_data(max_entries=64, show_spinner=False)
def run_of(run_id: str) -> Run:
    """A run by its id; runs never change. Raises ``BadInput``."""
    return queries.run_of(catalog(), run_id)


@st.cache_data(max_entries=16, show_spinner=False)
def result_of(run_id: str) -> Result:
    """The whole result a probe's or a training's run kept. Raises ``BadInput``."""
    return results.result_of(catalog(), run_id)


@st.cache_data(max_entries=32, show_spinner=False)
def trained(base_id: str, revision: int) -> list[Run]:
    """The trainings on a base and its variants, newest first, as of a revision of the catalog."""
    return queries.trained(catalog(), base_id)


@st.cache_data(max_entries=32, show_spinner=False)
def relatives(base_id: str, revision: int) -> dict[str, str]:
    """Source → name of a base and everything made from it, as of a revision of the catalog."""
    return queries.relatives(catalog(), base_id)


def base_of(source: str, fingerprint: str) -> str:
    """The id of the base that a model is, or was made from; the model need not be in the catalog yet."""
    ref = ModelRef.parse(source)
    if ref.kind == "variant":
        return catalog().variant(ref.source.removeprefix("variant:")).base_id
    return base_id(fingerprint)


CONVERSION_S_PER_GB = 290.0
"""Seconds to convert a GGUF file, per GB of it: 27 s for the 98 MB of the demo on two cores."""
OPENING_S = 8.0
"""Seconds for a fresh inspector to start and open a small model from safetensors."""


def _opening_seconds(source: str) -> float:
    """How long opening a model is expected to take when it was never opened, from the size of its GGUF file."""
    ref = ModelRef.parse(source)
    path = (
        demo_files(ref.source.removeprefix("demo:")) if ref.kind == "demo" else Path(ref.source).expanduser()
    )
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return OPENING_S
    return OPENING_S + CONVERSION_S_PER_GB * path.stat().st_size / 1e9
