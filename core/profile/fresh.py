"""Work in a fresh process: asked by one JSON line, answered by JSON lines, gone when its parent is.

The child leads its own process group: cancelling kills all of it. The parent sleeps on the child's pipe and wakes
at most every two seconds, so that it takes no processor time from what is measured, and a cancelled job ends even
while a large model loads. What the work is, it refuses to know: a module's ``answer(request, progress)``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from core import errors
from core.errors import OutOfMemory, SlimscopeError, WorkerDied
from core.lazy import plain_threads
from core.types import Progress

WAKE_S = 2.0
_LAST_WORDS = 3
_CHILD = "core.profile.child"


def ask(module: str, request: Mapping[str, Any], progress: Progress, *, threads: int, message: str) -> Any:
    """What ``module.answer(request, progress)`` returns (JSON) in a fresh process, which never outlives this call.

    ``threads`` is what its maths libraries are told to use. Raises the child's own ``SlimscopeError``, ``OutOfMemory``,
    ``WorkerDied``, and what ``progress`` raises.
    """
    with partner(module, progress, threads=threads) as child:
        return child.ask(request, message=message)


@contextmanager
def partner(module: str, progress: Progress, *, threads: int) -> Iterator[Partner]:
    """A fresh process that is asked one thing after another, sleeps in between, and is gone at the end."""
    with tempfile.TemporaryFile() as words:
        child = started([_CHILD], threads=threads, words=words)
        try:
            yield Partner(child, module, words, progress)
        finally:
            end(child)


class Partner:
    """The parent's side of one fresh process."""

    def __init__(
        self, child: subprocess.Popen[bytes], module: str, words: IO[bytes], progress: Progress
    ) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child, self._module, self._words, self._progress = child, module, words, progress
        self._stdin, self._stdout = child.stdin, child.stdout

    def ask(self, request: Mapping[str, Any], *, message: str, share: float = 0.0) -> Any:
        """What the module answers to one more request, ``share`` of all work being done; raises as the function ``ask`` does."""
        start = (share, 1.0, message)
        self._progress(*start)
        try:
            self._stdin.write(json.dumps({**request, "module": self._module}).encode() + b"\n")
            self._stdin.flush()  # and stays open: when it closes, the child knows that we are gone
        except BrokenPipeError:
            raise obituary(self._child.wait(), self._words) from None
        for line in lines(self._stdout, self._progress, start):
            if "answer" in line:
                return line["answer"]
            if "error" in line:
                raise same_error(*line["error"])
            self._progress(*line["progress"])
        raise obituary(self._child.wait(), self._words)


def started(command: list[str], *, threads: int, words: IO[bytes]) -> subprocess.Popen[bytes]:
    """A Python module as a process of its own group, with pipes, its threads set, and torch as its users have it."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        env=plain_threads(dict(os.environ)) | child_environment(threads),
        start_new_session=True,
    )


def child_environment(threads: int) -> dict[str, str]:
    """Variables that must be set before a process imports its maths libraries."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def lines(pipe: IO[bytes], progress: Progress, latest: tuple[float, float, str]) -> Iterator[dict[str, Any]]:
    """JSON lines until the pipe ends; asks ``progress`` while there are none, since it may raise ``Cancelled``."""
    buffer = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], WAKE_S)
        if not ready:
            progress(*latest)
            continue
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            return
        *whole, buffer = (buffer + chunk).split(b"\n")
        for text in whole:
            line = json.loads(text)
            latest = tuple(line.get("progress", latest))
            yield line


def same_error(name: str, sentence: str) -> SlimscopeError:
    """The error that a child named, to be raised again here."""
    kind = getattr(errors, name)
    assert issubclass(kind, SlimscopeError), name
    error: SlimscopeError = kind(sentence)
    return error


def obituary(code: int, words: IO[bytes]) -> WorkerDied:
    """Why a child ended without an answer: for memory, by a signal, or by an error of its own."""
    words.seek(0)
    last = " | ".join(words.read().decode(errors="replace").strip().splitlines()[-_LAST_WORDS:])
    if code == -signal.SIGKILL:
        return OutOfMemory(
            "the measuring process was killed, which is what the system does when memory runs out; "
            "free memory, or take a smaller prompt, batch or dtype"
        )
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerDied(
        f"the measuring process ended without a result ({cause}); its last words: {last or 'none'}"
    )


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's group, wait for it, and close the pipes."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    with child:
        pass
