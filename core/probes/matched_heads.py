"""Matched heads: which head of a teacher each head of its student does the work of, and which have no heir.

Legend: A heads of the student, C of the teacher, both counted over all layers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.models.fp32_path import fast_fp32
from core.probes._alignment import GROUP, Alignment
from core.probes._clustered import described
from core.probes._head_twins import Habits, HeadPairs, look
from core.probes._provenance import provenance
from core.probes._twin_text import PROMPT, TwinText, TwinTextSettings, read_twin_text, twin_cost
from core.probes._twins import conditions
from core.registry import Example, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
ROWS = 200
"""Teacher heads that the table lists, those with the weakest heir first."""


class MatchedHeadsSettings(TwinTextSettings):
    """Text, and by what heads are matched."""

    by: Literal["pattern", "output"] = Field(
        "output",
        description="pattern: heads that look at the same positions; output: heads that write the same, up to rotation",
    )
    threshold: float = Field(
        0.5, ge=0.05, le=0.99, description="Similarity from which a head of the student counts as an heir"
    )


@method(
    "probe",
    title="Matched heads",
    needs=["text", "heads"],
    paper="https://arxiv.org/abs/2002.10957",
    answers="What did compression break?",
    examples=(
        Example("Heads that write the same", PROMPT),
        Example("Heads that look at the same places", PROMPT, {"by": "pattern"}),
    ),
    cost=twin_cost,
)
def matched_heads(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: MatchedHeadsSettings,
) -> Result:
    """Find for every head of a student the head of its teacher that is most like it, and the teacher's heads without heir.

    Pattern similarity is the cosine of two heads' attention weights over all pairs of positions, the first position left
    out, where many heads rest. Much of it can be position alone (two heads that look one token back are alike on any text),
    so the same cosine with the teacher on another document stands beside it. Output similarity is the debiased linear CKA
    of what both heads write to the residual stream, z · W_O: 1 up to rotation and scale, 0 for independent heads, whatever
    the widths.

    A head of the teacher has no heir where no head of the student reaches the threshold. Whether it is missed depends on
    how much it wrote: its share of the squared length of all that its layer's heads write is shown.
    """
    started = time.perf_counter()
    text = read_twin_text(loaded, reference, prompt, settings)
    pairs, own, other = HeadPairs(), Habits(), Habits()
    gaps = []
    groups = text.groups(GROUP)
    n_grams = sum(model.anatomy.n_layers * model.anatomy.n_heads for model in (loaded, reference))
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        eager_attention(loaded.model),
        eager_attention(reference.model),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        for number, group in enumerate(groups):
            progress(number, len(groups), f"reading {text.name} with both")
            ours = look(loaded, text, group, own, n_grams=n_grams)
            theirs = look(reference, text, group, other, n_grams=n_grams)
            pairs.add(ours, theirs)
            gaps += [ours.gap, theirs.gap]
    similar = {"pattern": Alignment.of(pairs.patterns), "output": Alignment.of(pairs.writes)}
    matched = _matches(similar, pairs, loaded.anatomy, reference.anatomy, settings)
    heirs = _heirs(similar[settings.by], other, loaded.anatomy, reference.anatomy, settings)
    return Result(
        frames={
            "main": matched,
            "teacher": heirs,
            "layers": _layer_pairs(similar[settings.by].value_ST, loaded.anatomy, reference.anatomy),
            "lost": heirs[heirs["heir"] == ""]
            .sort_values("write_share", ascending=False, ignore_index=True)
            .head(ROWS),
        },
        views=_views(settings),
        metrics=_metrics(matched, heirs, similar[settings.by], text, settings),
        provenance=provenance(
            loaded,
            prompt,
            method="matched_heads",
            settings=settings,
            started=started,
            conditions=conditions(text.conditions, reference, path),
            exactness_gap=max(gaps),
            exactness_check="largest |row sum − 1| of any attention pattern",
            attention_kernel="eager",
        ),
        notes=_notes(loaded, reference, text),
    )


def _matches(
    similar: dict[str, Alignment],
    pairs: HeadPairs,
    ours: Anatomy,
    theirs: Anatomy,
    settings: MatchedHeadsSettings,
) -> pd.DataFrame:
    """One row per head of the student: its most alike head of the teacher, by the chosen similarity."""
    value_AC = np.nan_to_num(similar[settings.by].value_ST, nan=-2)
    best_A = value_AC.argmax(1)
    rows = np.arange(len(best_A))
    layer, head = _places(ours)
    found = pd.DataFrame({"layer": layer, "head": head, "name": _names(ours)})
    found["match"] = np.array(_names(theirs))[best_A]
    found["similarity"] = value_AC[rows, best_A]
    found["similarity_ci95"] = similar[settings.by].half_ST[rows, best_A]
    for name, one in similar.items():
        found[f"{name}_similarity"] = one.value_ST[rows, best_A]
    if pairs.elsewhere:
        found["by_position"] = Alignment.of(pairs.elsewhere).value_ST[rows, best_A]
    else:
        found["by_position"] = np.nan
    found["matched_by_pattern"] = np.array(_names(theirs))[
        np.nan_to_num(similar["pattern"].value_ST, nan=-2).argmax(1)
    ]
    return found


def _heirs(
    similar: Alignment, habits: Habits, ours: Anatomy, theirs: Anatomy, settings: MatchedHeadsSettings
) -> pd.DataFrame:
    """One row per head of the teacher: the student's head most like it, and what the head does."""
    value_AC = np.nan_to_num(similar.value_ST, nan=-2)
    best_C = value_AC.argmax(0)
    columns = np.arange(len(best_C))
    layer, head = _places(theirs)
    value_C = value_AC[best_C, columns]
    squares_LH = np.asarray(habits.written).reshape(theirs.n_layers, theirs.n_heads)
    nearest = np.array(_names(ours))[best_C]
    return pd.DataFrame(
        {
            "layer": layer,
            "head": head,
            "name": _names(theirs),
            "nearest": nearest,
            "similarity": value_C,
            "similarity_ci95": similar.half_ST[best_C, columns],
            "heir": np.where(value_C >= settings.threshold, nearest, ""),
            "write_share": (squares_LH / squares_LH.sum(1, keepdims=True)).ravel(),
            "previous_token_share": np.asarray(habits.previous) / habits.n_documents,
            "first_token_share": np.asarray(habits.first) / habits.n_documents,
        }
    )


