"""Asks a fresh process to measure an artifact, and waits without getting in its way.

The child leads its own process group: cancelling kills all of it. The parent sleeps on the child's pipe and wakes
at most every two seconds, so that a cancelled job ends even while a large model loads.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core import errors
from core.errors import BadInput, OutOfMemory, SlimscopeError, WorkerDied
from core.lazy import plain_threads
from core.profile.device_lock import exclusive
from core.profile.measured import Measured
from core.profile.runtimes._base import ProfileSettings
from core.profile.summary import summarise
from core.types import Progress, Result

WAKE_S = 2.0
_LAST_WORDS = 3
_CHILD = "core.profile.child"


def profile_artifact(folder: Path, runtime: str, progress: Progress, settings: ProfileSettings) -> Result:
    """Measure the artifact in a folder with a runtime, alone on its device.

    Raises ``BadInput`` (no such artifact, prompt longer than the context), ``CannotMeasure`` (machine busy and
    ``when_busy`` is ``refuse``, no such device), ``OutOfMemory``, ``WorkerDied``, and what ``progress`` raises.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no config.json; give the folder of a model saved by transformers")
    with exclusive(settings.device_name, progress):
        measured = measure_in_child(folder, runtime, progress, settings)
    return summarise(measured, runtime, settings)


def measure_in_child(folder: Path, runtime: str, progress: Progress, settings: ProfileSettings) -> Measured:
    """Run the measuring process to its end and return what it measured; it never outlives this call."""
    start = (0.0, settings.protocol().longest_s, "starting a fresh process")
    progress(*start)
    request = {"runtime": runtime, "folder": str(folder), "settings": settings.model_dump(mode="json")}
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            [sys.executable, "-m", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=plain_threads(dict(os.environ)) | child_environment(settings.n_threads),
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()  # and stays open: when it closes, the child knows that we are gone
            for line in _lines(child.stdout, progress, start):
                if "measured" in line:
                    return Measured.model_validate(line["measured"])
                if "error" in line:
                    raise _same_error(*line["error"])
                progress(*line["progress"])
            raise _obituary(child.wait(), words)
        finally:
            _end(child)


def child_environment(threads: int) -> dict[str, str]:
    """Variables that must be set before a process imports its maths libraries."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _lines(pipe: IO[bytes], progress: Progress, latest: tuple[float, float, str]) -> Iterator[dict[str, Any]]:
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


def _same_error(name: str, sentence: str) -> SlimscopeError:
    kind = getattr(errors, name)
    assert issubclass(kind, SlimscopeError), name
    error: SlimscopeError = kind(sentence)
    return error


def _obituary(code: int, words: IO[bytes]) -> WorkerDied:
    """Why the child ended without an answer: for memory, by a signal, or by an error of its own."""
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


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's group, wait for it, and close the pipes."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    with child:
        pass
