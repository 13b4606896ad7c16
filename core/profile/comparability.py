"""May two numbers be held against each other? A letter from A to E, and why it is not a better one.

A: the same session, in turn. B: the same machine, software and protocol on another occasion. C: the same model of device.
D: imported, published, or of another device. E: one of them was predicted. Only A gives verdicts: from one session to the
next the same program on the same machine settles elsewhere by more than most differences that one would like to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core.types import Run

Letter = Literal["A", "B", "C", "D", "E"]
IMPORTED = "imported"
"""What the protocol of a run begins with whose numbers somebody else measured."""
PREDICTED = "predicted"
"""What the protocol of a number begins with that nobody measured."""
MEANINGS: dict[Letter, str] = {
    "A": "same session, measured in turn",
    "B": "same machine, software and protocol, another session",
    "C": "same model of device",
    "D": "imported, or another device",
    "E": "predicted",
}


@dataclass(frozen=True)
class Badge:
    """How far two numbers may be compared."""

    letter: Letter
    why: str

    @property
    def gives_verdicts(self) -> bool:
        """Whether "faster" may be said at all."""
        return self.letter == "A"


def tier_of(a: Run | Mapping[str, Any], b: Run | Mapping[str, Any]) -> Badge:
    """The badge of a comparison of two runs, or of the conditions that their numbers were taken under.

    Conditions may say ``protocol``, ``protocol_hash``, ``session``, ``environment_hash``, ``environment`` and
    ``device_model``, as a profile's do; what is not said is not taken to be the same.
    """
    first, second = _conditions(a), _conditions(b)
    protocols = [str(side.get("protocol", "")) for side in (first, second)]
    if any(name.startswith(PREDICTED) for name in protocols):
        return Badge("E", "one of the two is a prediction; measure it")
    if any(name.startswith(IMPORTED) for name in protocols):
        return Badge("D", "one of the two was measured elsewhere, by a protocol that is not known in full")
    if _same(first, second, "session"):
        return Badge("A", MEANINGS["A"])
    device = [_device(side) for side in (first, second)]
    if device[0] is None or device[0] != device[1]:
        return Badge("D", "the two were measured on different devices")
    differs = [
        words
        for key, words in (
            ("environment_hash", "machine or software"),
            ("protocol_hash", "workload or protocol"),
        )
        if not _same(first, second, key)
    ]
    if differs:
        return Badge("C", f"the same model of device; {' and '.join(differs)} differ")
    return Badge("B", f"{MEANINGS['B']}; `slimscope ab` measures both in one")


def _conditions(side: Run | Mapping[str, Any]) -> Mapping[str, Any]:
    return (
        {**side.conditions, "protocol": side.protocol, "environment_hash": side.environment}
        if isinstance(side, Run)
        else side
    )


def _same(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> bool:
    return bool(first.get(key)) and first.get(key) == second.get(key)


def _device(side: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a shop would call it: a GPU's name where it ran there, else the processor's; None where that is not known."""
    if named := side.get("device_model"):
        return (str(named),)
    host = (side.get("environment") or {}).get("host", {})
    gpu = host.get("gpu") if str(side.get("device", "")).startswith("cuda") else None
    name = gpu or host.get("cpu")
    return (str(name), str(host.get("physical_cores"))) if name else None
