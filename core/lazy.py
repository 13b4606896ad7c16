"""torch and transformers, imported at their first use instead of at import time.

The UI process reads every method's title, settings and bounds, and must stay light: no torch, 250 MB
at most (ARCHITECTURE, Processes). So core never says ``import torch`` at module level; it says
``from core.lazy import torch``. Annotations stay strings (``from __future__ import annotations``).
Python 3.15's lazy imports (PEP 810) do the same in the language: delete this file when they are the floor.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import transformers
else:

    class _LazyModule(ModuleType):
        """Stands in for a module and imports it when an attribute is first asked for."""

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self.__name__), attribute)

    torch = _LazyModule("torch")
    transformers = _LazyModule("transformers")

__all__ = ["torch", "transformers"]
