"""An opener for the inspector's child that fails on demand, in every way a real one can.

Named on the child's command line by the tests; the source says which fault: ``fault:segfault`` and so on.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from core.errors import AnatomyMismatch, CannotOpen
from core.types import ModelRef, Progress


class PrivateRefusal(CannotOpen):
    """A refusal whose type the client does not know."""


def open_with_faults(ref: ModelRef, progress: Progress) -> Any:
    fault = ref.source.removeprefix("fault:")
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "exit":
        os.write(2, b"the last thing said")
        os._exit(3)
    if fault == "memory":
        raise MemoryError
    if fault == "allocator":
        import torch

        torch.empty(2**52)
    if fault == "defect":
        raise ZeroDivisionError("one by nought")
    if fault == "refusal":
        raise AnatomyMismatch("no such module: model.layers.9")
    if fault == "private refusal":
        raise PrivateRefusal("not today")
    if fault == "hang":
        progress(1, 4, "hanging")
        time.sleep(600)
    raise AssertionError(f"unknown fault {fault}")
