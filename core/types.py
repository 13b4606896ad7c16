"""The frozen records that cross boundaries in Slimscope; nothing else does.

They carry data and know nothing: no torch, no database, no drawing. Tensors stay inside the process
that owns the model; what leaves it is one of these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

from core.errors import BadInput

Dtype = Literal["float32", "bfloat16", "float16", "stored"]
SourceKind = Literal["demo", "variant", "gguf", "folder", "hub"]
Better = Literal["lower", "higher", "neither"]
JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled", "lost"]
RunKind = Literal["compress", "proof", "evaluate", "profile", "probe", "train", "export", "race", "import"]
RunStatus = Literal["valid", "flagged"]
Family = Literal["decoder", "encoder", "vision", "classifier"]
"""What a model answers with: the next token; vectors or masked tokens; classes of pictures; classes of texts."""


class Progress(Protocol):
    """Told how far a long piece of work is; may raise ``Cancelled``, which is how a job is stopped gently."""

    def __call__(self, done: float, total: float, message: str) -> None:
        """Report ``done`` of ``total`` (any unit) and what is being done now."""


def silent(done: float, total: float, message: str) -> None:
    """A ``Progress`` that tells nobody."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """A ``Progress`` for one stage of a longer piece of work: its 0–100 % is ``start``–``end`` of the whole."""

    def report(done: float, total: float, message: str) -> None:
        share = done / total if total else 0.0
        progress(start + (end - start) * share, 1.0, message)

    return report


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# --- models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRef:
    """Where a model comes from and how to hold it.

    ``source`` is what the user types: ``demo:smollm2``, ``variant:ID``, a folder, a ``.gguf`` file, or a
    hub id. ``dtype`` ``"stored"`` keeps what the file says.
    """

    source: str
    revision: str | None = None
    dtype: Dtype = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, text: str, *, dtype: Dtype = "float32", device: str = "cpu") -> ModelRef:
        """Read the model syntax of page and CLI; a hub id may end in ``@revision``. Raises ``BadInput``."""
        text = text.strip()
        if not text or "\x00" in text:
            raise BadInput(
                "no model was named; give demo:smollm2, variant:ID, a folder, a .gguf file or a hub id like org/name"
            )
        if text.startswith(("demo:", "variant:")) or looks_local(text):
            return cls(text, None, dtype, device)
        source, _, revision = text.partition("@")
        return cls(source, revision or None, dtype, device)

    @property
    def kind(self) -> SourceKind:
        """Which of the five kinds of source this is."""
        if self.source.startswith("demo:"):
            return "demo"
        if self.source.startswith("variant:"):
            return "variant"
        if self.source.lower().endswith(".gguf"):
            return "gguf"
        return "folder" if looks_local(self.source) else "hub"

    @property
    def located(self) -> str:
        """The model syntax that means the same in any process: a local path made absolute."""
        if self.kind in ("folder", "gguf"):
            return str(Path(self.source).expanduser().resolve())
        return str(self)

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source


def looks_local(text: str) -> bool:
    """Whether a model source means this machine's disk: an explicit path, a GGUF file, or a folder that exists."""
    path = Path(text).expanduser()
    explicit = text.startswith(("/", "./", "../", "~")) or (os.sep in text and text.count("/") > 1)
    return explicit or text.lower().endswith(".gguf") or path.is_dir()


@dataclass(frozen=True)
class Prompt:
    """One input to a probe: text, for encoders optionally the second text of a pair, or an image."""

    text: str = ""
    second: str | None = None
    image: str | None = None
    """A vision model's input: path of an image file, or ``digits:N``, row N of scikit-learn's digits."""

    @property
    def fingerprint(self) -> str:
        """Content hash of the input; an image is named by the hash of its file."""
        if self.image is None:
            return content_hash([self.text, self.second])
        path = Path(self.image)
        name = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else self.image
        return content_hash([self.text, self.second, name])


@dataclass(frozen=True)
class Cost:
    """What a method is expected to take, told before it runs."""

    forwards: float
    """Forward passes over the prompt; a backward pass counts as two."""
    extra_bytes: int = 0
    """Peak memory beside the model."""


@dataclass(frozen=True)
class Documents:
    """Evaluation or calibration text: named, split into documents, hashed by content."""

    name: str
    split: Literal["evaluation", "calibration", "train"]
    texts: tuple[str, ...]
    licence: str = ""

    @property
    def fingerprint(self) -> str:
        """Content hash of all documents, in order."""
        return content_hash([self.split, *self.texts])

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return sum(len(text.encode()) for text in self.texts)