def _layer_pairs(value_AC: Floats, ours: Anatomy, theirs: Anatomy) -> pd.DataFrame:
    """Per pair of layers: how alike the student layer's heads are to their most alike in that teacher layer, on average."""
    cut = np.nan_to_num(value_AC, nan=0).reshape(ours.n_layers, ours.n_heads, theirs.n_layers, theirs.n_heads)
    mean_LM = cut.max(3).mean(1)
    left, right = np.indices(mean_LM.shape).reshape(2, -1)
    return pd.DataFrame({"layer": left, "teacher_layer": right, "similarity": mean_LM.ravel()})


def _places(anatomy: Anatomy) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    layer, head = np.indices((anatomy.n_layers, anatomy.n_heads)).reshape(2, -1)
    return layer, head


def _names(anatomy: Anatomy) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in zip(*_places(anatomy), strict=True)]


def _metrics(
    matched: pd.DataFrame,
    heirs: pd.DataFrame,
    similar: Alignment,
    text: TwinText,
    settings: MatchedHeadsSettings,
) -> tuple[Metric, ...]:
    last = matched.sort_values("similarity", kind="stable").iloc[0]
    half = float(last["similarity_ci95"])
    known = bool(np.isfinite(half))
    unit = "CKA" if settings.by == "output" else "cosine"
    how = described(len(text.ids), len(similar.own_GS), "jackknife")
    lost = heirs["heir"] == ""
    share = float((heirs["write_share"] * lost).sum() / heirs["layer"].nunique())
    value = float(last["similarity"])
    return (
        Metric("teacher_heads_without_heir", float(lost.sum()), "heads", "lower", len(heirs)),
        Metric("their_share_of_writes", share, "share", "lower", len(heirs)),
        Metric("mean_match", float(matched["similarity"].mean()), unit, "higher", len(matched)),
        Metric(
            "weakest_match", value, unit, "higher", text.n_tokens, value - half if known else None,
            value + half if known else None, how if known else "",
        ),
    )  # fmt: skip


def _notes(loaded: LoadedModel, reference: LoadedModel, text: TwinText) -> tuple[str, ...]:
    heads = [
        f"{m.ref} with {m.anatomy.n_layers} layers of {m.anatomy.n_heads} heads" for m in (loaded, reference)
    ]
    found = [
        f"Student: {heads[0]}. Teacher: {heads[1]}.",
        "Several heads of the student may match one head of the teacher; the best of many is chosen on the same tokens, "
        + "which flatters it.",
    ]
    if text.is_prompt:
        found.append("A prompt is one document: no interval, and nothing to set a positional match against.")
    return tuple(found)


def _views(settings: MatchedHeadsSettings) -> tuple[View, ...]:
    unit = "CKA" if settings.by == "output" else "cosine"
    match = (
        "match",
        "similarity_ci95",
        "pattern_similarity",
        "output_similarity",
        "by_position",
        "matched_by_pattern",
    )
    habit = ("nearest", "similarity_ci95", "write_share", "previous_token_share", "first_token_share")
    return (
        View(
            "heatmap",
            x="head",
            y="layer",
            color="similarity",
            frame="teacher",
            text="heir",
            title="Teacher's heads: how alike the nearest head of the student is, and which is its heir",
            unit=unit,
            tooltip=("name", *habit),
        ),
        View(
            "table",
            x="name",
            y="similarity",
            frame="lost",
            title="Teacher's heads without an heir, those that write most first",
            tooltip=habit,
        ),
        View(
            "heatmap",
            x="head",
            y="layer",
            color="similarity",
            text="match",
            title="Student's heads, each with the teacher's head most like it",
            unit=unit,
            tooltip=("name", *match),
        ),
        View(
            "heatmap",
            x="teacher_layer",
            y="layer",
            color="similarity",
            frame="layers",
            title="By layers: mean similarity of the student's heads to their nearest in that layer",
            unit=unit,
        ),
        View("table", x="name", y="similarity", title="Student's heads", tooltip=match),
    )
