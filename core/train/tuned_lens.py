"""Train a tuned lens (Belrose et al. 2023): one affine translator per layer, by KL to the model's own prediction.

Two steps, each kept only where it helps on held-out text. *Regression*: the weighted least-squares map from a
layer's residuals to the last one's, in closed form over all tokens read. *Descent*: Adam on KL(model ‖ lens) over
fewer positions, since every one of them costs the whole vocabulary once per layer. A layer that neither improves
keeps the identity, which is the logit lens.

Legend: L translated layers (0 … n_layers − 1), Q stored positions, R rows of one batch, V vocabulary, D d_model.
Residuals of Q positions are the only thing held, [Q, L + 1, D]; logits exist for one batch and one layer at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from core.capture import capture_residual
from core.errors import CannotMeasure
from core.lazy import torch
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.gradients import require_gradients
from core.registry import Settings, method
from core.train._lens_descent import Best, descend
from core.train._lens_moments import Moments
from core.train._lens_report import report
from core.train._residuals import TextParts, TextWindow, cut_text, run_window, spread_positions
from core.train._trained import Trained, bound_to
from core.train._translators import Translators
from core.types import Cost, Documents, Progress, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class TunedLensSettings(Settings):
    """How much text, and how long to descend."""

    max_tokens: int = Field(
        16_384, ge=64, le=10_000_000, description="Tokens read, a fifth of them held out to measure on"
    )
    window: int = Field(256, ge=8, le=4096, description="Tokens a model sees at once; capped by its context")
    positions: int = Field(
        2048, ge=8, le=200_000, description="Positions the descent learns from, spread over the text"
    )
    held_out_positions: int = Field(
        384, ge=8, le=20_000, description="Held-out positions on which KL is measured"
    )
    regression: bool = Field(True, description="Start from least squares; otherwise from the identity")
    epochs: float = Field(
        2.0, ge=0, le=100, description="Times the descent sees each position; 0: no descent"
    )
    batch: int = Field(32, ge=1, le=1024, description="Positions per step of the descent")
    learning_rate: float = Field(
        1e-4, gt=0, le=1, description="Of Adam, falling linearly to 0; residuals are scaled to unit size"
    )
    checks: int = Field(2, ge=1, le=20, description="Times held-out KL is measured during the descent")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the order of positions")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: TunedLensSettings) -> Cost:
    """Forward passes over ``n_tokens``: the text once, and the unembedding of every layer's chosen positions."""
    d, layers = anatomy.d_model, anatomy.n_layers
    per_token = layers * (4 * d * d + 3 * d * anatomy.d_ff) + anatomy.vocab_size * d
    lens_rows = settings.positions * settings.epochs * 3 + settings.held_out_positions * (settings.checks + 2)
    tokens = settings.max_tokens + lens_rows * layers * anatomy.vocab_size * d / per_token
    held = 4 * d * (layers + 1) * (settings.positions + settings.held_out_positions)
    learned = 4 * 4 * layers * d * d + 2 * 8 * layers * d * d
    logits = 4 * 4 * anatomy.vocab_size * settings.batch
    return Cost(tokens / max(1, n_tokens), held + learned + logits)


@method(
    "train",
    title="Tuned lens",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2303.08112",
    cost=_cost,
)
def tuned_lens(
    loaded: LoadedModel, documents: Documents, progress: Progress, settings: TunedLensSettings
) -> Trained:
    """Learn what each layer is about to say: an affine map per layer that brings it into the last layer's basis.

    The logit lens reads a layer as if the remaining ones did nothing. A tuned lens first applies a translator
    A_l h + b_l, trained so that the model's own norm and unembedding then give the model's final prediction:
    min E KL(model ‖ lens_l). A translator that does not beat the logit lens on held-out text is not kept.
    """
    started = time.perf_counter()
    parts = cut_text(loaded, documents, window=settings.window, max_tokens=settings.max_tokens)
    with (
        loaded.lock,
        torch.inference_mode(False),
        torch.no_grad(),
        fast_fp32(settings.fp32_path, n_experts=loaded.anatomy.n_experts) as path,
    ):
        if settings.epochs:
            require_gradients(loaded)
        seen = _read(loaded, parts, settings, part_of(progress, 0.0, 0.3))
        scale_LD = seen.training_QLD.square().mean(0).sqrt().clamp(min=1e-6)
        start = seen.regression(scale_LD) if settings.regression else Translators.identity(loaded)
        best = Best(loaded, seen.held_out_QLD, settings.batch)
        best.offer("logit lens", Translators.identity(loaded), part_of(progress, 0.3, 0.35))
        if settings.regression:
            best.offer("regression", start, part_of(progress, 0.35, 0.4))
        descend(loaded, seen.training_QLD, scale_LD, start, best, settings, part_of(progress, 0.4, 1.0))
    facts = bound_to(
        loaded,
        documents,
        method="tuned_lens",
        settings=settings,
        training_tokens=parts.n_training,
        held_out_positions=len(seen.held_out_QLD),
        kl_logit_lens=best.curves[0].kl_L.tolist(),
        kl=best.kl_L.tolist(),
    )
    result = report(
        loaded,
        documents,
        settings,
        curves=best.curves,
        kept=best.kept,
        kl_L=best.kl_L,
        conditions={
            "training_tokens": parts.n_training,
            "training_positions": len(seen.training_QLD),
            "held_out_positions": len(seen.held_out_QLD),
            "threads": torch.get_num_threads(),
            "fp32_path": path.name,
        },
        seconds=time.perf_counter() - started,
    )
    tensors = {"delta": best.found.delta_LDD, "bias": best.found.bias_LD}
    return Trained(result=result, tensors=tensors, facts=facts)


@dataclass
class _Seen:
    """What one pass over the text leaves: moments of all tokens, residuals of the chosen positions."""

    moments: Moments
    training_QLD: Tensor
    held_out_QLD: Tensor

    def regression(self, scale_LD: Tensor) -> Translators:
        """Least squares from each layer to the last one."""
        return self.moments.solve(scale_LD[:-1])


def _read(loaded: LoadedModel, parts: TextParts, settings: TunedLensSettings, progress: Progress) -> _Seen:
    """One forward pass per window."""
    anatomy = loaded.anatomy
    moments = Moments(anatomy.n_layers, anatomy.d_model, loaded.device)
    total = len(parts.training) + len(parts.held_out)

    def read(windows: tuple[TextWindow, ...], n: int, before: int, learn: bool) -> Tensor:
        kept = []
        for index, (window, positions) in enumerate(zip(windows, spread_positions(windows, n), strict=True)):
            progress(before + index, total, f"reading text: window {before + index + 1} of {total}")
            if not positions and not learn:
                continue
            with capture_residual(loaded) as residual:
                run_window(loaded, window)
            stream_LPD = torch.cat(list(residual.values())).float()
            if learn and settings.regression:
                moments.add(stream_LPD[:, 1:])
            kept.append(stream_LPD[:, positions].transpose(0, 1))
        return torch.cat(kept)

    training = read(parts.training, settings.positions, 0, True)
    held_out = read(parts.held_out, settings.held_out_positions, len(parts.training), False)
    for name, stored in (("training", training), ("held-out", held_out)):
        if not torch.isfinite(stored).all():
            raise CannotMeasure(
                f"the residual stream over the {name} text is not finite; open the model in float32"
            )
    return _Seen(moments, training, held_out)
