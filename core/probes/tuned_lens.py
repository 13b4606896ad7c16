"""Tuned lens: the logit lens behind a trained translator per layer (Belrose et al. 2023).

It reads an artifact of ``core/train/tuned_lens.py`` and trains nothing. The reading is in ``_lens_grid.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.probes._lens_frames import LENS_VIEWS, lens_frames, lens_metrics, lens_notes
from core.probes._lens_grid import read_lens, shown_points
from core.probes._provenance import provenance
from core.probes._tokens import encode, limit_cells
from core.registry import Example, Settings, method
from core.train._trained import load
from core.train._translators import Translators
from core.types import Cost, Metric, Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class TunedLensProbeSettings(Settings):
    """Which translators, and how much to show."""

    artifact: str = Field("", description="Trained tuned lens: its artifact's hash, or a folder")
    top_k: int = Field(5, ge=1, le=20, description="Top tokens kept per layer and position")
    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")
    layer_stride: int = Field(1, ge=1, le=64, description="Show every n-th layer; the last is always shown")
    target: str = Field(
        "", description="Token whose rank is followed; empty: each position's true next token"
    )
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: TunedLensProbeSettings) -> Cost:
    """One forward pass, and translator and unembedding once per shown cell."""
    d = anatomy.d_model
    per_token = anatomy.n_layers * (4 * d * d + 3 * d * anatomy.d_ff)
    shown = min(settings.positions or n_tokens, n_tokens)
    cells = shown * (anatomy.n_layers // settings.layer_stride + 1)
    forwards = 1 + cells * d * (d + anatomy.vocab_size) / (per_token * max(1, n_tokens))
    return Cost(forwards, 4 * anatomy.n_layers * d * d + 8 * cells * d + 300 * 2**20)


@method(
    "probe",
    title="Tuned lens",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2303.08112",
    answers="What does this layer know?",
    examples=(Example("Where Paris appears", Prompt("The capital of France is"), {"target": " Paris"}),),
    cost=_cost,
)
def tuned_lens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: TunedLensProbeSettings
) -> Result:
    """Read every layer as a prediction, after a trained translator has brought it into the last layer's basis.

    The logit lens reads layer l as if the later layers did nothing: early layers then look as if they predicted
    nonsense. Here h_l first becomes A_l h_l + b_l, trained so that the prediction comes as close as an affine map can
    to the model's own (min E KL(model ‖ lens)). What is left of KL is what later layers really add. The last layer is
    not translated: it is the model.
    """
    started = time.perf_counter()
    learned = load(settings.artifact, method="tuned_lens", loaded=loaded, same_unembedding=True)
    translators = Translators.of(learned)
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    points = shown_points(loaded.anatomy.n_layers, stride=settings.layer_stride, points="block")
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
            translate=lambda residual_SND, shown: translators.translate_all(
                residual_SND, [int(point.layer) for point in shown]
            ),
        )
    held_out = float(sum(learned.facts["kl"]) / len(learned.facts["kl"]))
    return Result(
        frames=lens_frames(loaded, lens),
        views=LENS_VIEWS,
        metrics=(
            *lens_metrics(lens),
            Metric(
                "mean_kl", float(lens.grid.kl_SN[:-1].mean()), "nats", "lower", n=lens.grid.kl_SN[:-1].size
            ),
            Metric("mean_kl_in_training", held_out, "nats", "lower", n=learned.facts["held_out_positions"]),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="tuned_lens",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "fp32_path": path.name,
            },
            exactness_gap=lens.grid.exactness_gap,
            exactness_check=lens.exactness_check,
        ),
        notes=(*lens_notes(lens), *_trained_on(loaded, learned.facts)),
    )


def _trained_on(loaded: LoadedModel, facts: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Translators were trained on {facts['training_tokens']} tokens of {facts['documents']['name']}."
    ]
    if facts["base_fingerprint"] != loaded.fingerprint:
        notes.append(
            "They were trained on the model this variant was made from: KL here holds what compression moved, too."
        )
    return notes
