"""Is there room for a recipe, on the disk and in memory? Asked before any work is done, where it can be predicted.

What cannot be predicted is not refused: the disk is asked again before writing (``core.whole_folder``), and an
allocation that fails ends the recipe with the amount it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from core.errors import CannotCompress, OutOfMemory, SlimscopeError, ran_out_of_memory
from core.free_memory import free_memory
from core.models.anatomy import Anatomy
from core.models.checkpoint import weight_files
from core.models.loaded import LoadedModel
from core.models.sizes import component_sizes
from core.prediction import SAMPLE_TOKENS, StoresBits, predicted_bytes
from core.recipe import Recipe
from core.registry import get
from core.whole_folder import refuse_full_disk

PREDICTED_WELL = 0.98
"""Sizes are predicted to 2 %: what may just fit is not refused."""
PROOF_BYTES = 400 << 20
"""The fresh process of the reload proof, beside its copy of the model: Python, torch and transformers."""


@dataclass(frozen=True)
class Needs:
    """What a recipe takes beside the opened model."""

    file_bytes: int | None
    """Of the weight file; None where a step does not say."""
    memory_bytes: int
    """At the larger of two peaks: a step at work, and the proof, whose process holds the model a second time."""


@dataclass(frozen=True)
class _Counted:
    """As much of a model card as bytes are predicted from."""

    anatomy: Anatomy
    dtype: str
    components: pd.DataFrame
    file_bytes: int


def needs(loaded: LoadedModel, recipe: Recipe) -> Needs:
    """Count what the steps say of themselves: their cost, and the 8-bit codes that quantizing steps keep."""
    on_disk = sum(file.stat().st_size for file in weight_files(loaded.folder))
    counted = _Counted(loaded.anatomy, loaded.dtype, component_sizes(loaded), on_disk)
    predicted = predicted_bytes(counted, recipe)
    parsed = [(get("compress", step.method), step.parsed()) for step in recipe.steps]
    work = 0
    for method, settings in parsed:
        if method.cost is None:
            continue
        window = min(getattr(settings, "sample_tokens", SAMPLE_TOKENS), loaded.anatomy.context_length)
        with suppress(SlimscopeError):  # the step will be refused, with the reason
            work = max(work, method.cost(loaded.anatomy, window, settings).extra_bytes)
    codes = 0
    if any(isinstance(settings, StoresBits) for _, settings in parsed):
        codes = sum(parameter.numel() for parameter in loaded.model.parameters())
    file_bytes = None if predicted is None else int(predicted)
    return Needs(file_bytes, codes + max(work, loaded.nbytes + PROOF_BYTES))


def refuse_without_room(loaded: LoadedModel, recipe: Recipe, folder: Path) -> Needs:
    """What the recipe needs; raises ``CannotCompress`` where the disk of ``folder`` has no room for it, ``OutOfMemory``
    where this machine has none."""
    found = needs(loaded, recipe)
    if found.file_bytes is not None:
        refuse_full_disk(folder, int(PREDICTED_WELL * found.file_bytes), refuse=CannotCompress)
    if free_memory() < found.memory_bytes and loaded.device == "cpu":
        raise OutOfMemory(_said(recipe, loaded, found, "not enough memory"))
    return found


@contextmanager
def amount_told(loaded: LoadedModel, recipe: Recipe, found: Needs) -> Iterator[None]:
    """Turn an allocator's refusal inside the block into ``OutOfMemory`` that names the amount needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(_said(recipe, loaded, found, "out of memory")) from error


def _said(recipe: Recipe, loaded: LoadedModel, found: Needs, what: str) -> str:
    return (
        f"{what} for {recipe.label()}: it needs about {_mb(found.memory_bytes)} beside the model's {_mb(loaded.nbytes)}, "
        f"and {_mb(free_memory())} are free; free memory, take fewer or shorter calibration samples, or choose a smaller "
        "model"
    )


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB"
