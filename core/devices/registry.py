"""Devices by name: what a model could run on, as far as anyone says, and how a device of one's own is reached.

A table that comes with Slimscope (``devices.yaml``: vendors' and others' figures, each with its source and how sure it
is) and the user's own file beside the catalog, laid over it. Knows no model and opens no connection; holds no secret: an
address is an alias of the user's own SSH configuration or the serial number that ``adb devices`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core import paths
from core.durable import whole_file
from core.errors import BadInput

# fmt: off
Kind = Literal[
    "microcontroller", "accelerator", "single-board", "jetson", "mini-pc", "phone", "laptop", "desktop",
    "graphics-card", "data-centre",
]
EngineClass = Literal[
    "sbc_cpu", "phone_cpu", "phone_npu", "laptop_npu", "apple_gpu", "unified_gpu", "jetson_gpu", "cuda_gddr", "cuda_hbm",
]
# fmt: on
"""What computes, as far as it tells how much of a bandwidth is reached; ``core.predict.classes`` has the numbers."""
Confidence = Literal["high", "medium", "low"]
Transport = Literal["none", "local", "ssh", "adb"]
ENGINE_CLASSES: tuple[EngineClass, ...] = get_args(EngineClass)
PUBLISHED = Path(__file__).with_name("devices.yaml")
GIB = 1 << 30
MODELS_SHARE = 0.9
"""Of the memory, for models, where the entry does not say: the system keeps the rest."""


@dataclass(frozen=True)
class Device:
    """One device in one power mode; rates are theoretical peaks, in bytes or operations per second."""

    slug: str
    name: str
    kind: Kind
    engines: tuple[EngineClass, ...]
    """What can run a model on it, the usual one first; empty where nothing can be predicted."""
    ram_bytes: int
    usable_bytes: int
    """Of it, for a model and all that running it takes."""
    bandwidth: float | None
    """Bytes per second of the memory that the engine reads; None where weights are not read from memory."""
    fp32: float | None
    """Dense peak, floating-point operations per second; None where it is not told. Also the two below."""
    fp16: float | None
    int8: float | None
    power_w: tuple[float, float] | None
    """From the usual to the most, in watts."""
    source: str
    """Where the figures come from."""
    confidence: Confidence
    """``high``: a vendor's figure or its arithmetic; ``medium``: derived or told by others; ``low``: a guess."""
    as_of: str
    """When the figures were looked up, as ``2026-11-22``."""
    transport: Transport = "none"
    address: str = ""
    """An alias of ``~/.ssh/config``, or a serial number of ``adb devices``."""
    python: str = ""
    """The device's own Python to use, e.g. of an environment with onnxruntime; empty: whatever is found there."""
    power_mode: str = ""
    """A part of what the device is: other modes are other devices."""
    note: str = ""
    own: bool = False
    """Whether it comes from the user's file."""


class Entry(BaseModel):
    """One device as the YAML file has it; units as data sheets print them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    kind: Kind
    engines: tuple[EngineClass, ...] = ()
    ram_gib: float = Field(gt=0, le=65536)
    usable_gib: float | None = Field(None, gt=0)
    bandwidth_gb_s: float | None = Field(None, gt=0, le=100_000)
    fp32_tflops: float | None = Field(None, gt=0)
    fp16_tflops: float | None = Field(None, gt=0)
    int8_tops: float | None = Field(None, gt=0)
    power_w: tuple[float, float] | None = None
    source: str = Field(min_length=1)
    confidence: Confidence
    as_of: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    transport: Transport = "none"
    address: str = Field("", pattern=r"^([A-Za-z0-9_.:@%\[][A-Za-z0-9_.:@%\[\]-]*)?$")
    python: str = Field("", pattern=r"^[A-Za-z0-9_./~+-]*$")
    power_mode: str = ""
    note: str = ""

    def device(self, slug: str, *, own: bool) -> Device:
        """The entry in base units."""
        usable = MODELS_SHARE * self.ram_gib if self.usable_gib is None else self.usable_gib
        return Device(
            slug=slug,
            name=self.name,
            kind=self.kind,
            engines=self.engines,
            ram_bytes=round(self.ram_gib * GIB),
            usable_bytes=round(usable * GIB),
            bandwidth=_times(self.bandwidth_gb_s, 1e9),
            fp32=_times(self.fp32_tflops, 1e12),
            fp16=_times(self.fp16_tflops, 1e12),
            int8=_times(self.int8_tops, 1e12),
            power_w=self.power_w,
            source=self.source,
            confidence=self.confidence,
            as_of=self.as_of,
            transport=self.transport,
            address=self.address,
            python=self.python,
            power_mode=self.power_mode,
            note=self.note,
            own=own,
        )


def user_file() -> Path:
    """The user's own devices: ``devices.yaml`` beside the catalog (or in the data folder, for one on a server)."""
    scheme, _, place = paths.catalog_url().partition(":///")
    folder = Path(place).parent if scheme == "sqlite" and place else paths.data_dir()
    return folder / "devices.yaml"


