"""A fresh process that does one piece of work: alone, and gone when its parent is.

Run as ``python -m core.profile.child`` with one JSON request on standard input: ``{"module": name, …}``, whose
``answer(request, progress)`` does the work. Answers JSON lines on standard output: any number of
``{"progress": [done, total, message]}``, then one ``{"answer": …}`` or ``{"error": [class, sentence]}``.
Everything else that anybody prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import IO, Any

from core.errors import OutOfMemory, SlimscopeError, ran_out_of_memory

REPORT_EVERY_S = 2.0
"""Rarely: whoever reads a report takes processor time from the measurement."""


def main() -> None:
    """Answer the one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        answer = importlib.import_module(request["module"]).answer(request, _Reporter(answers))
    except (SlimscopeError, MemoryError, RuntimeError) as error:
        write(answers, {"error": explained(error)})
    else:
        write(answers, {"answer": answer})


class _Reporter:
    """A ``Progress`` that writes lines, at most one in ``REPORT_EVERY_S``."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._last = -REPORT_EVERY_S

    def __call__(self, done: float, total: float, message: str) -> None:
        now = time.perf_counter()
        if now - self._last >= REPORT_EVERY_S:
            self._last = now
            write(self._answers, {"progress": [done, total, message]})


def explained(error: Exception) -> tuple[str, str]:
    """Class and sentence of an error the parent can raise again; anything unknown keeps its own traceback."""
    if isinstance(error, SlimscopeError):
        return type(error).__name__, str(error)
    if ran_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else "the allocator gave no detail"
        sentence = f"not enough memory to measure this model: {first}; take a smaller prompt, batch or dtype"
        return OutOfMemory.__name__, sentence
    raise error


def write(answers: IO[str], line: dict[str, Any]) -> None:
    """One JSON line, at once."""
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def die_with_parent() -> None:
    """The parent never writes again: its end of the pipe closes when it ends, however it ends."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
