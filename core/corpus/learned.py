"""Rows and the models that learned from them: remembered after a training, refused in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from core.corpus.leakage import SHOWN, as_rows, excerpt
from core.corpus.rows import Rows
from core.errors import BadInput
from core.models.learned import Learned
from core.models.loaded import LoadedModel
from core.types import Documents

HEX = 16
"""Characters kept of a question's hash: two of a million different questions meet with a chance of 3e-8."""


def remember(loaded: LoadedModel, source: str, rows: Rows, train: Rows) -> None:
    """Note in the model that it learned from ``train``, which are some of ``rows``; it is saved with it.

    ``source`` is how ``open_rows`` was told of them.
    """
    found = Learned(rows.name, source, rows.fingerprint, tuple(sorted(set(_questions(train)))))
    if found not in loaded.learned:
        loaded.learned = (*loaded.learned, found)


def never_learned(rows: Rows, models: Sequence[LoadedModel]) -> Rows:
    """The rows that none of the models learned from.

    Of a file that one of them was trained on these are its held-out rows. Any other file must have no row that was
    learned from: ``BadInput`` names examples.
    """
    learned = [one for loaded in models for one in loaded.learned]
    known = {question for one in learned for question in one.questions}
    questions = _questions(rows)
    met = [number for number, question in enumerate(questions) if question in known]
    if not met:
        return rows
    if rows.fingerprint not in {one.fingerprint for one in learned}:
        examples = "; ".join(f"row {n + 1} ({excerpt(rows.rows[n].given)!r})" for n in met[:SHOWN])
        names = ", ".join(dict.fromkeys(one.name for one in learned))
        raise BadInput(
            f"{len(met):,} of {len(rows):,} rows of {rows.name} were learned from (in {names}): {examples}; a number "
            "measured on them would mean nothing: leave them out, or give the training file itself, of which the held-out "
            "rows are taken"
        )
    if len(met) == len(rows):
        raise BadInput(f"every row of {rows.name} was learned from; give rows that were not")
    kept = sorted(set(range(len(rows))) - set(met))
    note = (
        f"The {len(kept):,} of {len(rows):,} rows of {rows.name} that were held out in training; on them the best weights "
        "of a training are chosen, which flatters it a little."
    )
    return rows.take(kept, named=f"{rows.name} (held out)", notes=(note,))


def refuse_learned(documents: Documents, learned: Sequence[Learned]) -> None:
    """Raise ``BadInput`` where a model learned from some of the documents that it is to be measured on."""
    known = {question for one in learned for question in one.questions}
    asked = _questions(as_rows(documents))
    met = [text for text, question in zip(documents.texts, asked, strict=True) if question in known]
    if met:
        names = ", ".join(dict.fromkeys(one.name for one in learned))
        raise BadInput(
            f"{len(met):,} of {len(documents.texts):,} documents of {documents.name} were learned from (in {names}), the "
            f"first begins {excerpt(met[0])!r}; a number measured on them would mean nothing: measure on "
            "text that was not trained on, such as pydoc"
        )


def _questions(rows: Rows) -> list[str]:
    return [key[:HEX] for key in rows.keys]
