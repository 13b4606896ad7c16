"""Published rates of language models, each with the bytes and multiplications behind it.

A row is one figure that somebody measured on one device and printed. Its byte count is ours, from the model's config and
the format's bits (``config.of_config``), so that the table tries the very formulas that predictions are made with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from core.devices import registry
from core.devices.registry import Device, EngineClass
from core.predict.config import Bits, of_config
from core.predict.model import Shape

TABLE = Path(registry.__file__).with_name("published.yaml")
KV_BYTES = 2
"""Of a number in the cache, where the row does not say."""
SAME_CHIP = (
    frozenset({"raspberry-pi-5-8gb", "raspberry-pi-5-16gb", "raspberry-pi-500-plus"}),
    frozenset({"jetson-orin-nano", "jetson-orin-nano-super"}),
    frozenset({"oneplus-12", "galaxy-s24", "snapdragon-8-gen-3"}),
)
"""Devices of the registry that are one chip with other memory, in other power modes or other phones."""


@dataclass(frozen=True)
class Row:
    """One published figure."""

    device: Device
    engine: EngineClass
    model: str
    format: str
    shape: Shape
    depth: int
    """Mean tokens in the cache while decoding, as told or assumed."""
    prompt: int
    decode: float
    """Tokens per second."""
    prefill: float | None
    """Tokens per second."""
    read_bytes: float
    """Per decoded token: weights and cache."""
    peer_bytes: float | None
    """The same, counted by hand."""
    source: str
    note: str

    @property
    def chip(self) -> str:
        """The device, or the name that it shares with others of one chip."""
        return next((min(chip) for chip in SAME_CHIP if self.device.slug in chip), self.device.slug)

    @property
    def bandwidth(self) -> float:
        """Bytes per second, theoretical; a row of a device without one could not be read."""
        assert self.device.bandwidth is not None
        return self.device.bandwidth

    @property
    def share(self) -> float:
        """Of the bandwidth, reached."""
        return self.decode * self.read_bytes / self.bandwidth

    @property
    def label(self) -> str:
        """Model and format."""
        return f"{self.model} {self.format}"


@cache
def rows() -> tuple[Row, ...]:
    """Every row of the table."""
    table = _table()
    return tuple(_row(table, told) for told in table["rows"])


def models() -> tuple[str, ...]:
    """Names of the models whose sizes the table has."""
    return tuple(_table()["models"])


def formats() -> dict[str, Bits]:
    """Bits per weight of each storage format that the table has."""
    return {name: Bits(**bits) for name, bits in _table()["formats"].items()}


def config_of(name: str) -> dict[str, Any]:
    """The sizes of one of ``models()``, as its ``config.json`` has them."""
    return dict(_table()["models"][name])


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def _row(table: dict[str, Any], told: dict[str, Any]) -> Row:
    source = table["sources"][told["source"]]
    depth = told.get("depth", source["depth"])
    shape = of_config(told["model"], config_of(told["model"]), formats()[told["format"]])
    kept = shape.kept_numbers(depth) * told.get("kv_bytes", KV_BYTES)
    read, peer = told.get("read_gb"), told.get("peer_gb")
    return Row(
        device=registry.published()[told["device"]],
        engine=told["engine"],
        model=told["model"],
        format=told["format"],
        shape=shape,
        depth=depth,
        prompt=source["prompt"],
        decode=told["decode"],
        prefill=told.get("prefill"),
        read_bytes=shape.weights_read() + kept if read is None else read * 1e9,
        peer_bytes=None if peer is None else peer * 1e9,
        source=source["title"],
        note=told.get("note", ""),
    )
