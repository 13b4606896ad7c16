"""The states of a job and which may follow which. Knows no database and no process.

::

    queued ──► running ──► succeeded
      │  ▲        │  ├───► failed ────► queued (retry by the user)
      │  │        │  ├───► cancelled ─► queued (retry by the user, or of the job it waited for)
      │  │        │  └───► paused ────► queued (resumed by the user) or cancelled
      │  └────────┴──────► lost ──────► queued (at once while attempts are left, else by the user)
      └──► cancelled or paused
"""

from __future__ import annotations

from typing import Final

from core.types import JobState

ACTIVE: Final[tuple[JobState, ...]] = ("queued", "running")
"""Something will still happen by itself."""

ENDED: Final[tuple[JobState, ...]] = ("succeeded", "failed", "cancelled", "lost")

RETRIABLE: Final[tuple[JobState, ...]] = ("failed", "cancelled", "lost")

FOLLOWERS: Final[dict[JobState, tuple[JobState, ...]]] = {
    "queued": ("running", "cancelled", "paused"),
    "running": ("succeeded", "failed", "cancelled", "lost", "paused"),
    "paused": ("queued", "cancelled"),
    "succeeded": (),
    "failed": ("queued",),
    "cancelled": ("queued",),
    "lost": ("queued",),
}

ENDING: Final[dict[JobState, str]] = {
    "succeeded": "has succeeded",
    "failed": "has failed",
    "cancelled": "was cancelled",
    "lost": "was lost",
}
"""How a job's end is told in a sentence."""
