"""Shapley values of the prompt's tokens: exact for a few tokens, sampled with a standard error for more.

Legend: N players, M sampled orders, C coalitions.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._input_game import Game, InputSettings, build_game
from core.probes._input_report import SEED, input_result
from core.registry import Example, method
from core.types import Cost, Metric, Progress, Prompt, Result, part_of

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

EXACT_PLAYERS = 8
"""Up to here all 2^N coalitions are run."""
MAX_VARIATIONS = 100_000


class ShapleyValuesSettings(InputSettings):
    """The shared settings, and how many orders are drawn."""

    orders: int = Field(
        32, ge=4, le=2048, description="Random orders of the tokens, drawn in pairs: an order and its reverse"
    )
    seed: int = Field(SEED, ge=0, le=2**31 - 1, description="Seed of the random orders")


def _cost(anatomy: object, n_tokens: int, settings: ShapleyValuesSettings) -> Cost:
    orders = settings.orders // 2 * 2
    variations = 2**n_tokens if n_tokens <= EXACT_PLAYERS else orders * (n_tokens - 1)
    checked = (2 + settings.quality_orders) * n_tokens if n_tokens > EXACT_PLAYERS else 0
    return Cost(forwards=2.0 + variations + checked, extra_bytes=256 << 20)


@method(
    "probe",
    title="Shapley values",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/1705.07874",
    answers="Why this token?",
    examples=(
        Example(
            "Which word makes it Paris?",
            Prompt("The capital of France is"),
            {"target": " Paris", "distractor": " London"},
        ),
        Example(
            "Which name is given the drink?",
            Prompt("When Mary and John went to the store, John gave a drink to"),
            {"target": " Mary", "distractor": " John", "unit": "word"},
        ),
    ),
    cost=_cost,
)
def shapley_values(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ShapleyValuesSettings
) -> Result:
    """Share the answer among the tokens so that the shares add up and equal tokens get equal shares.

    φ_i is the mean over all orders of what token i adds to f when it comes after the tokens before it in that order.
    Σ φ = f(prompt) − f(nothing) exactly, also when orders are sampled, since every order adds up by itself. Up to 8
    tokens all coalitions are run; beyond, orders are drawn in pairs with their reverse, and the standard error is that
    of the pairs' means.
    """
    started = time.perf_counter()
    with loaded.lock, torch.inference_mode():
        game = build_game(loaded, prompt, settings)
        found = _exact(game, progress) if game.n <= EXACT_PLAYERS else _sampled(game, settings, progress)
        whole, nothing = game.ends()
        error = () if found.error_N is None else (_error_metric(found.error_N, found.pairs, game.unit),)
        return input_result(
            loaded,
            prompt,
            game,
            settings,
            method="shapley_values",
            scores_N=found.value_N,
            standard_error_N=found.error_N,
            started=started,
            progress=part_of(progress, 0.8, 1),
            exactness_gap=abs(float(found.value_N.sum()) - (whole - nothing)),
            exactness_check="|Σ shares − (f(prompt) − f(nothing))|",
            metrics=error,
            notes=(
                f"Exact: all {2**game.n} coalitions of {game.n} players were run."
                if found.error_N is None
                else f"{2 * found.pairs} orders were drawn; each share has its standard error.",
            ),
        )


@dataclass(frozen=True)
class _Shapley:
    value_N: np.ndarray
    error_N: np.ndarray | None
    pairs: int = 0


def _error_metric(error_N: np.ndarray, pairs: int, unit: str) -> Metric:
    return Metric("largest_standard_error", float(error_N.max()), unit, "lower", n=pairs)


def _exact(game: Game, progress: Progress) -> _Shapley:
    """φ_i = Σ over coalitions S without i of |S|! (N − |S| − 1)! / N! · (f(S ∪ i) − f(S))."""
    n = game.n
    numbers_C = np.arange(2**n)
    coalitions_CN = (numbers_C[:, None] >> np.arange(n) & 1).astype(bool)
    value_C = game.values(coalitions_CN, part_of(progress, 0, 0.8))
    size_C = coalitions_CN.sum(1)
    weight_of_size = np.array([1 / (n * math.comb(n - 1, size)) for size in range(n)])
    shares = []
    for player in range(n):
        without_C = numbers_C[~coalitions_CN[:, player]]
        gain_C = value_C[without_C | 1 << player] - value_C[without_C]
        shares.append(float((weight_of_size[size_C[without_C]] * gain_C).sum()))
    return _Shapley(np.array(shares), None)


def _sampled(game: Game, settings: ShapleyValuesSettings, progress: Progress) -> _Shapley:
    """Mean gain over random orders and their reverses."""
    n, pairs = game.n, settings.orders // 2
    if 2 * pairs * (n - 1) > MAX_VARIATIONS:
        raise BadInput(
            f"{2 * pairs} orders of {n} players are {2 * pairs * (n - 1):,} prompt variations, more than {MAX_VARIATIONS:,}; "
            f"set orders to at most {MAX_VARIATIONS // (n - 1)}, or unit to word"
        )
    generator = np.random.default_rng(settings.seed)
    rank_PN = np.stack([generator.permutation(n) for _ in range(pairs)])
    rank_MN = np.concatenate([rank_PN, n - 1 - rank_PN])
    present_MCN = rank_MN[:, None, :] < np.arange(n + 1)[None, :, None]
    values = game.values(present_MCN.reshape(-1, n), part_of(progress, 0, 0.8))
    value_MC = values.reshape(2 * pairs, n + 1)
    gain_MN = np.take_along_axis(np.diff(value_MC, axis=1), rank_MN, axis=1)
    pair_PN = (gain_MN[:pairs] + gain_MN[pairs:]) / 2
    return _Shapley(pair_PN.mean(0), pair_PN.std(0, ddof=1) / math.sqrt(pairs), pairs)
