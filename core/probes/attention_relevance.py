"""Gradient-weighted attention relevance: which input positions a chosen answer rests on (Chefer, Gur and Wolf 2021).

Legend: L layers, H heads, P positions, Q queries, K keys.

The LRP-free rule of "Generic Attention-model Explainability": attention weights count as far as raising them would raise
the answer. All layers' patterns and their gradients are held at once, [L, H, P, P]; parameters get no gradient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.models.gradients import differentiable, require_gradients
from core.probes import _relevance
from core.probes._kernel import Kernel, attention_by
from core.probes._provenance import provenance
from core.probes._read_out import ReadOut, read_out
from core.probes._relevance import check_positions
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class AttentionRelevanceSettings(Settings):
    """Which answer is explained, and where it is read."""

    target: str = Field(
        "",
        description="Token or class to explain; empty takes the model's own answer. None for a sentence encoder",
    )
    distractor: str = Field(
        "", description="Token or class to compare with (why this and not that?); empty for none"
    )
    position: int = Field(-1, ge=-1, le=100_000, description=_relevance.READING_POINT)


def relevance_step(relevance_PP: Tensor, pattern_HQK: Tensor, gradient_HQK: Tensor) -> Tensor:
    """One layer on: R + Ā · R with Ā = mean over heads of (∇A ⊙ A)⁺; a zero gradient changes nothing."""
    raised_QK = (gradient_HQK * pattern_HQK).clamp(min=0).mean(0)
    following: Tensor = relevance_PP + raised_QK @ relevance_PP
    return following


def _cost(anatomy: Anatomy, n_tokens: int, settings: AttentionRelevanceSettings) -> Cost:
    patterns = anatomy.n_layers * anatomy.n_heads * n_tokens**2
    return Cost(
        forwards=5, extra_bytes=4 * (3 * patterns + 20 * anatomy.n_layers * n_tokens * anatomy.d_model)
    )


@method(
    "probe",
    title="Attention relevance",
    needs=["heads"],
    paper="https://arxiv.org/abs/2103.15679",
    answers="Why this token?",
    examples=(
        Example("Which patches make this a 7?", Prompt(image="digits:1348")),
        Example(
            "Why a 5 where a 9 is written?", Prompt(image="digits:1580"), {"target": "5", "distractor": "9"}
        ),
        Example(
            "Which words make two sentences alike?",
            Prompt("A man is eating a plate of pasta.", "Someone has noodles for lunch."),
        ),
    ),
    cost=_cost,
)
def attention_relevance(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AttentionRelevanceSettings
) -> Result:
    """Follow attention back from one answer, counting only weights that raise it.

    With A a layer's pattern and ∇A the gradient of the answer's logit (or of target − distractor), Ā is the mean over heads
    of (∇A ⊙ A)⁺ and relevance grows layer by layer: R ← R + Ā · R from R = I. Shown is the read-out's row of R − I: 0 for a
    position that no helpful attention reaches. It knows the class, unlike rollout, but has no negative side and no unit;
    check its ranking by occlusion. A sentence encoder without a head explains the cosine with a second text, or the
    length of its sentence vector where there is none.
    """
    started = time.perf_counter()
    encoded, out = read_out(loaded, prompt, settings.position)
    with loaded.lock:
        require_gradients(loaded)
        with torch.inference_mode():
            plain = out.score(loaded.model(**encoded.inputs), settings.target, settings.distractor)
        traced = trace_patterns(loaded, encoded.inputs, out, settings)
    relevance_PP = torch.eye(encoded.n_tokens, device=loaded.model.device)
    rows = []
    for pattern_HQK, gradient_HQK in zip(traced.patterns, traced.gradients, strict=True):
        check_positions(encoded, pattern_HQK.shape[-1])
        relevance_PP = relevance_step(relevance_PP, pattern_HQK, gradient_HQK)
        rows.append(out.read_P @ relevance_PP - out.read_P)
    weight_LP = torch.stack(rows).double().cpu().numpy()
    weight_P = weight_LP[-1]
    return Result(
        frames=_relevance.frames(encoded, weight_P, weight_LP),
        views=_relevance.views(encoded, f"Relevance for {out.explained}"),
        metrics=(
            Metric("score", float(plain), out.unit),
            Metric("top_weight", float(weight_P.max()), n=len(weight_P)),
            Metric("total_relevance", float(weight_P.sum()), n=len(weight_P)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="attention_relevance",
            settings=settings,
            started=started,
            conditions={
                "positions": encoded.n_tokens,
                "read_from": out.read_from,
                "explained": out.explained,
            },
            exactness_gap=abs(float(plain) - float(traced.score)),
            exactness_check="|score of the traced pass with eager attention − score of the model as it is|",
            attention_kernel="eager",
        ),
        notes=(
            f"Explains {out.explained}, read from {out.read_from}. Weights are not negative and have no unit.",
            *(() if np.any(weight_P) else ("No attention weight raises this answer: every weight is 0.",)),
            *_relevance.notes(loaded, encoded),
        ),
        images=_relevance.images(encoded),
    )


class _Traced:
    """One pass: its score, and each layer's pattern with its gradient, float32 [H, Q, K]."""

    def __init__(self, score: Tensor, patterns: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.score = score.detach()
        self.patterns = [pattern[0].detach().float() for pattern in patterns]
        self.gradients = [gradient[0].float() for gradient in gradients]


def trace_patterns(
    loaded: LoadedModel, inputs: dict[str, Any], out: ReadOut, settings: AttentionRelevanceSettings
) -> _Traced:
    """Run forward with eager attention, keep every pattern in the graph, and take the score's gradient by each."""
    patterns: dict[int, Tensor] = {}

    def watch(
        layer: int,
        kernel: Kernel,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        if not query.requires_grad:  # the first layer: nothing before it wants a gradient
            query = query.detach().requires_grad_()
        output, patterns[layer] = kernel(module, query, key, value, mask, **arguments)
        return output

    with differentiable(), eager_attention(loaded.model), attention_by(loaded, watch):
        score = out.score(loaded.model(**inputs), settings.target, settings.distractor)
        ordered = [patterns[layer] for layer in range(loaded.anatomy.n_layers)]
        if not score.requires_grad:
            raise CannotMeasure(
                "the answer does not depend on any attention weight by a gradient; open the model in float32, "
                "or use occlusion"
            )
        gradients = torch.autograd.grad(score, ordered)
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise CannotMeasure(
            "a gradient is not finite in this dtype; open the model in float32, or use occlusion"
        )
    return _Traced(score, ordered, gradients)
