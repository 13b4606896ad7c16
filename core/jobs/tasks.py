"""What a job can do: task functions by kind.

A task is ``task(spec, context) -> result``: ``spec`` and ``result`` are plain JSON; ``context`` is a
``core.jobs.context.TaskContext``.
"""

from __future__ import annotations

from core.jobs.context import Task

TASKS: dict[str, Task] = {}
