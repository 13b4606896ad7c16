"""What a training reads: rows of its source, split, tokenized for this model, and what must be told of them."""

from __future__ import annotations

from dataclasses import dataclass

from core.corpus.batches import TrainingData, order, tokenized
from core.corpus.fitting import fitted
from core.corpus.learned import remember
from core.corpus.rows import Rows
from core.corpus.sources import open_rows
from core.corpus.splits import split
from core.distill.settings import TrainingSettings
from core.errors import BadInput
from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class Sides:
    """Rows that are learned from and rows that are measured on, before any tokenizer."""

    source: Rows
    train: Rows
    held_out: Rows

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the rows."""
        return tuple(dict.fromkeys((*self.source.notes, *self.train.notes, *self.held_out.notes)))


@dataclass(frozen=True)
class Material:
    """Both sides as token ids."""

    training: TrainingData
    held_out: TrainingData

    def refuse_unread(self, teacher: LoadedModel) -> None:
        """Raise ``BadInput`` where a teacher cannot be given the rows as the student is: they were made for that one."""
        for data in (self.training, self.held_out):
            if fitted(data, teacher).by_mask != data.by_mask:
                raise BadInput(
                    f"{teacher.ref} must be told by a mask which texts share a row, and its student by positions, or the "
                    "other way round; choose packing=padded"
                )


BYTES_PER_TOKEN = 6
"""More than text has on average with any common tokenizer: so many rows are kept that max_tokens cannot use them up."""


def sides(settings: TrainingSettings) -> Sides:
    """Open and split the settings' source; raises ``BadInput`` for rows that cannot be learned from."""
    source = open_rows(settings.data)
    train, held_out = split(source, held_out=settings.held_out, seed=settings.seed)
    if source.kind in ("text", "instruction"):
        train = _enough(train, BYTES_PER_TOKEN * settings.max_tokens, settings.seed, "learn from")
        held_out = _enough(held_out, BYTES_PER_TOKEN * settings.held_out_tokens, settings.seed, "measure on")
    return Sides(source, train, held_out)


def _enough(rows: Rows, nbytes: int, seed: int, what: str) -> Rows:
    """As many rows as hold ``nbytes``, drawn by ``seed``; all where there are no more.

    What would never be read need be neither tokenized nor shown to a teacher.
    """
    drawn, held = [], 0
    for index in order(len(rows), 0, seed).tolist():
        drawn.append(index)
        held += rows.rows[index].n_bytes
        if held >= nbytes:
            break
    if len(drawn) == len(rows):
        return rows
    note = f"Of {len(rows):,} rows to {what} {len(drawn):,} were drawn: no more are needed."
    return rows.take(sorted(drawn), named=rows.name, notes=(note,))


def material(
    both: Sides, loaded: LoadedModel, settings: TrainingSettings, *, classes: tuple[str, ...] | None = None
) -> Material:
    """Both sides for this model, which will remember what it learned from. Raises ``BadInput`` where they do not fit it.

    ``classes`` are a classifier's, in the order of its answers; by default those of the training rows.
    """
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.ref} has no tokenizer, so it cannot learn from text; choose a text model")
    window = min(settings.window, loaded.anatomy.context_length or settings.window)
    labels = both.train.classes if classes is None else classes
    training, held_out = (
        fitted(
            tokenized(
                rows, loaded.tokenizer, window=window, packing=settings.packing, classes=labels
            ),
            loaded,
        )
        for rows in (both.train, both.held_out)
    )  # fmt: skip
    remember(loaded, settings.data, both.source, both.train)
    return Material(training, held_out)
