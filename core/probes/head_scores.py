"""Head scores on random repeated tokens: which heads copy, look back, or rest, without any prompt.

Legend: S sequences, P positions, L layers, H heads, V vocabulary.

Scores are means over seeded sequences of start + r + r (``_repeats.py``), so they belong to the model and not to a
text, and carry an interval over sequences. It does not know what the heads do on real text: see the attention pattern.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._ablation import Ablation, Effects, Scored, ablate, ablation_share, heads
from core.probes._head_weights import every_copying
from core.probes._interval import half_width
from core.probes._provenance import provenance
from core.probes._repeat_scores import Measured, bytes_each, measure
from core.probes._repeats import Repeats, repeated_tokens
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
Score = Literal[
    "induction",
    "previous_token",
    "duplicate_token",
    "entropy_nats",
    "bos_share",
    "ov_copying",
    "ablation_effect",
]
TITLES = {
    "induction": "Induction: weight on the token after the earlier copy",
    "previous_token": "Weight on the previous token",
    "duplicate_token": "Weight on the earlier copy",
    "entropy_nats": "Entropy of the pattern",
    "bos_share": "Weight on the start token",
    "ov_copying": "OV copying: Σλ / Σ|λ| of W_U · OV · W_E",
    "ablation_effect": "Loss that its ablation adds to the second half",
}


class HeadScoresSettings(Settings):
    """Which two scores to plot, and on how much random text."""

    x: Score = Field("induction", description="Score on the horizontal axis; the table is ranked by it")
    y: Score = Field("previous_token", description="Score on the vertical axis")
    length: int = Field(50, ge=2, le=512, description="Random tokens before they repeat")
    sequences: int = Field(8, ge=2, le=64, description="Random sequences, each with its own seed")
    seed: int = Field(0, ge=0, le=1_000_000, description="Seed of the first sequence")
    threshold: float = Field(
        0.4, ge=0.05, le=1.0, description="Induction score from which a head counts as an induction head"
    )
    ablation: Literal["none", Ablation] = Field(
        "none",
        description="Also ablate every head (zero, mean, position_mean or resample) for the score ablation_effect; slower",
    )

    @property
    def reads_prompt(self) -> bool:
        """It reads random text."""
        return False


def _cost(anatomy: Anatomy, n_tokens: int, settings: HeadScoresSettings) -> Cost:
    """All sequences, counted in forward passes over the prompt, which itself is not read."""
    positions = 2 * settings.length + 1
    runs = settings.sequences * positions / max(1, n_tokens)
    if settings.ablation == "none":
        return Cost(runs, bytes_each(anatomy, positions))
    heads_run = anatomy.n_layers * anatomy.n_heads
    return Cost(
        runs * (3 + ablation_share(anatomy) * heads_run),
        bytes_each(anatomy, positions) + 12 * positions * anatomy.vocab_size + (512 << 20),
    )


@method(
    "probe",
    title="Head scores",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2209.11895",
    answers="Which heads matter?",
    examples=(
        Example("Find the induction heads", Prompt("(random tokens; the prompt is not read)")),
        Example(
            "Copying heads among those that look back",
            Prompt("(random tokens; the prompt is not read)"),
            {"x": "ov_copying", "y": "induction"},
        ),
    ),
    cost=_cost,
)
def head_scores(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: HeadScoresSettings
) -> Result:
    """Score every head on random tokens that repeat, and plot any two scores against each other.

    The input is a start token, r, and r again, with r distinct random tokens of length m; the prompt is not read. The
    induction score is the mean weight of second-half positions i on i − m + 1, the token after the earlier copy;
    duplicate token is the weight on i − m, the copy itself; previous token the weight on i − 1. Scores are means over
    sequences with a 95 % interval (Student's t).

    OV copying looks at weights only: of W_U · W_OV · W_E, the matrix that says which tokens a head promotes when it
    reads a token, it gives Σλ / Σ|λ| over the eigenvalues (Elhage et al. 2021): 1 where every token promotes itself,
    −1 where it suppresses itself. Norm gains are folded in, embeddings normed, positions and biases left out.

    With ablation set, every head is also taken out in turn, and the loss that this adds to the second half is its
    ablation effect, in nats per token.
    """
    started = time.perf_counter()
    anatomy = loaded.anatomy
    if settings.ablation == "none" and "ablation_effect" in (settings.x, settings.y):
        raise BadInput("ablation_effect is only measured when ablation is set; choose zero, mean or resample")
    repeats = repeated_tokens(
        loaded, length=settings.length, sequences=settings.sequences, seed=settings.seed
    )
    if repeats.length < 2:
        raise BadInput(f"{loaded.ref} has room for {repeats.length} random tokens; at least 2 are needed")
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        measured = measure(loaded, repeats, part_of(progress, 0.0, 0.1))
        copying_LH, trace_gap = every_copying(loaded, part_of(progress, 0.1, 0.2))
        effects = None
        if settings.ablation != "none":
            effects = _ablate(loaded, repeats, settings.ablation, settings.seed, part_of(progress, 0.2, 1.0))
    frame = _frame(anatomy, measured, copying_LH, effects)
    ranked = frame.sort_values(settings.x, ascending=False, kind="stable", ignore_index=True).head(50)
    return Result(
        frames={"ranked": ranked, "main": frame},
        views=_views(settings),
        metrics=_metrics(frame, measured, settings),
        provenance=provenance(
            loaded,
            prompt,
            method="head_scores",
            settings=settings,
            started=started,
            conditions={
                "tokens": int(repeats.ids_SP.numel()),
                "length": repeats.length,
                "sequences": len(repeats.ids_SP),
                "prompt": "not read",
                "fp32_path": path.name,
            },
            exactness_gap=max(measured.gap, trace_gap, effects.gap if effects else 0.0),
            exactness_check="largest of |row sum − 1|, the weight on a later token, |Σλ − trace| as a share of Σ|λ|, and the "
            "difference of an ablation from a whole forward with hooks",
            attention_kernel="eager",
        ),
        notes=_notes(anatomy, repeats, settings),
    )


def _ablate(loaded: LoadedModel, repeats: Repeats, mode: Ablation, seed: int, progress: Progress) -> Effects:
    """What the loss of the second half gains when a head is ablated, every head in turn."""
    second_half = Scored(slice(repeats.length + 1, None))
    return ablate(
        loaded,
        list(repeats.ids_SP),
        heads(loaded.anatomy),
        [second_half] * len(repeats.ids_SP),
        mode=mode,
        seed=seed,
        progress=progress,
    )


def _frame(anatomy: Anatomy, measured: Measured, copying_LH: Floats, effects: Effects | None) -> pd.DataFrame:
    """One row per head: the mean of each score, and half of its 95 % interval."""
    layer, head = np.indices((anatomy.n_layers, anatomy.n_heads)).reshape(2, -1)
    columns: dict[str, Any] = {
        "layer": layer,
        "head": head,
        "name": [f"L{a}H{b}" for a, b in zip(layer, head, strict=True)],
    }
    for name, values_SLH in measured.scores.items():
        columns[name] = values_SLH.mean(0).ravel()
        columns[f"{name}_ci95"] = half_width(values_SLH).ravel()
    columns["ov_copying"] = copying_LH.ravel()
    if effects is not None:
        added_CS = effects.nats_CS - effects.base_nats_S
        columns["ablation_effect"] = added_CS.mean(1)
        columns["ablation_effect_ci95"] = half_width(added_CS.T)
    return pd.DataFrame(columns)


def _metrics(frame: pd.DataFrame, measured: Measured, settings: HeadScoresSettings) -> tuple[Metric, ...]:
    n, n_scored = measured.nats_SP.shape
    how = f"Student's t over {n} random sequences"
    best = frame.sort_values("induction", kind="stable").iloc[-1]
    second_S = measured.nats_SP[:, n_scored // 2 + 1 :].mean(1)
    first_S = measured.nats_SP[:, : n_scored // 2].mean(1)

    def metric(name: str, value: float, half: float, unit: str) -> Metric:
        return Metric(name, value, unit, n=n, low=value - half, high=value + half, interval=how)

    return (
        metric("top_induction_score", float(best["induction"]), float(best["induction_ci95"]), "share"),
        Metric(
            "induction_heads", float((frame["induction"] >= settings.threshold).sum()), "heads", n=len(frame)
        ),
        metric("loss_first_half", float(first_S.mean()), float(half_width(first_S)), "nats/token"),
        metric("loss_second_half", float(second_S.mean()), float(half_width(second_S)), "nats/token"),
    )


def _views(settings: HeadScoresSettings) -> tuple[View, ...]:
    units = {"entropy_nats": "nats", "ov_copying": "ratio", "ablation_effect": "nats"}
    tooltip = tuple(name for name in TITLES if name != "ablation_effect" or settings.ablation != "none")
    maps = tuple(
        View(
            "heatmap",
            x="head",
            y="layer",
            color=name,
            title=TITLES[name],
            unit=units.get(name, "share"),
            midpoint=0.0 if name in ("ov_copying", "ablation_effect") else None,
            tooltip=tooltip,
        )
        for name in dict.fromkeys((settings.x, settings.y, *tooltip))
    )
    return (
        View(
            "table",
            x="name",
            y=settings.x,
            frame="ranked",
            title=f"Heads by {settings.x.replace('_', ' ')}",
            tooltip=tooltip,
        ),
        View(
            "scatter",
            x=settings.x,
            y=settings.y,
            color="layer",
            title="Heads by two scores",
            unit=units.get(settings.y, "share"),
            tooltip=("name", *tooltip),
        ),
        *maps,
    )


def _notes(anatomy: Anatomy, repeats: Repeats, settings: HeadScoresSettings) -> tuple[str, ...]:
    n = len(repeats.ids_SP)
    notes = [
        f"Computed on {n} sequences of a start token and {repeats.length} random tokens, twice; the prompt is not read.",
        "The loss of the second half leaves out its first token, which nothing foretells.",
    ]
    if repeats.length < settings.length:
        notes.append(f"{repeats.length} instead of {settings.length} tokens: more do not fit this model.")
    narrow = [window for window in anatomy.windows if window is not None and window <= repeats.length]
    if narrow:
        notes.append(
            f"{len(narrow)} layers look back {min(narrow)} positions at most: the earlier copy is out of their sight."
        )
    return tuple(notes)
