"""Co-activation: which experts of a layer are chosen for the same token, and more often than chance.

Legend: G groups of documents, L MoE layers, T tokens, E experts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    Counted,
    busiest,
    busiest_note,
    chosen_place,
    conservation_gap,
    membership,
    pair_columns,
    text_flags,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.routing import statistics
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats, Ints

RANKED = 100


class ExpertCoactivationSettings(TextSettings):
    """Which layer's pairs, on what text."""

    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) whose pairs are shown; -1: the one with the strongest pair",
    )
    min_expected: float = Field(
        5.0,
        ge=1.0,
        le=1000.0,
        description="A pair is ranked only where chance alone would give it this many tokens: below, a lift is luck",
    )


@method(
    "probe",
    title="Expert co-activation",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example(
            "The first layer on Python",
            Prompt("(the text is read; the prompt is not)"),
            {"text": "domain:python", "layer": 0},
        ),
    ),
    cost=text_cost,
)
def expert_coactivation(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertCoactivationSettings
) -> Result:
    """Count the pairs of experts that the same token is given, and compare with chance.

    C = AᵀA, with A the tokens × experts matrix of ones and zeros: C_ij counts the tokens given both i and j, C_ii the load of i. All
    k (k − 1) / 2 pairs of a token count, not neighbouring ranks alone. P(j | i) = C_ij / C_ii; lift = C_ij · T / (C_ii · C_jj) is 1
    for independent experts. As a token never gets one expert twice, a router that chooses k of E at random has the lift
    E (k − 1) / (k (E − 1)), below 1: that is the map's midpoint. Intervals are 95 % over documents.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    if choices.top_k < 2:
        raise BadInput(f"{loaded.ref} gives each token one expert, so no two are ever chosen together")
    chance = statistics.lift_by_chance(choices.n_experts, choices.top_k)
    layers = _layers(choices, settings.min_expected, chance)
    strongest = int(layers["strongest_lift"].fillna(0).to_numpy().argmax())
    place = chosen_place(settings.layer, choices.layers, strongest)
    pairs_GEE = pair_counts(choices, place)
    shown_E = busiest(pairs_GEE.sum(0).diagonal())
    return Result(
        frames={
            "ranked": ranked_pairs(pairs_GEE, choices, settings.min_expected),
            "main": _map(pairs_GEE.sum(0), choices.n_tokens, shown_E),
            "layers": layers,
        },
        views=_views(choices.layers[place], chance),
        metrics=_metrics(layers, place, chance, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_coactivation",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=_gap(pairs_GEE.sum(0), choices),
            exactness_check="largest |Σ_j C_ij − k · load_i| as a share of k · T, or " + CONSERVED,
        ),
        notes=(*text_notes(texts, choices), *_notes(shown_E, choices, settings.min_expected, chance)),
        flags=text_flags(choices),
    )


def pair_counts(choices: Choices, place: int) -> Ints:
    """C by group of documents, [G, E, E]: tokens that were given both experts; the diagonal is the load."""
    member_TE = membership(choices.experts_LTK[place], choices.n_experts)
    group_T = choices.group_T
    return np.stack(
        [
            (rows_TE.T @ rows_TE).round().astype(np.int64)
            for rows_TE in (member_TE[group_T == group] for group in range(int(group_T.max()) + 1))
        ]
    )


def ranked_pairs(pairs_GEE: Ints, choices: Choices, min_expected: float) -> pd.DataFrame:
    """The pairs with the highest and lowest lift among those that chance alone would give enough tokens."""
    total_EE = pairs_GEE.sum(0)
    load_E = total_EE.diagonal()
    tokens_G = np.bincount(choices.group_T, minlength=len(pairs_GEE))
    first, second = np.triu_indices(len(load_E), 1)
    expected = load_E[first] * load_E[second] / choices.n_tokens
    enough = expected >= min_expected
    first, second, expected = first[enough], second[enough], expected[enough]
    # C_ij, C_ii, C_jj and T of each group: what a lift is made of.
    parts_GPX = np.stack(
        [
            pairs_GEE[:, first, second],
            pairs_GEE[:, first, first],
            pairs_GEE[:, second, second],
            np.broadcast_to(tokens_G[:, None], (len(pairs_GEE), len(first))),
        ],
        axis=-1,
    )

    def lift(parts_BPX: Ints) -> Floats:
        together, one, other, tokens = np.moveaxis(parts_BPX.astype(np.float64), -1, 0)
        found: Floats = together * tokens / (one * other)
        return found

    with np.errstate(invalid="ignore", divide="ignore"):
        counted = Counted.of(parts_GPX, lift)
    frame = pd.DataFrame(
        {
            "pair": [f"E{i} + E{j}" for i, j in zip(first, second, strict=True)],
            "expert": first,
            "other": second,
            **counted.columns("lift"),
            "tokens": total_EE[first, second],
            "expected": expected,
            "p_other_given_expert": total_EE[first, second] / load_E[first],
            "p_expert_given_other": total_EE[first, second] / load_E[second],
        }
    ).sort_values("lift", ascending=False, ignore_index=True)
    half = RANKED // 2
    return (
        frame if len(frame) <= RANKED else pd.concat([frame.head(half), frame.tail(half)], ignore_index=True)
    )


def _layers(choices: Choices, min_expected: float, chance: float) -> pd.DataFrame:
    """Per layer its strongest pair, and the share of pairs that stand out by more than twice either way."""
    rows = []
    upper = np.triu_indices(choices.n_experts, 1)
    for place, layer in enumerate(choices.layers):
        member_TE = membership(choices.experts_LTK[place], choices.n_experts)
        pairs_EE = (member_TE.T @ member_TE).round().astype(np.int64)
        load_E = pairs_EE.diagonal()
        expected = (np.outer(load_E, load_E) / choices.n_tokens)[upper]
        lift = np.where(expected >= min_expected, statistics.lift(pairs_EE, choices.n_tokens)[upper], np.nan)
        known = lift[~np.isnan(lift)]
        best = int(np.nanargmax(lift)) if len(known) else -1
        rows.append(
            {
                "layer": layer,
                "strongest_pair": f"E{upper[0][best]} + E{upper[1][best]}" if len(known) else "",
                "strongest_lift": known.max() if len(known) else np.nan,
                "pairs": len(known),
                "share_twice_chance": float((known > 2 * chance).mean()) if len(known) else np.nan,
                "share_half_chance": float((known < chance / 2).mean()) if len(known) else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _map(pairs_EE: Ints, n_tokens: int, shown_E: Ints) -> pd.DataFrame:
    """One row per ordered pair of shown experts; an expert with itself is left empty."""
    lift_EE = statistics.lift(pairs_EE, n_tokens)
    given_EE = statistics.conditional(pairs_EE)
    row, column = pair_columns(shown_E)
    other = row != column
    return pd.DataFrame(
        {
            "expert": row,
            "other": column,
            "p_other_given_expert": np.where(other, given_EE[row, column], np.nan),
            "lift": np.where(other, lift_EE[row, column], np.nan),
            "tokens": pairs_EE[row, column],
        }
    )


def _gap(pairs_EE: Ints, choices: Choices) -> float:
    load_E = pairs_EE.diagonal()
    rows = np.abs(pairs_EE.sum(1) - choices.top_k * load_E).max() / (choices.top_k * choices.n_tokens)
    return max(float(rows), conservation_gap(load_E[None], choices))


def _metrics(layers: pd.DataFrame, place: int, chance: float, choices: Choices) -> tuple[Metric, ...]:
    row = layers.iloc[place]
    n = choices.n_tokens
    return (
        Metric("layer", float(row["layer"]), "layer"),
        Metric("strongest_lift", float(row["strongest_lift"]), "× independent", n=n),
        Metric("lift_of_chance", chance, "× independent"),
        Metric("share_twice_chance", float(row["share_twice_chance"]), "share", n=int(row["pairs"])),
    )


def _notes(shown_E: Ints, choices: Choices, min_expected: float, chance: float) -> tuple[str, ...]:
    notes = [
        f"A router that chose {choices.top_k} of {choices.n_experts} at random would give every pair the lift {chance:.3g}.",
        f"Pairs that chance would give fewer than {min_expected:g} tokens are on the map but not ranked.",
        "The strongest of many pairs is always a little too strong.",
    ]
    return (*notes, *busiest_note(shown_E, choices.n_experts))


def _views(layer: int, chance: float) -> tuple[View, ...]:
    tooltip = ("tokens", "lift", "p_other_given_expert")
    return (
        View(
            "table",
            x="pair",
            color="lift",
            frame="ranked",
            title=f"Layer {layer}: pairs by lift",
            unit="× independent",
            tooltip=(
                "lift_low",
                "lift_high",
                "tokens",
                "expected",
                "p_other_given_expert",
                "p_expert_given_other",
            ),
        ),
        View(
            "heatmap",
            x="other",
            y="expert",
            color="lift",
            title=f"Layer {layer}: lift (white is a random choice of k)",
            unit="× independent",
            midpoint=chance,
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="other",
            y="expert",
            color="p_other_given_expert",
            title=f"Layer {layer}: P(other | expert)",
            unit="probability",
            tooltip=tooltip,
        ),
        View(
            "table",
            x="layer",
            color="strongest_lift",
            frame="layers",
            title="Pairs by layer",
            unit="× independent",
            tooltip=("strongest_pair", "pairs", "share_twice_chance", "share_half_chance"),
        ),
    )
