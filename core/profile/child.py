"""A fresh process that does the work it is asked for: alone, asleep in between, and gone when its parent is.

Run as ``python -m core.profile.child`` with JSON requests on standard input, one a line: ``{"module": name, …}``, whose
``answer(request, progress)`` does the work. Answers JSON lines on standard output, for each request any number of
``{"progress": [done, total, message]}``, then one ``{"answer": …}``, or ``{"error": [class, sentence]}``, which is the
last. Everything else that anybody prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import IO, Any

from core.errors import OutOfMemory, SlimscopeError, ran_out_of_memory

REPORT_EVERY_S = 2.0
"""Rarely: whoever reads a report takes processor time from the measurement."""


def main() -> None:
    """Answer requests until there is an error, or the parent is gone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    try:
        while True:
            request = requests.get()
            answer = importlib.import_module(request["module"]).answer(request, _Reporter(answers))
            write(answers, {"answer": answer})
    except (SlimscopeError, MemoryError, RuntimeError) as error:
        write(answers, {"error": explained(error)})


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


def listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on; the parent's end of the pipe closes when it ends, however it ends, and so do we."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
