"""Attention rollout: how much of each input position could have reached the read-out (Abnar and Zuidema 2020).

Legend: H heads, P positions, Q queries, K keys.

Patterns are reduced inside the hook, layer by layer, so one matrix [P, P] is held. It follows attention alone: what
values, MLPs and norms do to the content on its way is not known here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from core.capture import capture
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.probes import _relevance
from core.probes._provenance import provenance
from core.probes._relevance import check_positions
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class AttentionRolloutSettings(Settings):
    """How attention and the residual connection are mixed, and whose sources are shown."""

    residual_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of each position that is taken to come through the residual connection unchanged",
    )
    position: int = Field(-1, ge=-1, le=100_000, description=_relevance.READING_POINT)


def rollout_step(rollout_PP: Tensor, pattern_HQK: Tensor, residual_share: float) -> Tensor:
    """One layer on: ((1 − r) · mean over heads + r · I) · rollout; rows keep their sum."""
    mean_QK = pattern_HQK.mean(0)
    following: Tensor = (1 - residual_share) * (mean_QK @ rollout_PP) + residual_share * rollout_PP
    return following


def _cost(anatomy: Anatomy, n_tokens: int, settings: AttentionRolloutSettings) -> Cost:
    matrix = 4 * n_tokens**2
    return Cost(forwards=1.5, extra_bytes=matrix * (anatomy.n_heads + 3))


@method(
    "probe",
    title="Attention rollout",
    needs=["heads"],
    paper="https://arxiv.org/abs/2005.00928",
    answers="Why this token?",
    examples=(
        Example("Which patches make this a 7?", Prompt(image="digits:1348")),
        Example(
            "What a sentence vector is mixed from", Prompt("The cat sat on the mat because it was tired.")
        ),
    ),
    cost=_cost,
)
def attention_rollout(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AttentionRolloutSettings
) -> Result:
    """Follow attention back from the read-out to the input, through all layers.

    Each layer mixes positions by Ã = (1 − r) · mean over heads of A + r · I, r for the residual connection; the rollout
    is the product Ã_L … Ã_1. Its row at the read-out (class token, mean of tokens, or last token) gives one weight per
    input position, together 1. It is a bound on flow, not an explanation: it has no sign, knows no class, and ignores
    what values and MLPs do. Read it beside relevance (gradients) and occlusion (which is exact).
    """
    started = time.perf_counter()
    encoded = _relevance.encode_any(loaded, prompt)
    read_P, read_from = _relevance.read_weights(loaded, encoded, settings.position)
    walk = _Walk(encoded, read_P, settings.residual_share)
    paths = [block.attention for block in loaded.anatomy.blocks]
    with (
        loaded.lock,
        torch.inference_mode(),
        eager_attention(loaded.model),
        capture(loaded.model, paths, reduce=walk.step, item=1),
    ):
        loaded.model(**encoded.inputs)
    weight_LP = torch.stack(walk.rows).double().cpu().numpy()
    weight_P = weight_LP[-1]
    return Result(
        frames=_relevance.frames(encoded, weight_P, weight_LP),
        views=_relevance.views(encoded, "Rollout weight"),
        metrics=(
            Metric("top_weight", float(weight_P.max()), "share", n=len(weight_P)),
            Metric("effective_positions", _effective(weight_P), "positions", n=len(weight_P)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="attention_rollout",
            settings=settings,
            started=started,
            conditions={
                "positions": encoded.n_tokens,
                "read_from": read_from,
            },
            exactness_gap=walk.gap,
            exactness_check="largest |row sum − 1| of the rollout after any layer",
            attention_kernel="eager",
        ),
        notes=(
            f"Read from {read_from}. Weights are positive and sum to 1 over all positions, special tokens included.",
            *_relevance.notes(loaded, encoded),
        ),
        images=_relevance.images(encoded),
    )


class _Walk:
    """Multiplies the layers' mixing matrices as the model makes them, and keeps the read-out's row of each."""

    def __init__(self, encoded: _relevance.Input, read_P: Tensor, residual_share: float) -> None:
        self._encoded = encoded
        self._read_P = read_P
        self._share = residual_share
        self.rollout_PP = torch.eye(len(read_P), device=read_P.device)
        self.rows: list[Tensor] = []
        self.gap = 0.0

    def step(self, path: str, pattern_BHQK: Tensor) -> None:
        """One layer's patterns."""
        check_positions(self._encoded, pattern_BHQK.shape[-1])
        self.rollout_PP = rollout_step(self.rollout_PP, pattern_BHQK[0].float(), self._share)
        self.rows.append(self._read_P @ self.rollout_PP)
        self.gap = max(self.gap, float((self.rollout_PP.sum(-1) - 1).abs().max()))


def _effective(weight_P: np.ndarray) -> float:
    """exp(entropy): over how many positions the weight is spread."""
    p = weight_P[weight_P > 0] / weight_P.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
