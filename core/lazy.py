"""torch and transformers, imported at their first use instead of at import time.

The UI process reads every method's title, settings and bounds, and must stay light: no torch, 250 MB
at most (ARCHITECTURE, Processes). So core never says ``import torch`` at module level; it says
``from core.lazy import torch``. Annotations stay strings (``from __future__ import annotations``).
Python 3.15's lazy imports (PEP 810) do the same in the language: delete this file when they are the floor.

Since torch is always imported here, this is also where its threads are told to sleep while they wait for each
other. By default they spin, which wins microseconds on an idle machine and is a disaster on a busy one: with two
threads on two cores and one other busy process, a 64-token forward of SmolLM2 took 3.6 s spinning and 0.16 s asleep.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

WAIT_POLICY = "OMP_WAIT_POLICY"
WAITING = "SLIMSCOPE_WAITING"
"""Who chose ``OMP_WAIT_POLICY``: ``ours`` where we did, ``plain`` where it must stay what torch's users have."""


def plain_threads(environ: dict[str, str]) -> dict[str, str]:
    """The environment of a process that must run torch as a deployment would: without our choice of how threads wait."""
    kept = {k: v for k, v in environ.items() if k != WAIT_POLICY or environ.get(WAITING) != "ours"}
    return {**kept, WAITING: "plain"}


def _calm() -> None:
    """torchao, which transformers imports where it is installed, warns of parts it has for other machines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _wait_asleep() -> None:
    """OpenMP reads this once, when its library is loaded; what the user has set is left alone."""
    if WAIT_POLICY not in os.environ and WAITING not in os.environ:
        os.environ.update({WAIT_POLICY: "PASSIVE", WAITING: "ours"})


if TYPE_CHECKING:
    import torch
    import transformers
else:

    class _LazyModule(ModuleType):
        """Stands in for a module and imports it when an attribute is first asked for."""

        def __getattr__(self, attribute: str) -> Any:
            if "torch" not in sys.modules:
                _wait_asleep()
                _calm()
            return getattr(importlib.import_module(self.__name__), attribute)

    torch = _LazyModule("torch")
    transformers = _LazyModule("transformers")

__all__ = ["torch", "transformers"]
