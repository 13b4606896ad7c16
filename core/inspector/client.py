"""The inspector's client: what the UI process holds instead of torch.

One dispatcher thread owns the child process: it starts it, hands it one call at a time, and notices its death.
It is that thread, never a page's, that starts the child, because Linux ties a child's parent-death signal to the
*thread* that made it. A child that dies fails the call it was working on, with the cause; the next call gets
a fresh child.
"""

from __future__ import annotations

import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import Cancelled, OutOfMemory, SlimscopeError, WorkerDied
from core.inspector.protocol import Answer, Call, Failure, Report, Request, Token, stamp
from core.inspector.ticket import Ticket
from core.paths import data_dir
from core.types import ModelRef, Prompt, Result, canonical_json

if TYPE_CHECKING:
    from core.models.sizes import ModelCard

OPENER = "core.inspector.child:open_from_anywhere"
LAST_WORDS = 5
LOG_LIMIT_BYTES = 1_000_000


class Inspector:
    """A handle on the one child process that holds warm models; starts it lazily, and again after a crash.

    ``max_bytes`` limits what stays warm (default: 60 % of the memory free when the child starts); ``opener`` is
    ``module:function`` of what opens a ``ModelRef`` in the child; ``log_path`` gets the child's stderr. The last
    ``n_kept`` probe results are kept here and answered without asking the child.
    """

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        opener: str = OPENER,
        log_path: Path | None = None,
        n_kept: int = 64,
    ) -> None:
        self._command_tail = (opener, str(max_bytes or 0))
        self._log_path = log_path or data_dir() / "inspector.log"
        self._n_kept = n_kept
        self._kept: OrderedDict[Hashable, Result] = OrderedDict()
        self._seconds: dict[Hashable, float] = {}
        self._tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._child: _Child | None = None
        self._running: Ticket | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._dispatcher = threading.Thread(target=self._dispatch, name="inspector-dispatcher", daemon=True)
        self._dispatcher.start()

    # --- calls ---

    def submit(self, call: Call, *args: Any) -> Ticket:
        """Queue a call and return at once; ``args`` are those of the blocking methods below."""
        request = Request(call, args)
        ticket = Ticket(request, estimate_s=self._seconds.get(_cost_key(request)), cancel=self._cancel)
        with self._lock:
            kept = self._kept.get(_result_key(request)) if call == "probe" else None
            if self._closed:
                ticket.fail(Cancelled("the inspector is closed; open the page again"))
            elif kept is not None:
                ticket.answer(kept)
            else:
                self._tickets.put(ticket)
        return ticket

    def open(self, ref: ModelRef) -> ModelCard:
        """Open a model, wait, and return its description."""
        card: ModelCard = self.submit("open", ref).result()
        return card

    def probe(
        self, method_id: str, ref: ModelRef, prompt: Prompt, settings: dict[str, Any] | None = None
    ) -> Result:
        """Run a probe on a model, wait, and return its result; opens the model when it is not warm."""
        result: Result = self.submit("probe", method_id, ref, prompt, settings or {}).result()
        return result

    def tokenize(self, ref: ModelRef, text: str) -> tuple[Token, ...]:
        """Split a text into the model's tokens, wait, and return them."""
        tokens: tuple[Token, ...] = self.submit("tokenize", ref, text).result()
        return tokens

    def warm(self) -> list[str]:
        """Start the child if needed, wait, and return the sources of its warm models, oldest use first."""
        sources: list[str] = self.submit("ping").result()
        return sources

    @property
    def pid(self) -> int | None:
        """Process id of the living child, or None."""
        child = self._child
        return child.process.pid if child is not None and child.process.poll() is None else None

    def close(self) -> None:
        """Kill the child and fail everything that waits with ``Cancelled``; the client is of no use after it."""
        with self._lock:
            self._closed = True
            running, child = self._running, self._child
        self._tickets.put(None)
        if running is not None:
            running.fail(Cancelled("the inspector was closed while this call ran"))
        if child is not None:
            child.process.kill()
        self._dispatcher.join(timeout=10)

    # --- the dispatcher thread ---

    def _dispatch(self) -> None:
        while (ticket := self._tickets.get()) is not None:
            if not ticket.cancelled:
                self._serve(ticket)
        if self._child is not None:
            self._child.stop()
        while not self._tickets.empty():
            waiting = self._tickets.get()
            if waiting is not None:
                waiting.fail(Cancelled("the inspector was closed before this call ran"))

    def _serve(self, ticket: Ticket) -> None:
        """Hand one call to a living child and see it through to its answer, its error or the child's death."""
        with self._lock:
            if self._closed:
                ticket.fail(Cancelled("the inspector was closed before this call ran"))
                return
            if self._child is None or self._child.process.poll() is not None:
                if self._child is not None:
                    self._child.stop()
                self._child = _Child(self._command_tail, self._log_path)
            child, self._running = self._child, ticket
        ticket.start()
        started = time.monotonic()
        # Before the call: files that change while it runs must not name its result.
        key = _result_key(ticket.request) if ticket.request.call == "probe" else None
        try:
            value = child.ask(ticket)
        except SlimscopeError as error:
            ticket.fail(error)
        else:
            self._remember(ticket.request, key, value, seconds=time.monotonic() - started)
            ticket.answer(value)
        finally:
            with self._lock:
                self._running = None

    def _remember(self, request: Request, key: Hashable | None, value: Any, *, seconds: float) -> None:
        with self._lock:
            self._seconds[_cost_key(request)] = seconds
            if key is not None:
                self._kept[key] = value
                while len(self._kept) > self._n_kept:
                    self._kept.popitem(last=False)

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            ticket.fail(Cancelled(f"{ticket.request.call} was cancelled"))
            if self._running is ticket and self._child is not None:
                self._child.process.kill()


