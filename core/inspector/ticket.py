"""A ticket: the caller's handle on one inspector call that is queued, running or done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core.errors import Cancelled, SlimscopeError
from core.inspector.protocol import Report, Request

State = Literal["queued", "running", "done"]


@dataclass(frozen=True)
class TicketProgress:
    """Where a call stands; what a page polls."""

    state: State
    done: float
    total: float
    message: str
    elapsed_s: float
    """Seconds since the call was submitted, waiting included."""
    estimate_s: float | None
    """Seconds the same call took the last time, or None when it never ran."""


class Ticket:
    """One call's handle. Thread-safe; results and errors are kept until the ticket is dropped."""

    def __init__(
        self, request: Request, *, estimate_s: float | None, cancel: Callable[[Ticket], None]
    ) -> None:
        self.request = request
        self._estimate_s = estimate_s
        self._cancel = cancel
        self._submitted = time.monotonic()
        self._ended: float | None = None
        self._report = Report(0, 0, "waiting for its turn")
        self._state: State = "queued"
        self._value: Any = None
        self._error: SlimscopeError | None = None
        self._finished = threading.Event()
        self._settle_lock = threading.Lock()

    @property
    def progress(self) -> TicketProgress:
        """Where the call stands now."""
        elapsed = (self._ended or time.monotonic()) - self._submitted
        report = self._report
        return TicketProgress(
            self._state, report.done, report.total, report.message, elapsed, self._estimate_s
        )

    @property
    def done(self) -> bool:
        """Whether ``result`` would answer at once."""
        return self._finished.is_set()

    @property
    def succeeded(self) -> bool:
        """Whether it was answered, and not by an error."""
        return self.done and self._error is None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer; raises the call's error, or ``TimeoutError`` after ``timeout`` seconds."""
        if not self._finished.wait(timeout):
            raise TimeoutError(
                f"{self.request.call} has not answered within {timeout} s; it is still running"
            )
        if self._error is not None:
            raise self._error
        return self._value

    def cancel(self) -> None:
        """Give the call up: a queued one is dropped, a running one is killed with its process."""
        self._cancel(self)

    # --- for the client only ---

    def start(self) -> None:
        """The child is about to get this call."""
        self._state, self._report = "running", Report(0, 0, "started")

    def report(self, report: Report) -> None:
        """The child told how far it is."""
        self._report = report

    def answer(self, value: Any) -> None:
        """The call succeeded. The first of ``answer`` and ``fail`` counts."""
        self._settle(value, None)

    def fail(self, error: SlimscopeError) -> None:
        """The call failed. The first of ``answer`` and ``fail`` counts."""
        self._settle(None, error)

    @property
    def cancelled(self) -> bool:
        """Whether the caller gave it up."""
        return isinstance(self._error, Cancelled)

    def _settle(self, value: Any, error: SlimscopeError | None) -> None:
        with self._settle_lock:
            if self._finished.is_set():
                return
            self._value, self._error = value, error
            self._ended, self._state = time.monotonic(), "done"
            self._finished.set()
