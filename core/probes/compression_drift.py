"""Where a compressed copy departs from its original: layer by layer, token by token, own error against inherited.

Legend: L layers, S = L + 1 points of the residual stream, N shown positions, P prompt positions, D d_model, V
vocabulary.

It reads two models of one shape on one prompt. Which part of the model is to blame is ``restoration.py``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._distribution import Described, Reference, batch_reader, describe
from core.probes._drift import Errors, blocks_on, residuals
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, limit_cells, token_texts
from core.probes._twins import FACTS_AND_NAMES, conditions, encode_for_both
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

SPAN = 64
"""Positions unembedded together."""


class CompressionDriftSettings(Settings):
    """How much to show."""

    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")


def _cost(anatomy: Anatomy, n_tokens: int, settings: CompressionDriftSettings) -> Cost:
    """Three forward passes, and two unembeddings per layer: each costs its share of a forward's parameters."""
    per_layer = 4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff
    head = anatomy.vocab_size * anatomy.d_model
    forward = anatomy.n_layers * per_layer + head
    shown = min(n_tokens, settings.positions or n_tokens)
    lenses = 2 * (anatomy.n_layers + 1) * head * shown / max(1, n_tokens)
    residuals = 4 * 4 * (anatomy.n_layers + 1) * n_tokens * anatomy.d_model
    return Cost(3 + lenses / forward, residuals + 3 * 4 * SPAN * anatomy.vocab_size)


@method(
    "probe",
    title="Compression drift",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2407.09141",
    answers="What did compression break?",
    examples=(
        FACTS_AND_NAMES,
        Example("Code", Prompt("def add(left, right):\n    return left + right\n\nprint(add(1, 2))\n")),
    ),
    cost=_cost,
)
def compression_drift(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: CompressionDriftSettings,
) -> Result:
    """Compare a variant with its original inside, on one prompt.

    Per token: KL(original ‖ variant) of the next token in nats, and whether the top token flipped. Per layer and
    position: the residual stream's relative drift ‖h' − h‖ / ‖h‖, the KL between both logit lenses, and the error of
    one block split exactly in two: its own, f'(h) − f(h), which the variant's block makes on the original's input,
    and the inherited one, f'(h') − f'(h), which it passes on from the layers before. The two add up to the drift as
    vectors; their norms do not.
    """
    started = time.perf_counter()
    encoded = encode_for_both(loaded, reference, prompt)
    start = encoded.start(settings.positions)
    n_layers = loaded.anatomy.n_layers
    limit_cells(n_layers + 1, encoded.n_tokens - start)
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        progress(0, 4, f"running {reference.ref}")
        original_SPD = residuals(reference, encoded, 0)
        progress(1, 4, f"running {loaded.ref}")
        variant_SND = residuals(loaded, encoded, start)
        progress(2, 4, "running each block on the original's input")
        on_original_LND = blocks_on(loaded, encoded, original_SPD, start)
        original_SND = original_SPD[:, start:]
        errors = Errors.of(original_SND, variant_SND, on_original_LND)
        progress(3, 4, "reading both residual streams as predictions")
        lens = _lens(loaded, reference, variant_SND, original_SND, encoded, start)
    cells = _cells(encoded, start, errors, lens, loaded)
    tokens = _token_rows(cells, lens, encoded, start, loaded)
    flips = tokens["flipped"].to_numpy() == "flipped"
    return Result(
        frames={
            "tokens": tokens,
            "ranked": tokens.sort_values(["flipped", "kl_nats"], ascending=[True, False], ignore_index=True),
            "main": cells,
            "layers": _layer_means(cells),
        },
        views=_VIEWS,
        metrics=(
            Metric("kl", float(tokens["kl_nats"].mean()), "nats", "lower", n=len(tokens)),
            Metric("flips", float(flips.mean()), "share", "lower", n=len(tokens)),
            Metric("final_drift", float(errors.drift_SN[-1].mean()), "share", "lower", n=len(tokens)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="compression_drift",
            settings=settings,
            started=started,
            conditions=conditions({"tokens": encoded.n_tokens}, reference, path),
            exactness_gap=errors.gap,
            exactness_check="largest |own + inherited − total error| of a block, as a share of its output's largest value",
        ),
        notes=(
            f"Original: {reference.ref}. Every number compares {loaded.ref} with it on the same tokens.",
            "Layer 0 is the embedding; layer l is the residual stream after l blocks.",
            "One prompt says where and how; how much in general is the evaluation's KL with its interval.",
        ),
    )


_CELL = ("token", "top1_original", "top1_variant", "drift", "own_error", "inherited_error", "lens_kl_nats")
_VIEWS = (
    View(
        "tokens",
        x="position",
        color="kl_nats",
        text="token",
        frame="tokens",
        title="KL of the next token, original to variant",
        unit="nats",
        tooltip=("target", "top1_original", "top1_variant", "flipped", "margin_nats"),
    ),
    View(
        "table",
        x="position",
        color="kl_nats",
        text="token",
        frame="ranked",
        title="Tokens, flipped ones first",
        tooltip=(
            "flipped",
            "target",
            "top1_original",
            "top1_variant",
            "p_target_original",
            "p_target_variant",
            "margin_nats",
        ),
    ),
    *(
        View(
            "heatmap",
            x="position",
            y="layer",
            color=color,
            text="top1_variant",
            title=title,
            unit=unit,
            log=True,
            tooltip=_CELL,
        )
        for color, title, unit in (
            ("lens_kl_nats", "KL between both logit lenses", "nats"),
            ("drift", "Drift of the residual stream", "share"),
            ("own_error", "The block's own error", "share"),
            ("inherited_error", "Error inherited from the layers before", "share"),
        )
    ),
    View(
        "line",
        x="layer",
        y="mean_error",
        color="kind",
        frame="layers",
        title="Error by layer, mean over positions",
        unit="share",
    ),
)


@dataclass(frozen=True)
class _Lens:
    """Both logit lenses at every point and shown position; rows are points × positions, points outermost."""

    original: Described
    variant: Described


def _lens(
    loaded: LoadedModel,
    reference: LoadedModel,
    variant_SND: Tensor,
    original_SND: Tensor,
    encoded: Encoded,
    start: int,
) -> _Lens:
    """Unembed both streams point by point, each with its own head, and describe the variant against the original."""
    targets_N = torch.tensor([*encoded.ids[start + 1 :], 0], device=loaded.model.device)
    read_variant, read_original = batch_reader(loaded), batch_reader(reference)
    originals, variants = [], []
    for point, (variant_ND, original_ND) in enumerate(zip(variant_SND, original_SND, strict=True)):
        for low in range(0, len(targets_N), SPAN):
            span = slice(low, low + SPAN)
            original_RV = read_original(original_ND[span])
            against = Reference.of(original_RV)

            def where(row: int, point: int = point) -> str:
                return f"layer {point}"

            originals.append(describe(original_RV, targets_N[span], top_k=2, where=where))
            variants.append(
                describe(
                    read_variant(variant_ND[span]), targets_N[span], top_k=1, where=where, reference=against
                )
            )
    return _Lens(Described.join(originals), Described.join(variants))


def _cells(encoded: Encoded, start: int, errors: Errors, lens: _Lens, loaded: LoadedModel) -> pd.DataFrame:
    """One row per point of the residual stream and shown position."""
    n_points, n = errors.drift_SN.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_points), n),
            "position": np.tile(np.arange(start, start + n), n_points),
            "token": np.tile(np.array(encoded.texts[start:], dtype=object), n_points),
            "top1_original": token_texts(loaded.tokenizer, lens.original.top_ids_RK[:, 0].tolist()),
            "top1_variant": token_texts(loaded.tokenizer, lens.variant.top_ids_RK[:, 0].tolist()),
            "lens_kl_nats": lens.variant.kl_R.cpu().numpy(),
            "drift": errors.drift_SN.ravel(),
            "own_error": errors.own_SN.ravel(),
            "inherited_error": errors.inherited_SN.ravel(),
        }
    )


