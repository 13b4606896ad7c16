"""Which question a model answers: two models that answer the same one can be held against each other."""

from __future__ import annotations

from core.models.loaded import LoadedModel
from core.types import Family

Task = tuple[Family, tuple[str, ...]]
"""What a model answers with, and the classes it names."""


def task_of(loaded: LoadedModel) -> Task:
    """The family, and for a classifier its classes in the order of their numbers."""
    if loaded.family != "classifier":
        return loaded.family, ()
    labels = loaded.model.config.id2label
    return loaded.family, tuple(str(labels[number]) for number in sorted(labels))
