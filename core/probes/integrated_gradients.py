"""Integrated gradients, with the gap it leaves always shown (Sundararajan 2017).

Legend: P positions, D d_model.

On a deep network the straight path from a meaningless baseline (zeros, a mean embedding) crosses inputs the model was
never trained on, where f swings wildly: no usual number of steps integrates that. From a real prompt that differs in
the words under question the path is smooth. So the baseline that works is a counterfactual prompt.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput, CannotMeasure
from core.lazy import torch
from core.models.gradients import require_gradients
from core.probes._input_game import (
    Game,
    InputSettings,
    build_game,
    mean_embedding,
    neutral_embedding,
)
from core.probes._input_gradient import Points, StraightPath, per_player
from core.probes._input_report import input_result
from core.probes._path_integral import PathIntegral, adaptive, gauss_legendre
from core.probes._tokens import encode
from core.registry import Example, method
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

FLAGGED = 0.05
"""A gap above this share of f(x) − f(x₀) flags the result."""


class IntegratedGradientsSettings(InputSettings):
    """Where the path starts, and how it is integrated."""

    corrupted: str = Field(
        "",
        description="Counterfactual prompt of as many tokens where the path starts (the baseline that converges); "
        "empty: the baseline setting is used",
    )
    baseline: Literal["token", "mean_embedding", "zero"] = Field(
        "token",
        description="Without a counterfactual prompt, every token starts as: token, the neutral token; mean_embedding, "
        "the mean over the vocabulary; zero. None of them usually converges",
    )
    start_layer: int = Field(
        0,
        ge=0,
        le=512,
        description="Layer before which the path runs; 0 is the embedding, later ones are smoother",
    )
    quadrature: Literal["adaptive", "gauss_legendre"] = Field(
        "adaptive",
        description="adaptive: split the path where most is missed, until the tolerance is met; gauss_legendre: one "
        "rule over the whole path with exactly the given steps, as in Captum",
    )
    steps: int = Field(
        160, ge=1, le=4096, description="Points on the path (forward and backward each); adaptive: at most"
    )
    tolerance: float = Field(
        0.01, ge=1e-6, le=0.5, description="Adaptive: share of f(x) − f(x₀) that may be missed"
    )


@method(
    "probe",
    title="Integrated gradients",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/1703.01365",
    answers="Why this token?",
    examples=(
        Example(
            "Indirect object: which names decide?",
            Prompt("When Mary and John went to the store, John gave a drink to"),
            {
                "target": " Mary",
                "distractor": " John",
                "corrupted": "When Sarah and Tom went to the park, Tom sent a letter to",
            },
        ),
        Example(
            "Late layers: the fact has moved to the last word",
            Prompt("The capital of France is"),
            {
                "target": " Paris",
                "distractor": " London",
                "corrupted": "The capital of England is",
                "start_layer": 28,
            },
        ),
        Example(
            "From zeros: does not converge, and says so",
            Prompt("The capital of France is"),
            {
                "target": " Paris",
                "distractor": " London",
                "baseline": "zero",
                "quadrature": "gauss_legendre",
                "steps": 50,
            },
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=6.0 + 3 * settings.steps + (3 + settings.quality_orders) * n_tokens, extra_bytes=1 << 30
    ),
)
def integrated_gradients(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: IntegratedGradientsSettings
) -> Result:
    """Share out what the answer gains on the way from a baseline to the prompt, by the gradient along that way.

    IG = (x − x₀) ⊙ ∫₀¹ ∇f(x₀ + α (x − x₀)) dα over the token embeddings (or the residual stream before a later layer),
    summed over d_model. The attributions should add up to f(x) − f(x₀); the completeness gap is what they miss, and
    a result that misses more than 5 % is flagged. From zeros or a mean embedding this is the rule, from a
    counterfactual prompt the exception. Agreement with another library at equal steps proves nothing about it.
    """
    started = time.perf_counter()
    if settings.start_layer >= loaded.anatomy.n_layers:
        raise BadInput(
            f"start_layer {settings.start_layer} does not exist: {loaded.ref} has {loaded.anatomy.n_layers} layers, "
            f"from 0 to {loaded.anatomy.n_layers - 1}"
        )
    if loaded.dtype not in ("float32", "float64"):
        raise CannotMeasure(
            f"a path has finer steps than {loaded.dtype} can tell apart, so its integral would be rounding; "
            "open the model in float32, or use occlusion or Shapley values"
        )
    with loaded.lock:
        require_gradients(loaded)
        with torch.no_grad():
            game = build_game(loaded, prompt, settings)
            points = Points(game, settings.start_layer)
            start_PD = points.stream(_baseline(loaded, game, settings))
            path = StraightPath(game, points, start_PD, points.stream(game.embeddings()))
        integral = _integrate(path, settings, part_of(progress, 0, 0.7))
        with torch.inference_mode():
            result = input_result(
                loaded,
                prompt,
                game,
                settings,
                method="integrated_gradients",
                scores_N=per_player(game, integral.value_P),
                started=started,
                progress=part_of(progress, 0.7, 1),
                exactness_gap=abs(integral.gap),
                exactness_check="completeness: |Σ attributions − (f(prompt) − f(baseline))|",
                metrics=_metrics(integral, game),
                notes=(_verdict(integral, game, settings),),
                flags=("not_converged",) if integral.relative > FLAGGED else (),
            )
    return _with_path(result, integral, game)


def _integrate(path: StraightPath, settings: IntegratedGradientsSettings, progress: Progress) -> PathIntegral:
    def report(done: int) -> None:
        progress(done, settings.steps, f"{done} points of the path")

    report(0)
    if settings.quadrature == "gauss_legendre":
        return gauss_legendre(path.evaluate, path.value, settings.steps)
    return adaptive(
        path.evaluate, path.value, steps=settings.steps, tolerance=settings.tolerance, report=report
    )


def _baseline(loaded: LoadedModel, game: Game, settings: IntegratedGradientsSettings) -> Tensor:
    """Embeddings [P, D] where the path starts; special tokens stay what they are."""
    if settings.corrupted:
        other = encode(loaded, Prompt(settings.corrupted))
        if other.n_tokens != game.encoded.n_tokens:
            raise BadInput(
                f"the counterfactual prompt has {other.n_tokens} tokens ({_pieces(other.texts)}), the prompt "
                f"{game.encoded.n_tokens} ({_pieces(game.encoded.texts)}); a path needs as many: choose words of equal length"
            )
        return game.embeddings_of(other.ids)
    if settings.baseline == "zero":
        return game.occluded_embeddings(torch.zeros_like(mean_embedding(loaded)))
    if settings.baseline == "mean_embedding":
        return game.occluded_embeddings(mean_embedding(loaded))
    return game.occluded_embeddings(neutral_embedding(loaded, settings))


def _pieces(texts: tuple[str, ...]) -> str:
    return "|".join(texts)


def _metrics(integral: PathIntegral, game: Game) -> tuple[Metric, ...]:
    relative = (
        () if np.isinf(integral.relative) else (Metric("missed_share", integral.relative, "", "lower"),)
    )
    return (
        Metric("path_difference", integral.delta, game.unit),
        Metric("completeness_gap", integral.gap, game.unit, "neither", n=integral.steps),
        *relative,
    )


def _verdict(integral: PathIntegral, game: Game, settings: IntegratedGradientsSettings) -> str:
    total = float(integral.value_P.sum())
    said = (
        f"Completeness: attributions add up to {total:.4f} {game.unit}, f(prompt) − f(baseline) is {integral.delta:.4f}: "
        f"gap {integral.gap:+.4f} after {integral.steps} points; segment by segment {integral.missed_by_segments:.4f} is missed."
    )
    if integral.relative <= FLAGGED:
        return said
    if settings.corrupted:
        return f"{said} Not converged: allow more steps, or a start_layer later than {settings.start_layer}."
    return (
        f"{said} Not converged: do not read these numbers. Give a counterfactual prompt (corrupted), "
        "or use occlusion or Shapley values, which need no path."
    )


def _with_path(result: Result, integral: PathIntegral, game: Game) -> Result:
    """Add f along the path: a smooth line is one that can be integrated."""
    path = pd.DataFrame({"alpha": integral.alpha_S, "value": integral.f_S})
    view = View(
        "line",
        x="alpha",
        y="value",
        frame="path",
        title="f on the way from baseline (0) to prompt (1)",
        unit=game.unit,
    )
    return dataclasses.replace(result, frames={**result.frames, "path": path}, views=(*result.views, view))
