"""Which runtimes there are, which of them can run here, and what would make the others run. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

from core.libraries import PINS
from core.profile.runtimes._loading import module_of
from core.registry import methods
from core.types import Family


@dataclass(frozen=True)
class Offer:
    """A runtime as a page or a terminal shows it."""

    id: str
    title: str
    available: bool
    missing: tuple[str, ...]
    """Libraries that are not installed."""
    install: str
    """The command that adds them; empty if none is missing."""
    reason: str
    """Why it cannot run here though no library is missing, in one sentence; else empty."""
    summary: str
    families: tuple[Family, ...]
    """The kinds of model it takes."""


def offers() -> tuple[Offer, ...]:
    """Every runtime, plain torch first, then those that can run here."""
    found = [_offer(id_) for id_ in methods("profile")]
    return tuple(sorted(found, key=lambda o: (o.id != "torch_eager", not o.available, o.id)))


def _offer(id_: str) -> Offer:
    method, module = methods("profile")[id_], module_of(id_)
    missing = tuple(name for name in module.LIBRARIES if not _installed(name))
    reason = "" if missing else str(getattr(module, "unavailable", str)())
    taken = getattr(module, "FAMILIES", frozenset(get_args(Family)))
    return Offer(
        id=id_,
        title=method.title,
        available=not missing and not reason,
        missing=missing,
        install="pip install " + " ".join(f"{name}=={PINS[name]}" for name in missing) if missing else "",
        reason=reason,
        summary=method.summary,
        families=tuple(family for family in get_args(Family) if family in taken),
    )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
