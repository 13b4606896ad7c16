"""Making variants of tiny models: each test changes its own copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.compress._store import SavedFiles, save_variant
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Result, silent
from tests.tiny import tiny_folder


def own_model(family: str, folder: Path) -> LoadedModel:
    """A tiny model that the test may change."""
    return open_model(ModelRef(str(tiny_folder(family, folder / "base"))))


def apply(loaded: LoadedModel, method: str, **settings: Any) -> Result:
    """Run one compression in memory."""
    chosen = get("compress", method)
    result: Result = chosen.run(loaded, None, silent, chosen.parse(settings))
    return result


def save(loaded: LoadedModel, result: Result, folder: Path) -> SavedFiles:
    """Write what ``apply`` made."""
    return save_variant(loaded, folder, frame=result.frame, provenance={"recipe": {}})
