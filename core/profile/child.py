"""The measuring process: fresh, alone, and gone when its parent is.

Run as ``python -m core.profile.child`` with one JSON request on standard input: ``{"runtime": id, "folder": path,
"settings": {…}}``. Answers JSON lines on standard output: any number of ``{"progress": [done, total, message]}``,
then one ``{"measured": {…}}`` or ``{"error": [class, sentence]}``. Everything else that anybody prints goes to
standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from core.errors import OutOfMemory, SlimscopeError, ran_out_of_memory
from core.profile._measure import measure
from core.registry import get

REPORT_EVERY_S = 2.0
"""Rarely: whoever reads a report takes processor time from the measurement."""


def main() -> None:
    """Answer the one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        measured = _answer(request, answers)
    except (SlimscopeError, MemoryError, RuntimeError) as error:
        _write(answers, {"error": _explained(error)})
    else:
        _write(answers, {"measured": measured})


def _answer(request: dict[str, Any], answers: IO[str]) -> dict[str, Any]:
    method = get("profile", request["runtime"])
    settings = method.parse(request["settings"])
    runtime = importlib.import_module(method.run.__module__).create(settings)
    notify = _Reporter(answers, longest_s=settings.protocol().longest_s)  # type: ignore[attr-defined]
    measured = measure(runtime, Path(request["folder"]), settings, notify=notify)  # type: ignore[arg-type]
    return measured.model_dump(mode="json")


class _Reporter:
    """Passes messages on, at most one in ``REPORT_EVERY_S``; done and total are seconds."""

    def __init__(self, answers: IO[str], *, longest_s: float) -> None:
        self._answers = answers
        self._longest_s = longest_s
        self._start = time.perf_counter()
        self._last = -REPORT_EVERY_S

    def __call__(self, message: str) -> None:
        now = time.perf_counter() - self._start
        if now - self._last >= REPORT_EVERY_S:
            self._last = now
            _write(self._answers, {"progress": [min(now, self._longest_s), self._longest_s, message]})


def _explained(error: Exception) -> tuple[str, str]:
    """Class and sentence of an error the parent can raise again; anything unknown keeps its own traceback."""
    if isinstance(error, SlimscopeError):
        return type(error).__name__, str(error)
    if ran_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else "the allocator gave no detail"
        sentence = f"not enough memory to measure this model: {first}; take a smaller prompt, batch or dtype"
        return OutOfMemory.__name__, sentence
    raise error


def _write(answers: IO[str], line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def _die_with_parent() -> None:
    """The parent never writes again: its end of the pipe closes when it ends, however it ends."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
