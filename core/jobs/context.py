"""What a task is given besides its spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.catalog.store import Catalog
from core.types import Job, Progress


@dataclass(frozen=True)
class TaskContext:
    """The worker's side of a job."""

    catalog: Catalog
    progress: Progress
    """Cheap to call often; raises ``Cancelled`` once the user asked to stop."""
    job: Job
    scratch: Path
    """A folder of this job on the artifacts' file system: kept between attempts (so a task can go on from what is
    there), removed when the job succeeds."""
    say: Callable[[str], None]
    """One line into the job's log."""


Task = Callable[[dict[str, Any], TaskContext], dict[str, Any]]