class _Child:
    """The child process, its pipe, and where in the log its last words begin. Used by the dispatcher alone."""

    def __init__(self, command_tail: tuple[str, str], log_path: Path) -> None:
        ours, theirs = socket.socketpair()
        if log_path.exists() and log_path.stat().st_size > LOG_LIMIT_BYTES:
            log_path.replace(log_path.with_suffix(".old.log"))
        self._log_path = log_path
        self._oom_kills = _kernel_oom_kills()
        with theirs, log_path.open("ab") as log:
            self._log_start = log.tell()
            descriptor = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "core.inspector.child", str(descriptor), *command_tail],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._pipe = Connection(ours.detach())

    def ask(self, ticket: Ticket) -> Any:
        """Send one request, pass its reports on, return its value; raises the call's error or ``WorkerDied``."""
        try:
            self._pipe.send(ticket.request)
            while isinstance(message := self._pipe.recv(), Report):
                ticket.report(message)
        except (EOFError, OSError):
            raise self._death(ticket.request) from None
        if isinstance(message, Failure):
            raise message.error()
        assert isinstance(message, Answer)
        return message.value

    def stop(self) -> None:
        """Kill the process if it lives, reap it, and close the pipe."""
        self.process.kill()
        self.process.wait()
        self._pipe.close()

    def _death(self, request: Request) -> WorkerDied:
        """Why the process is gone, as a sentence; also reaps it."""
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            words = _last_words(log.read().decode(errors="replace"))
        sentence = (
            f"the inspector died during {request.call} ({how}); last words: {words}; log: {self._log_path}"
        )
        if code == -signal.SIGKILL and _kernel_oom_kills() > self._oom_kills:
            return OutOfMemory(
                f"{sentence}; the system killed it for memory: use a shorter prompt or a smaller model"
            )
        return WorkerDied(f"{sentence}; the next call starts a fresh one")


def _last_words(log: str) -> str:
    """The end of a dead child's log; of a crash dump, what it was and where the running thread stood."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = next((n for n, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if fatal is None:
        words = lines[-LAST_WORDS:]
    else:
        running = next((n for n, line in enumerate(lines) if line.startswith("Current thread")), fatal)
        words = [lines[fatal], *lines[running + 1 : running + LAST_WORDS]]
    return " | ".join(words) or "it said nothing"


def _kernel_oom_kills() -> int:
    """How many processes Linux has killed for memory since boot; 0 where the kernel does not say."""
    counters = Path("/proc/vmstat")
    if not counters.exists():
        return 0
    for line in counters.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def _result_key(request: Request) -> Hashable:
    method_id, ref, prompt, settings, *reference = request.args
    others = tuple((other, stamp(other)) for other in reference if other is not None)
    return method_id, ref, stamp(ref), prompt, canonical_json(settings), others


def _cost_key(request: Request) -> Hashable:
    """Calls with the same key are expected to take the same time: same call, method and model."""
    if request.call == "probe":
        method_id, ref, *_ = request.args
        return request.call, method_id, ref
    return request.call, *request.args[:1]
