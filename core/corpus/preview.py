"""What a source holds, before anything is trained on it: how many rows and tokens, how long, how balanced, how often the
same, what evaluation text it gives away, and what would be refused.

Nothing is refused here: what training would refuse is a flag, in the same words. Knows the tokenizer and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.corpus.encode import encode
from core.corpus.leakage import Leak, as_rows, duplicates, excerpt, leakage_refusal, leaks
from core.corpus.rows import Kind, Row, Rows, fold
from core.corpus.sources import AskedKind, open_rows
from core.corpus.splits import split
from core.errors import BadInput
from core.types import Documents, Metric, Provenance, Result, View

SAMPLE_ROWS, SAMPLE_BYTES = 2_000, 4_000_000
"""Of a larger source so much is tokenized, chosen by hash; tokens of the whole are estimated from it."""
BINS = 24
LONG_EXCERPT = 240
"""Characters of an example that are shown."""
WHOLE = 2**30
"""A window that no text is longer than."""


@dataclass(frozen=True)
class _Lengths:
    """Tokens of each sampled row, the longer text of a pair counting."""

    rows: tuple[int, ...]
    tokens: NDArray[np.int64]
    learned: NDArray[np.int64]
    scale: float
    """Bytes of all rows ÷ bytes of the sampled ones."""


def preview(
    source: str,
    tokenizer: Any | None = None,
    *,
    kind: AskedKind = "auto",
    window: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    against: Documents | Rows | None = None,
    examples: int = 8,
) -> Result:
    """Frames ``examples``, ``lengths`` (with a tokenizer), ``labels`` (of labelled rows), ``duplicates``, ``leaks``.

    ``against`` is what will be measured on. ``Result.flags`` are the refusals that training would meet. Raises
    ``BadInput`` only where the source gives no rows.
    """
    rows = open_rows(source, kind=kind)
    flags: list[str] = []
    sides = _sides(rows, held_out, seed, flags)
    lengths = None if tokenizer is None else _lengths(rows, tokenizer, flags)
    repeated = duplicates(rows)
    found = _leaks(rows, against, flags)
    frames = {
        "examples": _examples(rows, sides, lengths, window, examples),
        "duplicates": _duplicates(rows, repeated, examples),
        "leaks": _leak_frame(found, examples),
    }
    views = [View("table", x="row", frame="examples", title="Examples")]
    if lengths is not None:
        frames["lengths"] = _histogram(lengths, window)
        views.append(View("bar", x="tokens", y="rows", frame="lengths", title="Tokens of a row", unit="rows"))
        _too_long(rows, lengths, window, flags)
    if rows.kind == "labelled":
        frames["labels"] = _labels(rows, sides)
        views.append(
            View("bar", x="label", y="rows", frame="labels", title="Rows of each label", unit="rows")
        )
    return Result(
        frames=frames,
        views=tuple(views),
        metrics=tuple(_metrics(rows, sides, lengths, window, repeated, found)),
        provenance=Provenance(
            method="preview",
            settings={
                "source": source,
                "kind": rows.kind,
                "window": window,
                "held_out": held_out,
                "seed": seed,
            },
            inputs={"rows": rows.fingerprint},
        ),
        notes=(*rows.notes, *_sampled(rows, lengths)),
        flags=tuple(flags),
    )


def _sides(rows: Rows, held_out: float, seed: int, flags: list[str]) -> dict[str, str]:
    """Content hash → ``training`` or ``held out``; what is on neither side is left out."""
    try:
        train, held = split(rows, held_out=held_out, seed=seed)
    except BadInput as refusal:
        flags.append(str(refusal))
        return {}
    return {**dict.fromkeys(held.hashes, "held out"), **dict.fromkeys(train.hashes, "training")}


def _leaks(rows: Rows, against: Documents | Rows | None, flags: list[str]) -> list[Leak]:
    if against is None:
        return []
    measured = as_rows(against) if isinstance(against, Documents) else against
    found = leaks(rows, measured)
    if found:
        flags.append(leakage_refusal(rows, measured, found))
    return found


def _lengths(rows: Rows, tokenizer: Any, flags: list[str]) -> _Lengths | None:
    """Lengths of the rows, or of a sample; None where they cannot be tokenized."""
    chosen: list[int] = []
    n_bytes = 0
    for index in sorted(range(len(rows)), key=lambda index: rows.hashes[index])[:SAMPLE_ROWS]:
        if chosen and n_bytes + rows.rows[index].n_bytes > SAMPLE_BYTES:
            break
        chosen.append(index)
        n_bytes += rows.rows[index].n_bytes
    try:
        encoded = encode(rows.take(chosen, named=rows.name), tokenizer, window=WHOLE)
    except BadInput as refusal:
        flags.append(str(refusal))
        return None
    starts = encoded.bounds_S1[:-1]
    each, learned = np.diff(encoded.bounds_S1), np.add.reduceat(encoded.learned_T.astype(np.int64), starts)
    if rows.kind == "pairs":
        each, learned = each.reshape(-1, 2).max(axis=1), learned[::2]
    return _Lengths(tuple(chosen), each, learned, rows.n_bytes / n_bytes)


def _sampled(rows: Rows, lengths: _Lengths | None) -> tuple[str, ...]:
    if lengths is None or len(lengths.rows) == len(rows):
        return ()
    return (
        f"Tokens are of {len(lengths.rows):,} of {len(rows):,} rows, chosen by hash; totals are estimated by bytes.",
    )


def _too_long(rows: Rows, lengths: _Lengths, window: int, flags: list[str]) -> None:
    """Documents go on in further texts; anything else longer than the window is refused."""
    over = int((lengths.tokens > window).sum())
    if over and rows.kind != "text":
        flags.append(
            f"{over:,} of {len(lengths.rows):,} rows are longer than the window of {window} tokens (the longest has "
            f"{int(lengths.tokens.max()):,}); set a longer window, or leave them out"
        )


def _histogram(lengths: _Lengths, window: int) -> pd.DataFrame:
    """Rows by tokens, in bins of one width; the last takes the longest hundredth together."""
    top = max(int(np.quantile(lengths.tokens, 0.99)), 1)
    edges = np.unique(np.linspace(0, top + 1, BINS + 1).round().astype(np.int64))
    counts = np.histogram(np.minimum(lengths.tokens, top), edges)[0]
    frame = pd.DataFrame({"tokens": edges[:-1], "to": edges[1:] - 1, "rows": counts})
    frame.loc[frame.index[-1], "to"] = max(int(lengths.tokens.max()), top)
    return frame.assign(over_window=frame["to"] > window)


def _labels(rows: Rows, sides: dict[str, str]) -> pd.DataFrame:
    each = Counter((row.label, sides.get(hash_)) for row, hash_ in zip(rows.rows, rows.hashes, strict=True))
    counts = Counter(row.label for row in rows.rows)
    return pd.DataFrame(
        {
            "label": label,
            "rows": counts[label],
            "share": counts[label] / len(rows),
            "training": each[label, "training"],
            "held_out": each[label, "held out"],
        }
        for label in rows.classes
    )


def _duplicates(rows: Rows, repeated: dict[str, list[int]], examples: int) -> pd.DataFrame:
    """The rows that are there most often; ``answers``: how many different labels, scores or answers they have."""
    columns = ["text", "copies", "answers", "rows"]
    shown = list(repeated.values())[:examples]
    return pd.DataFrame(
        [
            (
                excerpt(rows.rows[same[0]].given),
                len(same),
                len({_answer(rows.rows[index]) for index in same}),
                ", ".join(str(index + 1) for index in same[:5]),
            )
            for same in shown
        ],
        columns=columns,
    )


def _answer(row: Row) -> tuple[str, float, str]:
    said = "\n".join(turn.content for turn in row.messages if turn.role == "assistant")
    return row.label, row.score, fold(said)


def _leak_frame(found: Sequence[Leak], examples: int) -> pd.DataFrame:
    columns = ["text", "measured_row", "training_row", "whole"]
    return pd.DataFrame(
        [(leak.excerpt, leak.row + 1, leak.train_row + 1, leak.whole) for leak in found[:examples]],
        columns=columns,
    )


def _examples(
    rows: Rows, sides: dict[str, str], lengths: _Lengths | None, window: int, examples: int
) -> pd.DataFrame:
    """The first rows by hash: what is given, what is to be said, and how much of it is tokens."""
    if lengths is None:
        chosen = sorted(range(len(rows)), key=lambda index: rows.hashes[index])[:examples]
    else:
        chosen = list(lengths.rows[:examples])
    frame = pd.DataFrame(
        {
            "row": index + 1,
            "side": sides.get(rows.hashes[index], ""),
            "text": excerpt(rows.rows[index].given, LONG_EXCERPT),
            "answer": excerpt(_shown_answer(rows.rows[index], rows.kind), LONG_EXCERPT),
        }
        for index in chosen
    )
    if lengths is None:
        return frame
    tokens = lengths.tokens[:examples]
    return frame.assign(tokens=tokens, learned=lengths.learned[:examples], over_window=tokens > window)


def _shown_answer(row: Row, kind: Kind) -> str:
    if kind == "pairs":
        return f"{row.second} ({row.score:g})"
    return row.label or next((turn.content for turn in row.messages if turn.role == "assistant"), "")


def _metrics(
    rows: Rows,
    sides: dict[str, str],
    lengths: _Lengths | None,
    window: int,
    repeated: dict[str, list[int]],
    found: Sequence[Leak],
) -> Iterator[Metric]:
    yield Metric("rows", len(rows), "rows")
    yield Metric("bytes", rows.n_bytes, "bytes")
    held = sum(sides.get(hash_) == "held out" for hash_ in rows.hashes)
    yield Metric("held_out_rows", held, "rows")
    yield Metric("duplicate_rows", sum(len(same) - 1 for same in repeated.values()), "rows", "lower")
    yield Metric("leaking_rows", len(found), "rows", "lower")
    if rows.kind == "labelled":
        yield Metric("classes", len(rows.classes), "classes")
    if lengths is not None:
        n = len(lengths.rows)
        yield Metric("tokens", round(float(lengths.tokens.sum()) * lengths.scale), "tokens", n=n)
        if rows.kind in ("text", "instruction"):
            yield Metric("learned_tokens", round(float(lengths.learned.sum()) * lengths.scale), "tokens", n=n)
        yield Metric("longest_row_tokens", int(lengths.tokens.max()), "tokens", n=n)
        yield Metric("rows_over_window", float((lengths.tokens > window).mean()), "share of rows", n=n)
