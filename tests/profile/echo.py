"""What a fresh process is asked in tests: how often it was asked, and who it is."""

from __future__ import annotations

import os
from typing import Any

from core.errors import BadInput
from core.types import Progress

_ASKED: list[str] = []


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The number of requests so far and the process's id; ``refuse`` is an error."""
    _ASKED.append(request["say"])
    if request["say"] == "refuse":
        raise BadInput("refused as asked")
    return {"asked": list(_ASKED), "pid": os.getpid()}