def devices(user: Path | None = None) -> dict[str, Device]:
    """Every device by its slug: the published table with the user's file (default: ``user_file()``) laid over it.

    Raises ``BadInput`` for a file that cannot be read as devices, naming device and field.
    """
    path = user_file() if user is None else user
    return {**published(), **(parsed(path.read_text(encoding="utf-8")) if path.is_file() else {})}


def device(slug: str, user: Path | None = None) -> Device:
    """One device; raises ``BadInput`` that lists close names."""
    import difflib

    known = devices(user)
    if slug in known:
        return known[slug]
    close = difflib.get_close_matches(slug, known, n=3, cutoff=0.4)
    hint = f"close ones are {', '.join(close)}" if close else "`slimscope predict --list` lists them all"
    raise BadInput(f"no device is called {slug!r}; {hint}")


def parsed(text: str) -> dict[str, Device]:
    """The devices of a user's file.

    An entry with ``like: SLUG`` starts from that published device, and so does one of the same slug: it says only what is
    different. Raises ``BadInput``.
    """
    own: dict[str, Device] = {}
    for slug, fields in _mapping(text).items():
        told = dict(fields)
        like = told.pop("like", slug if slug in _published_fields() else None)
        if like is not None and like not in _published_fields():
            raise BadInput(f"device {slug}: like: {like!r} is not a published device; leave the line out")
        own[slug] = _entry(slug, {**_published_fields().get(like, {}), **told}).device(slug, own=True)
        if own[slug].transport in ("ssh", "adb") and not own[slug].address:
            raise BadInput(f"device {slug}: transport {own[slug].transport} needs an address: {_ADDRESSES}")
    return own


def write_user_file(text: str, user: Path | None = None) -> dict[str, Device]:
    """Keep a user's file, whole or not at all; returns its devices. Raises ``BadInput`` before anything is written."""
    found = parsed(text)
    path = user_file() if user is None else user
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return found


@cache
def published() -> dict[str, Device]:
    """The devices that come with Slimscope."""
    return {slug: _entry(slug, told).device(slug, own=False) for slug, told in _published_fields().items()}


@cache
def _published_fields() -> dict[str, dict[str, Any]]:
    return _mapping(PUBLISHED.read_text(encoding="utf-8"))


_ADDRESSES = "an alias of ~/.ssh/config, or a serial number of `adb devices`"


def _mapping(text: str) -> dict[str, dict[str, Any]]:
    """Slug → fields, as written; raises ``BadInput``."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise BadInput(f"the devices are not YAML: {said}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(told, dict) for told in document.values()):
        raise BadInput("the devices must be `name:` lines, each with its fields indented below it")
    return {str(slug): told for slug, told in document.items()}


def _entry(slug: str, told: dict[str, Any]) -> Entry:
    try:
        return Entry.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"device {slug}: {field}: {first['msg'].lower()}") from error


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