def _token_rows(
    cells: pd.DataFrame, lens: _Lens, encoded: Encoded, start: int, loaded: LoadedModel
) -> pd.DataFrame:
    """One row per shown position: what both models finally say."""
    n = encoded.n_tokens - start
    final = cells.iloc[-n:].reset_index(drop=True)
    flipped = lens.original.top_ids_RK[-n:, 0] != lens.variant.top_ids_RK[-n:, 0]
    log_p_RK = lens.original.top_p_RK[-n:].log()
    has_target = np.arange(start, encoded.n_tokens) < encoded.n_tokens - 1
    return pd.DataFrame(
        {
            "position": final["position"],
            "token": final["token"],
            "target": [*encoded.texts[start + 1 :], ""],
            "kl_nats": final["lens_kl_nats"],
            "flipped": np.where(flipped.cpu().numpy(), "flipped", "kept"),
            "top1_original": final["top1_original"],
            "top1_variant": final["top1_variant"],
            "margin_nats": (log_p_RK[:, 0] - log_p_RK[:, 1]).cpu().numpy(),
            "p_target_original": np.where(has_target, lens.original.log_p_target_R[-n:].exp().cpu(), np.nan),
            "p_target_variant": np.where(has_target, lens.variant.log_p_target_R[-n:].exp().cpu(), np.nan),
        }
    )


def _layer_means(cells: pd.DataFrame) -> pd.DataFrame:
    """Long form: layer, kind of error, its mean over positions."""
    names = {"drift": "total", "own_error": "own", "inherited_error": "inherited"}
    means = cells.groupby("layer", as_index=False)[list(names)].mean().rename(columns=names)
    return means.melt("layer", var_name="kind", value_name="mean_error")
