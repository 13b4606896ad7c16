"""Tiny real tasks for the tests of the job engine, named to the worker by ``SLIMSCOPE_TASKS``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from core.errors import BadInput
from core.jobs.context import TaskContext


def count(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Count to ``n``, one file per step in scratch; a later attempt goes on where the last one was."""
    start = len(list(context.scratch.iterdir()))
    context.say(f"starting from {start}")
    for step in range(start, spec["n"]):
        time.sleep(spec.get("pause_s", 0.0))
        (context.scratch / f"{step}.done").write_text(str(step))
        context.progress(step + 1, spec["n"], f"step {step + 1}")
    return {"counted": spec["n"], "started_from": start, "pid": os.getpid()}


def deaf(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Start a grandchild, ignore SIGTERM in both, and never report: only SIGKILL of the group ends it."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    grandchild = subprocess.Popen([sys.executable, "-c", code])
    (context.scratch / "grandchild").write_text(str(grandchild.pid))
    time.sleep(600)
    return {}


def wrong(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fail as a user's mistake does, unless the file ``spec["mended"]`` exists."""
    if os.path.exists(spec.get("mended", "")):
        return {"mended": True}
    raise BadInput("group_size 7 does not divide 64; choose 32 or 64")


def broken(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Fail as a bug does."""
    return {"answer": 1 / spec["zero"]}


def frozen(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Stop the whole process at its first attempt, so that no sign of life comes any more."""
    import signal

    if context.job.attempt == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return {"attempt": context.job.attempt}


def leaver(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """End the process behind the worker's back."""
    context.say("last words")
    os._exit(spec["code"])


TASKS = {"count": count, "deaf": deaf, "wrong": wrong, "broken": broken, "frozen": frozen, "leaver": leaver}
