"""Train a TopK sparse autoencoder (Gao et al. 2024) on one layer's residual stream.

It gathers the residuals of running text, hands them to ``_sparse_training.py``, and measures what came out on
held-out text. Legend: N rows, D d_model, K active features.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from core.errors import BadInput, CannotMeasure
from core.lazy import torch
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.registry import Settings, method
from core.train._feature_tables import Codes, feature_table, snippet_table
from core.train._residuals import TextParts, cut_text, residual_after
from core.train._sparse_code import METHOD, SparseCode
from core.train._sparse_quality import ROWS_AT_ONCE, Quality, fvu, mean_l0, measure_losses
from core.train._sparse_report import report
from core.train._sparse_training import Fitted, Recipe, fit
from core.train._trained import Trained, bound_to
from core.types import Cost, Documents, Progress, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

OUTLIER_RATIO = 3.0
"""Rows whose norm is more than this many times the median's are attention sinks, and left as they are. In the middle
of SmolLM2 text stays below 1.4 medians, a window's first token is at 150, and a second one that shares the sink at 5:
that one alone was the strongest place of most features."""


class SparseAutoencoderSettings(Settings):
    """Which layer, how much text, and the autoencoder's size."""

    layer: int = Field(
        0, ge=0, le=1000, description="Residual stream after this many blocks; 0: after half of them"
    )
    expansion: int = Field(8, ge=1, le=128, description="Features per dimension of the residual stream")
    k: int = Field(32, ge=1, le=1024, description="Active features per token")
    max_tokens: int = Field(
        65_536, ge=64, le=10_000_000, description="Tokens read, a fifth of them held out to measure on"
    )
    window: int = Field(256, ge=8, le=4096, description="Tokens a model sees at once; capped by its context")
    epochs: float = Field(6.0, gt=0, le=1000, description="Times training sees each token")
    batch: int = Field(1024, ge=8, le=65_536, description="Tokens per training step")
    learning_rate: float = Field(
        1e-3, gt=0, le=1, description="Of Adam; warmed up, and falling to 0 at the end"
    )
    dead_after: int = Field(
        20_000, ge=100, le=100_000_000, description="Tokens without activation after which a feature is dead"
    )
    loss_windows: int = Field(
        8, ge=1, le=1000, description="Held-out windows on which the model's own loss is measured"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the weights and of the order of tokens")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: SparseAutoencoderSettings) -> Cost:
    """Forward passes over ``n_tokens``: the text up to the layer once, and the autoencoder's own products."""
    d = anatomy.d_model
    features = settings.expansion * d
    per_token = anatomy.n_layers * (4 * d * d + 3 * d * anatomy.d_ff) + anatomy.vocab_size * d
    share = _layer(anatomy, settings.layer) / anatomy.n_layers
    own = settings.max_tokens * settings.epochs * 3 * d * features / per_token
    tokens = settings.max_tokens * share + own + 3 * settings.loss_windows * settings.window
    held = 4 * settings.max_tokens * (d + 3 * settings.k) + 8 * 4 * d * features
    return Cost(tokens / max(1, n_tokens), held + 4 * 4 * settings.batch * features)


def _layer(anatomy: Anatomy, layer: int) -> int:
    if layer > anatomy.n_layers:
        raise BadInput(f"layer {layer} does not exist; this model has layers 1 to {anatomy.n_layers}")
    return layer or max(1, anatomy.n_layers // 2)


@method(
    "train",
    title="Sparse autoencoder",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2406.04093",
    cost=_cost,
)
def sparse_autoencoder(
    loaded: LoadedModel, documents: Documents, progress: Progress, settings: SparseAutoencoderSettings
) -> Trained:
    """Learn a dictionary of features for one layer: each token's residual as a sum of k of many directions.

    z = TopK(ReLU(W_e (h − b))), ĥ = W_d z + b, trained to bring ĥ close to h; features that have gone dead are
    revived by reconstructing what the living ones leave (AuxK). FVU is Σ‖h − ĥ‖² / Σ‖h − mean‖² on held-out text.
    CE recovered is (CE_zero − CE_ĥ) / (CE_zero − CE): 1 when the model predicts as well on ĥ as on h, 0 when no
    better than on zeros. The first position of a text and attention sinks (norm above 3 medians) are left as they are.
    """
    started = time.perf_counter()
    layer = _layer(loaded.anatomy, settings.layer)
    n_features = settings.expansion * loaded.anatomy.d_model
    if settings.k > n_features:
        raise BadInput(f"k {settings.k} is more than the {n_features} features; lower k or raise expansion")
    parts = cut_text(loaded, documents, window=settings.window, max_tokens=settings.max_tokens)
    with (
        loaded.lock,
        torch.inference_mode(False),
        torch.no_grad(),
        fast_fp32(settings.fp32_path, n_experts=loaded.anatomy.n_experts) as path,
    ):
        gathered = _Gathered(loaded, parts, layer, part_of(progress, 0.0, 0.4))
        recipe = Recipe(
            n_features,
            settings.k,
            settings.epochs,
            settings.batch,
            settings.learning_rate,
            settings.dead_after,
            settings.seed,
        )
        fitted = fit(gathered.training / gathered.scale, recipe, part_of(progress, 0.4, 0.9))
        code = gathered.code(fitted, settings.k)
        progress(0.9, 1.0, "reading the features' places in the text")
        codes = gathered.codes(code)
        features = feature_table(codes, n_features)
        snippets = snippet_table(codes, gathered.windows, loaded.tokenizer)
        held_out = parts.held_out[: settings.loss_windows]
        losses = measure_losses(loaded, code, layer, held_out, part_of(progress, 0.92, 1.0))
    quality = Quality(
        l0=mean_l0(code, gathered.held_out),
        fvu=fvu(code, gathered.held_out),
        dead_share=float((features["density"] == 0).mean()),
        loss=losses[0],
        loss_reconstructed=losses[1],
        loss_zero=losses[2],
        held_out_tokens=len(gathered.held_out),
        loss_tokens=sum(len(window.ids) - 1 for window in held_out),
    )
    facts = bound_to(
        loaded,
        documents,
        method=METHOD,
        settings=settings,
        layer=layer,
        n_features=n_features,
        k=settings.k,
        scale=code.scale,
        largest_norm=code.largest_norm,
        **quality.facts,
    )
    result = report(
        loaded,
        documents,
        settings,
        quality=quality,
        features=features,
        snippets=snippets,
        curve=fitted.curve,
        conditions={
            "layer": layer,
            "features": n_features,
            "training_tokens": len(gathered.training),
            "held_out_tokens": len(gathered.held_out),
            "sinks_left_out": gathered.n_sinks,
            "threads": torch.get_num_threads(),
            "fp32_path": path.name,
        },
        seconds=time.perf_counter() - started,
    )
    tables = {"features": features, "snippets": snippets}
    return Trained(result=result, tensors=code.tensors, facts=facts, tables=tables)


class _Gathered:
    """The residuals of all windows but each one's first position, sinks left out; training rows first."""

    def __init__(self, loaded: LoadedModel, parts: TextParts, layer: int, progress: Progress) -> None:
        self.windows = (*parts.training, *parts.held_out)
        rows, window_N, position_N = [], [], []
        for index, window in enumerate(self.windows):
            progress(index, len(self.windows), f"reading text: window {index + 1} of {len(self.windows)}")
            rows.append(residual_after(loaded, layer, window)[1:])
            window_N.append(np.full(len(window.ids) - 1, index))
            position_N.append(np.arange(1, len(window.ids)))
        rows_ND = torch.cat(rows)
        if not torch.isfinite(rows_ND).all():
            raise CannotMeasure(
                f"the residual stream after layer {layer} is not finite; open the model in float32"
            )
        norm_N = rows_ND.norm(dim=-1)
        self.largest_norm = OUTLIER_RATIO * float(norm_N.median())
        keep_N = norm_N <= self.largest_norm
        self.n_sinks = int((~keep_N).sum())
        self._rows = rows_ND[keep_N]
        kept = keep_N.cpu().numpy()
        self._window_N = np.concatenate(window_N)[kept]
        self._position_N = np.concatenate(position_N)[kept]
        n_training = int((self._window_N < len(parts.training)).sum())
        self.training, self.held_out = self._rows[:n_training], self._rows[n_training:]
        self.scale = float(self.training.square().mean().sqrt())

    def code(self, fitted: Fitted, k: int) -> SparseCode:
        """The autoencoder for residuals as they are, unscaled."""
        weights = (fitted.encoder_DF, fitted.encoder_bias_F, fitted.decoder_FD, fitted.bias_D)
        return SparseCode(*weights, k, self.scale, self.largest_norm)

    def codes(self, code: SparseCode) -> Codes:
        """Every row's active features."""
        pairs = [code.encode(rows_ND) for rows_ND in torch.split(self._rows, ROWS_AT_ONCE)]
        values_NK, features_NK = (torch.cat(part) for part in zip(*pairs, strict=True))
        return Codes.of(values_NK, features_NK, self._window_N, self._position_N)
