"""What client and child say to each other over their pipe; known to both, and free of torch.

Messages are pickled, and only ever travel between our own two processes over an anonymous socket pair.
An error crosses as its type's name and its sentence, so that an exception that cannot be pickled cannot
break the pipe, and no traceback crosses at all: it stays in the child's log.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core import errors
from core.errors import SlimscopeError
from core.types import ModelRef

Call = Literal["ping", "open", "probe", "tokenize"]
MAX_RESULT_BYTES = 8_000_000


@dataclass(frozen=True)
class Request:
    """One call, with its arguments."""

    call: Call
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Report:
    """How far the running call is."""

    done: float
    total: float
    message: str


@dataclass(frozen=True)
class Answer:
    """The running call's result."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """The running call's error: the name of a type of ``core.errors``, and the sentence."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: SlimscopeError) -> Failure:
        """The error's nearest type that ``core.errors`` knows, and its sentence."""
        known = next(t for t in type(error).__mro__ if getattr(errors, t.__name__, None) is t)
        return cls(known.__name__, str(error))

    def error(self) -> SlimscopeError:
        """The error again, of the same type."""
        kind: Callable[[str], SlimscopeError] = getattr(errors, self.kind)
        return kind(self.message)


@dataclass(frozen=True)
class Token:
    """One token as a reader sees it."""

    id: int
    text: str


Stamp = tuple[tuple[str, int, int], ...]


def stamp(ref: ModelRef) -> Stamp:
    """Name, modification time and size of a local model's files: changed files are another model.

    Demos, variants and hub snapshots are found by content, so their stamp is empty.
    """
    if ref.kind not in ("folder", "gguf"):
        return ()
    path = Path(ref.source).expanduser()
    if path.is_file():
        return (_file_stamp(path.name, path.stat()),)
    if not path.is_dir():
        return ()
    with os.scandir(path) as entries:
        return tuple(sorted(_file_stamp(e.name, e.stat()) for e in entries if e.is_file()))


def _file_stamp(name: str, stat: os.stat_result) -> tuple[str, int, int]:
    return name, stat.st_mtime_ns, stat.st_size
