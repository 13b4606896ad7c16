"""Logit lens: what the model would predict if it stopped after each layer (nostalgebraist 2020).

It does not train a translator: that is the tuned lens. The reading is in ``_lens_grid.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.probes._distribution import UnembeddingPrecision
from core.probes._lens_frames import LENS_VIEWS, lens_frames, lens_metrics, lens_notes
from core.probes._lens_grid import Points, read_lens, shown_points
from core.probes._provenance import provenance
from core.probes._tokens import encode, limit_cells
from core.registry import Example, Settings, method
from core.types import Cost, Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class LogitLensSettings(Settings):
    """How much to show, and how exactly."""

    top_k: int = Field(5, ge=1, le=20, description="Top tokens kept per layer and position")
    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")
    layer_stride: int = Field(1, ge=1, le=64, description="Show every n-th layer; the last is always shown")
    points: Points = Field(
        "block", description="Read after each block, or also in its middle: after attention, before the MLP"
    )
    target: str = Field(
        "", description="Token whose rank is followed; empty: each position's true next token"
    )
    unembedding_precision: UnembeddingPrecision = Field(
        "model",
        description="model: the model's own arithmetic, exact; bfloat16: a faster, rounded preview",
    )
    fp32_path: Fp32Setting = Field(
        "auto",
        description="CPU kernels for float32: auto takes the faster library where a check on this machine "
        "finds it equal to 1e-4, exact leaves torch as it is",
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: LogitLensSettings) -> Cost:
    """One forward pass, and the unembedding once per shown cell."""
    d = anatomy.d_model
    per_token = anatomy.n_layers * (4 * d * d + 3 * d * anatomy.d_ff)
    shown = min(settings.positions or n_tokens, n_tokens)
    n_points = len(shown_points(anatomy.n_layers, stride=settings.layer_stride, points=settings.points))
    cells = n_points * shown
    forwards = 1 + cells * anatomy.vocab_size * d / (per_token * max(1, n_tokens))
    return Cost(forwards, 4 * cells * d + 300 * 2**20)


@method(
    "probe",
    title="Logit lens",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2303.08112",
    answers="What does this layer know?",
    examples=(
        Example("Where Paris appears", Prompt("The capital of France is"), {"target": " Paris"}),
        Example(
            "Attention or MLP?",
            Prompt("The capital of France is"),
            {"points": "attention", "target": " Paris"},
        ),
    ),
    cost=_cost,
)
def logit_lens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: LogitLensSettings
) -> Result:
    """Read every layer's residual stream as a prediction of the next token.

    After layer l the residual stream h_l is passed through the model's own final norm, unembedding, scale and
    softcap: softmax(cap(s · W_U · norm(h_l))). Layer 0 is the embedding, the last layer is the model's real output.
    Entropy is in nats; KL is KL(last layer ‖ this layer) in nats; rank 1 is the top token, and ↑3 says that the
    target rose three places since the row before.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    points = shown_points(loaded.anatomy.n_layers, stride=settings.layer_stride, points=settings.points)
    limit_cells(len(points), encoded.n_tokens - start)
    with (
        loaded.lock,
        torch.inference_mode(),
        fast_fp32(settings.fp32_path, n_experts=loaded.anatomy.n_experts) as path,
    ):
        lens = read_lens(
            loaded,
            encoded,
            points,
            progress,
            start=start,
            top_k=settings.top_k,
            target=settings.target,
            precision=settings.unembedding_precision,
        )
    preview = settings.unembedding_precision == "bfloat16"
    rounded = ["Preview: the unembedding was rounded to bfloat16; about 1 in 60 top tokens may differ."]
    return Result(
        frames=lens_frames(loaded, lens),
        views=LENS_VIEWS,
        metrics=lens_metrics(lens),
        provenance=provenance(
            loaded,
            prompt,
            method="logit_lens",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "fp32_path": path.name,
            },
            exactness_gap=lens.grid.exactness_gap,
            exactness_check=lens.exactness_check,
        ),
        notes=(*lens_notes(lens), *_parallel(loaded, settings), *(rounded if preview else [])),
        flags=("preview",) if preview else (),
    )


def _parallel(loaded: LoadedModel, settings: LogitLensSettings) -> tuple[str, ...]:
    if settings.points == "block" or not loaded.anatomy.parallel_residual:
        return ()
    return (
        "Attention and MLP of a block read the same stream here: no part of the model ever sees its middle.",
    )