# --- results ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How one frame of a result wants to be drawn: a kind, and which column plays which role."""

    kind: Literal["heatmap", "line", "bar", "scatter", "tokens", "flow", "table", "image"]
    """``image`` lays a frame of patch weights (x, y in pixels) over ``Result.images[frame]``."""
    x: str
    y: str | None = None
    color: str | None = None
    text: str | None = None
    frame: str = "main"
    title: str = ""
    unit: str = ""
    midpoint: float | None = None
    log: bool = False
    nominal: bool = False
    """``color`` says which, not how much: an expert's number; a strip of tokens gives each its own hue."""
    tooltip: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this view needs in its frame."""
        roles = (self.x, self.y, self.color, self.text, *self.tooltip)
        return tuple(dict.fromkeys(role for role in roles if role))


@dataclass(frozen=True)
class Metric:
    """One number with its unit, its direction, how many samples it rests on, and its 95 % interval."""

    name: str
    value: float
    unit: str = ""
    better: Better = "neither"
    n: int | None = None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    """How the interval was made, e.g. ``paired bootstrap over 24 documents, 2000 draws``; empty if none."""


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from and how, so that it can be computed again."""

    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_fingerprint: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the inputs by role, e.g. ``{"prompt": …, "tokenizer": …}``."""
    dtype: str = ""
    device: str = ""
    attention_kernel: str = ""
    protocol: str = ""
    """Name, version and hash of the measuring protocol, where there is one."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Everything else the numbers depend on: threads, window, prompt length, environment hash …"""
    seconds: float = 0.0
    exactness_gap: float | None = None
    """How far an identity with a known answer is missed on this very run; 0 is exact, None is not checked."""
    exactness_check: str = ""


@dataclass(frozen=True)
class Result:
    """What every method returns: tidy frames, how to draw them, headline numbers, and where they come from."""

    frames: Mapping[str, pd.DataFrame]
    views: tuple[View, ...]
    metrics: tuple[Metric, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    notes: tuple[str, ...] = ()
    """Plain sentences a reader must know to read the numbers right."""
    flags: tuple[str, ...] = ()
    """Why the numbers must be read with care, e.g. ``contention``; a flagged run is kept and marked."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """Name of a frame → the PNG picture it is laid over."""

    def __post_init__(self) -> None:
        for view in self.views:
            missing = set(view.columns) - set(self.frames[view.frame].columns)
            assert not missing, f"view {view.title!r} needs columns {sorted(missing)} of frame {view.frame!r}"

    @property
    def frame(self) -> pd.DataFrame:
        """The first frame."""
        return next(iter(self.frames.values()))


# --- catalog ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A model in the catalog: a base, or made from its parents by a recipe."""

    id: str
    name: str
    source: str
    """How to open it: the base's model syntax, or ``variant:ID``."""
    base_id: str
    """The base all its quality numbers are compared with; its own id for a base."""
    recipe: str | None
    """Canonical JSON of the recipe; None for a base."""
    artifact: str | None
    """Hash of the stored files; None for a base, which stays where the user has it."""
    format: str
    fingerprint: str
    architecture: str
    family: Family
    parameters: int
    bytes: int
    """Bytes of all weight files."""
    bits_per_weight: float
    proven: bool
    parents: tuple[str, ...] = ()
    created_at: datetime | None = None


@dataclass(frozen=True)
class Measurement:
    """One stored number: a metric of a run with the conditions it was taken under."""

    name: str
    value: float
    unit: str
    better: Better
    n: int | None = None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One finished execution. Immutable: a repeat is a new run."""

    id: str
    kind: RunKind
    variant_id: str
    status: RunStatus
    flags: tuple[str, ...]
    """Why it is flagged: ``contention``, ``no_steady_state`` … empty when valid."""
    protocol: str
    conditions: Mapping[str, Any]
    environment: str
    """Hash of the software and hardware fingerprint."""
    started_at: datetime
    ended_at: datetime
    job_id: str | None = None
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class Job:
    """One entry of the queue."""

    id: str
    group_id: str
    kind: str
    spec: Mapping[str, Any]
    state: JobState
    attempt: int
    done: float
    total: float
    message: str
    error: str
    log_path: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    heartbeat_at: datetime | None
    pid: int | None
    exit_code: int | None
    cancel_requested: bool
    depends_on: str | None
    result: Mapping[str, Any]
    pause_requested: bool = False
