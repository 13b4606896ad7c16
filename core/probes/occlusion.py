"""Occlusion: take one token out, see what changes (Zeiler & Fergus 2014; leave-one-out).

Legend: N players.

One prompt variation per token and no gradient, so it is right on any kernel. Two tokens that say the same thing hide
each other: each looks needless while the other is there; Shapley values share between them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from core.lazy import torch
from core.probes._input_game import InputSettings, build_game
from core.probes._input_report import input_result
from core.registry import Example, method
from core.types import Cost, Progress, Prompt, Result, part_of

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


class OcclusionSettings(InputSettings):
    """Nothing beyond the shared settings."""


@method(
    "probe",
    title="Occlusion",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/1311.2901",
    answers="Why this token?",
    examples=(
        Example(
            "Which word makes it Paris?",
            Prompt("The capital of France is"),
            {"target": " Paris", "distractor": " London"},
        ),
        Example(
            "Which noun does the verb agree with?",
            Prompt("The keys to the old wooden cabinet"),
            {"target": " are", "distractor": " is"},
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=2.0 + (3 + settings.quality_orders) * n_tokens, extra_bytes=256 << 20
    ),
)
def occlusion(loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: OcclusionSettings) -> Result:
    """Score each token by what its absence takes from the answer.

    Score of token i: f(prompt) − f(prompt without i), where f is the log-probability or logit of the target, or its
    difference to a distractor. Positive: the token speaks for the target. What takes its place is a setting: nothing,
    the mean embedding, or a neutral token. The exactness gap compares f of the untouched variation with the model.
    """
    started = time.perf_counter()
    with loaded.lock, torch.inference_mode():
        game = build_game(loaded, prompt, settings)
        without = ~np.eye(game.n, dtype=bool)
        without_N = game.values(without, part_of(progress, 0, 0.3))
        whole, _ = game.ends()
        return input_result(
            loaded,
            prompt,
            game,
            settings,
            method="occlusion",
            scores_N=whole - without_N,
            started=started,
            progress=part_of(progress, 0.3, 1),
            exactness_gap=abs(whole - game.value_of_all()),
            exactness_check="|f(prompt with nothing occluded) − the model's own answer|",
            additive=False,
        )
