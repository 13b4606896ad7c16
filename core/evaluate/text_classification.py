"""Text classification of a variant against its base: accuracy, macro-F1, KL, agreement and flips over labelled texts.

Knows logits and labels. How a text becomes tokens is ``core.models.classify``'s knowledge, which rows may be measured
on is ``core.corpus``'. Legend: N texts, C classes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.corpus.learned import never_learned
from core.corpus.rows import Rows
from core.errors import BadInput
from core.evaluate._class_scores import (
    Labels,
    by_class,
    class_metrics,
    flip,
    macro_f1_metrics,
    scores_of,
)
from core.evaluate._comparison import provenance
from core.evaluate._intervals import Bootstrap, Floats, Interval, wilson
from core.journal import Journal
from core.models.classify import class_logits, same_classes, token_ids
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Progress, Result, View, content_hash

if TYPE_CHECKING:
    from torch import Tensor

PART = 256
"""Texts between two entries of the journal; within them texts of similar length run together."""
MAX_ROWS = 2000
"""Texts shown in the table: those that moved most. All are kept in the frame ``examples``."""
EXCERPT = 200
FEWEST = 8
PROTOCOL_TEXT = (
    "Both models see the same labelled texts, each tokenized by its own tokenizer and cut at max_tokens; rows that either "
    "model learned from are no part. KL: KL(base || variant) of the class distribution, nats, mean over texts. Accuracy: "
    "share where the first class is the label. Macro-F1: mean over classes. Top-1 agreement: share where both models rank "
    "the same class first. Flips: share where exactly one of the two is right. Intervals, 95 %: Wilson's for shares; for "
    "the others texts resampled, both models on the same draws."
)
PROTOCOL = f"text classification, version 1 ({content_hash(PROTOCOL_TEXT)[:8]})"


class TextClassificationSettings(Settings):
    """How many texts, and how much of each."""

    max_texts: int = Field(10_000, ge=FEWEST, le=1_000_000, description="Texts used, the first of the rows")
    max_tokens: int = Field(256, ge=4, le=131_072, description="Tokens after which a text is cut")
    bootstrap_draws: int = Field(
        2000, ge=500, le=100_000, description="Resamplings of texts for the intervals"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the resampling")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


@method(
    "evaluate",
    title="Text classification",
    needs=("classifier", "text"),
    paper="Dutta et al., Accuracy is Not All You Need, arXiv:2407.09141",
)
def run(
    base: LoadedModel,
    variant: LoadedModel,
    rows: Rows,
    journal: Journal,
    progress: Progress,
    settings: TextClassificationSettings,
) -> Result:
    """How many labelled texts a variant names right, and how far its answers moved from its base's.

    Accuracy has Wilson's interval, macro-F1 a bootstrap's. KL(base‖variant) = Σ p ln(p/q) over the classes says how far
    the distribution moved; flips count texts where right turned wrong or wrong right. Rows that a model learned from are
    never measured on: of its training file the held-out ones are taken, any other file that has some is refused.

    Every example's answer is kept, so that two variants can be compared text by text (exact McNemar). Raises
    ``BadInput`` for labels that are no classes of the model, ``CannotMeasure`` for a model of other answers.
    """
    began = time.perf_counter()
    classes = same_classes(base, variant)
    rows = _measured(rows, (base, variant), settings)
    label_N = _labels(classes, rows, base)
    with fast_fp32(settings.fp32_path) as path:
        asked = [PROTOCOL, base.fingerprint, base.dtype, variant.fingerprint, variant.dtype, path.name]
        scores, cut = _score(base, variant, rows, label_N, journal, progress, asked, settings)
    draws = Bootstrap(len(label_N), draws=settings.bootstrap_draws, seed=settings.seed, unit="texts")
    frame = _frame(rows, classes, scores)
    moved = frame.sort_values("kl", ascending=False, kind="stable", ignore_index=True)
    same = variant is base
    return Result(
        frames={
            "moved": moved.head(MAX_ROWS),
            "classes": by_class(frame, counted="texts"),
            "examples": frame.assign(text=frame["text"].str.slice(0, EXCERPT)),
        },
        views=_VIEWS,
        metrics=(
            *class_metrics(scores, label_N, draws, example="text", share=_wilson, same=same),
            *macro_f1_metrics(scores, label_N, draws),
        ),
        notes=(*rows.notes, *_cut_note(cut, len(label_N), settings)),
        provenance=provenance(
            base,
            variant,
            rows,
            method="text_classification",
            protocol=PROTOCOL,
            settings=settings,
            began=began,
            conditions={
                "texts": len(label_N),
                "classes": len(classes),
                "texts_cut": cut,
                "fp32_path": path.name,
            },
        ),
    )


_VIEWS = (
    View(
        "table",
        x="text",
        y="kl",
        text="label",
        frame="moved",
        title="Texts whose prediction moved most",
        unit="nats",
        tooltip=("answer_base", "answer", "p_label_base", "p_label", "flip"),
    ),
    View(
        "bar",
        x="label",
        y="accuracy",
        frame="classes",
        title="Accuracy of the variant by class",
        unit="share",
        tooltip=("texts", "accuracy_base", "kl"),
    ),
)


def _measured(
    rows: Rows, models: tuple[LoadedModel, LoadedModel], settings: TextClassificationSettings
) -> Rows:
    """The first rows that neither model learned from."""
    kept = never_learned(rows, models)
    if len(kept) < FEWEST:
        raise BadInput(
            f"{kept.name} has {len(kept)} rows to measure on; at least {FEWEST} are needed, and a share of few has a wide "
            "interval: give more"
        )
    return kept if len(kept) <= settings.max_texts else kept.take(range(settings.max_texts), named=kept.name)


def _labels(classes: tuple[str, ...], rows: Rows, base: LoadedModel) -> Labels:
    """Each text's class number; a label may be a class's name or its number."""
    number = {**{str(n): n for n in range(len(classes))}, **{name: n for n, name in enumerate(classes)}}
    unknown = [label for label in rows.classes if label not in number]
    if unknown:
        known = ", ".join(classes[:5])
        raise BadInput(
            f"{rows.name}: {unknown[0]!r} is no class of {base.ref}, which knows {len(classes)}: {known}"
            f"{' …' if len(classes) > 5 else ''}; rename the labels, or leave those rows out"
        )
    return np.array([number[row.label] for row in rows.rows])


def _score(
    base: LoadedModel,
    variant: LoadedModel,
    rows: Rows,
    label_N: Labels,
    journal: Journal,
    progress: Progress,
    asked: list[Any],
    settings: TextClassificationSettings,
) -> tuple[pd.DataFrame, int]:
    """One row per text (``scores_of``), from the journal where it is there, and how many texts were cut."""
    found: dict[str, list[float]] = {}
    n, cut = len(label_N), 0
    for start in range(0, n, PART):
        stop = min(start + PART, n)
        progress(start, n, f"text {start + 1} of {n}")
        key = content_hash([asked, settings.max_tokens, list(rows.hashes[start:stop])])
        part = journal.get(key)
        if part is None:
            some = rows.rows[start:stop]
            texts = [row.text for row in some]
            seconds = [row.second for row in some] if any(row.second for row in some) else None
            log_p, lost = _log_p(base, texts, seconds, settings.max_tokens)
            log_q = log_p if variant is base else _log_p(variant, texts, seconds, settings.max_tokens)[0]
            part = {"cut": [lost], **scores_of(log_p, log_q, label_N[start:stop])}
            journal.put(key, part)
        cut += int(part["cut"][0])
        for name in part.keys() - {"cut"}:
            found.setdefault(name, []).extend(part[name])
    return pd.DataFrame(found), cut


def _log_p(
    loaded: LoadedModel, texts: list[str], seconds: list[str] | None, limit: int
) -> tuple[Tensor, int]:
    """Log probabilities [N, C] in float64 on the CPU, and how many texts were cut."""
    encoded, cut = token_ids(loaded, texts, seconds, max_tokens=limit)
    return class_logits(loaded, encoded).double().log_softmax(-1), cut


def _wilson(hits_N: Floats) -> Interval:
    return Interval(
        *wilson(int(hits_N.sum()), len(hits_N)), f"Wilson, {len(hits_N)} texts taken as independent"
    )


def _frame(rows: Rows, classes: tuple[str, ...], scores: pd.DataFrame) -> pd.DataFrame:
    """One row per text, in the rows' order; ``example`` names it in every run that measures it."""
    names = np.array(classes, dtype=object)
    label = np.array([row.label for row in rows.rows], dtype=object)
    as_class = {str(n): name for n, name in enumerate(classes) if str(n) not in classes}
    label = np.array([as_class.get(one, one) for one in label], dtype=object)
    answer_base, answer = names[scores["top_base"].astype(int)], names[scores["top"].astype(int)]
    was, is_ = answer_base == label, answer == label
    return pd.DataFrame(
        {
            "example": list(rows.hashes),
            "text": [row.given for row in rows.rows],
            "label": label,
            "answer_base": answer_base,
            "answer": answer,
            "right_base": was,
            "right": is_,
            "flip": flip(was, is_),
            **{name: scores[name] for name in ("p_label_base", "p_label", "kl")},
        }
    )


def _cut_note(cut: int, n: int, settings: TextClassificationSettings) -> tuple[str, ...]:
    if not cut:
        return ()
    return (
        f"{cut:,} of {n:,} texts are longer than {settings.max_tokens} tokens or the context, and were cut.",
    )
