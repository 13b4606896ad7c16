"""Input attributions as a result: ranked table, token strip, words, and a check of the ranking by deletion and insertion.

Legend: N players, O random orders.

The check asks the model again: insert tokens from the most to the least important and f should rise early; delete them
in that order and it should fall early. A random order is the yardstick. It knows no attribution method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from core.probes._input_game import Game, InputSettings, group_words
from core.probes._provenance import provenance
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SEED = 7


@dataclass(frozen=True)
class Check:
    """How well a ranking orders the tokens, in the unit of f."""

    curves: pd.DataFrame
    insertion: float
    deletion: float
    random: float


def check_ranking(
    game: Game, scores_N: np.ndarray, orders: int, progress: Progress, *, seed: int = SEED
) -> Check:
    """Mean of f while tokens come in, or go out, by falling score; and in random orders, each also backwards.

    A random order's insertion is its reverse's deletion, so one number serves both. Costs about (2 + orders) · N
    prompt variations.
    """
    by_score = np.argsort(-scores_N, kind="stable")
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(game.n) for _ in range((orders + 1) // 2)]
    random = [order for permutation in shuffled for order in (permutation, permutation[::-1])][:orders]
    every = [_inserted(by_score), _inserted(by_score[::-1])[::-1], *map(_inserted, random)]
    values = game.values(np.concatenate(every), progress).reshape(len(every), game.n + 1)
    insertion, deletion, rest = values[0], values[1], values[2:].mean(0)
    share = np.arange(game.n + 1) / game.n
    named = {
        "insertion": (share, insertion),
        "deletion": (1 - share, deletion),
        "random order": (share, rest),
    }
    curves = [pd.DataFrame({"share_present": x, "value": y, "curve": name}) for name, (x, y) in named.items()]
    means = [float(np.trapezoid(row, share)) for row in (insertion, deletion, rest)]
    return Check(pd.concat(curves, ignore_index=True), *means)


def _inserted(order: np.ndarray) -> np.ndarray:
    """Coalitions [N + 1, N] from none to all, one more player of ``order`` each time."""
    rank_N = np.empty(len(order), int)
    rank_N[order] = np.arange(len(order))
    present: np.ndarray = rank_N[None, :] < np.arange(len(order) + 1)[:, None]
    return present


def input_result(
    loaded: LoadedModel,
    prompt: Prompt,
    game: Game,
    settings: InputSettings,
    *,
    method: str,
    scores_N: np.ndarray,
    started: float,
    progress: Progress,
    exactness_gap: float,
    exactness_check: str,
    standard_error_N: np.ndarray | None = None,
    metrics: Sequence[Metric] = (),
    notes: Sequence[str] = (),
    flags: Sequence[str] = (),
    additive: bool = True,
) -> Result:
    """Frames, views and the ranking's check; ``additive`` scores may be summed over the tokens of a word."""
    check = None
    if settings.quality_orders:
        check = check_ranking(game, scores_N, settings.quality_orders, progress)
    tokens = _tokens(game, scores_N, standard_error_N)
    frames = {"main": tokens.loc[_order(scores_N)].reset_index(drop=True), "tokens": tokens}
    if additive and settings.unit == "token":
        words = _words(game, scores_N)
        if len(words) < len(tokens):
            frames["words"] = words
    if check is not None:
        frames["curves"] = check.curves
    whole, nothing = game.ends()
    return Result(
        frames=frames,
        views=tuple(view for view in _views(game, standard_error_N is not None) if view.frame in frames),
        metrics=(
            Metric("value_of_prompt", whole, game.unit),
            Metric("value_of_nothing", nothing, game.unit),
            *metrics,
            *(() if check is None else _check_metrics(check, game)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method=method,
            settings=settings,
            started=started,
            conditions={
                "tokens": game.n_positions,
                "players": game.n,
                "target": game.target.text,
                "target_id": game.target.id,
                "distractor": game.distractor.text if game.distractor else "",
                "prompt_variations": game.n_known,
            },
            exactness_gap=exactness_gap,
            exactness_check=exactness_check,
        ),
        notes=(_question(game), *notes, *_check_note(check, game)),
        flags=tuple(flags),
    )


def _order(scores_N: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(scores_N), kind="stable")


def _tokens(game: Game, scores_N: np.ndarray, standard_error_N: np.ndarray | None) -> pd.DataFrame:
    total = float(np.abs(scores_N).sum())
    frame = pd.DataFrame(
        {
            "position": [player[0] for player in game.players],
            "token": game.names,
            "score": scores_N,
            "share": np.abs(scores_N) / total if total else np.zeros(game.n),
        }
    )
    return frame if standard_error_N is None else frame.assign(standard_error=standard_error_N)


def _words(game: Game, scores_N: np.ndarray) -> pd.DataFrame:
    of_position = {player[0]: score for player, score in zip(game.players, scores_N, strict=True)}
    words = group_words(game.encoded.texts, list(of_position))
    return pd.DataFrame(
        {
            "position": [word[0] for word in words],
            "word": ["".join(game.encoded.texts[p] for p in word) for word in words],
            "score": [sum(of_position[p] for p in word) for word in words],
        }
    )


def _views(game: Game, has_error: bool) -> tuple[View, ...]:
    error = ("standard_error",) if has_error else ()
    unit = game.unit
    return (
        View(
            "table",
            x="token",
            color="score",
            title="Tokens that decide",
            unit=unit,
            midpoint=0,
            tooltip=("position", "share", *error),
        ),
        View(
            "tokens",
            x="position",
            color="score",
            text="token",
            frame="tokens",
            title="The prompt",
            unit=unit,
            midpoint=0,
            tooltip=error,
        ),
        View(
            "tokens",
            x="position",
            color="score",
            text="word",
            frame="words",
            title="Summed to words",
            unit=unit,
            midpoint=0,
        ),
        View(
            "line",
            x="share_present",
            y="value",
            color="curve",
            frame="curves",
            title="Does the ranking hold? Most important in first, or out first",
            unit=unit,
        ),
    )


def _check_metrics(check: Check, game: Game) -> tuple[Metric, ...]:
    return (
        Metric("insertion_above_random", check.insertion - check.random, game.unit, "higher"),
        Metric("deletion_below_random", check.random - check.deletion, game.unit, "higher"),
    )


def _question(game: Game) -> str:
    asked = (
        f"log p({game.target.text!r})"
        if game.metric == "log_probability"
        else f"logit of {game.target.text!r}"
    )
    if game.distractor is not None:
        asked = f"logit of {game.target.text!r} minus that of {game.distractor.text!r}"
    instead = {
        "remove": "an occluded token is removed",
        "mean_embedding": "an occluded token becomes the mean embedding",
        "token": "an occluded token becomes a neutral one",
    }[game.occlude_with]
    nothing = ""
    if game.empty_id is not None:
        nothing = ", and of an empty prompt one start token is left"
    return f"f is the {asked}; {instead}{nothing}."


def _check_note(check: Check | None, game: Game) -> tuple[str, ...]:
    if check is None:
        return ()
    holds = check.insertion > check.random > check.deletion
    verdict = "" if holds else "; this ranking is no better than chance"
    note = (
        f"Quality check: between nothing and everything f is {check.insertion:.3f} {game.unit} on average when tokens come "
        f"in by this ranking, {check.random:.3f} in random order, {check.deletion:.3f} when they go out by it{verdict}."
    )
    return (note,)
