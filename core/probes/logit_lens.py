"""Logit lens: what the model would predict if it stopped after each layer (nostalgebraist 2020).

Legend: S shown layers, N shown positions, R rows (layers × positions), V vocabulary, K top tokens, D d_model.

Only residuals at the shown positions are kept, [S, N, D]; logits exist for a few rows at a time
(``_distribution.py``). It does not train a translator (tuned lens) and does not look inside a block.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._distribution import (
    Described,
    Read,
    Reference,
    UnembeddingPrecision,
    batch_reader,
    describe,
    reader,
    rows_at_once,
)
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode, limit_cells, token_texts
from core.registry import Settings, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


SPAN = 64
"""Positions read together; the model's own logits are kept for the last span, as the check."""


class LogitLensSettings(Settings):
    """How much to show, and how exactly."""

    top_k: int = Field(5, ge=1, le=20, description="Top tokens kept per layer and position")
    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")
    layer_stride: int = Field(1, ge=1, le=64, description="Show every n-th layer; the last is always shown")
    unembedding_precision: UnembeddingPrecision = Field(
        "model",
        description="model: the model's own arithmetic, exact; bfloat16: a faster, rounded preview",
    )
    fp32_path: Literal["auto", "exact"] = Field(
        "auto",
        description="CPU kernels for float32: auto takes the faster library where a check on this machine "
        "finds it equal to 1e-4, exact leaves torch as it is",
    )


@method("probe", title="Logit lens", needs=["decoder", "text"], paper="https://arxiv.org/abs/2303.08112")
def logit_lens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: LogitLensSettings
) -> Result:
    """Read every layer's residual stream as a prediction of the next token.

    After layer l the residual stream h_l is passed through the model's own final norm, unembedding, scale and
    softcap: softmax(cap(s · W_U · norm(h_l))). Layer 0 is the embedding, the last layer is the model's real output.
    Entropy is in nats; KL is KL(last layer ‖ this layer) in nats; rank 1 is the top token.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    layers = _shown_layers(loaded.anatomy.n_layers, settings.layer_stride)
    limit_cells(len(layers), encoded.n_tokens - start)
    with loaded.lock, torch.inference_mode(), fast_fp32(settings.fp32_path) as path:
        residual_SND, logits_CV = _forward(loaded, encoded, start, layers)
        targets_N = _targets(encoded, start, loaded.device)
        read = batch_reader(loaded, settings.unembedding_precision)
        read_final = reader(loaded) if settings.unembedding_precision == "model" else read
        grid = _read_layers(
            read,
            read_final,
            residual_SND,
            targets_N,
            layers,
            top_k=settings.top_k,
            logits_CV=logits_CV,
            progress=progress,
        )
    cells = _cells(loaded, encoded, start, layers, grid)
    settled = _settling_layers(grid.top_ids_SNK[:, :, 0], layers)
    return Result(
        frames={
            "main": cells,
            "topk": _top_tokens(loaded, start, layers, grid),
            "tokens": _token_strip(cells, layers[-1], settled),
        },
        views=_VIEWS,
        metrics=(
            Metric("settling_layer", float(settled.mean()), "layers", n=len(settled)),
            Metric("final_entropy", float(grid.entropy_SN[-1].mean()), "nats", n=len(settled)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="logit_lens",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "threads": torch.get_num_threads(),
                "fp32_path": path.name,
            },
            exactness_gap=grid.exactness_gap,
            exactness_check="largest |lens at the last layer − the model's own logits| "
            f"at the last {len(logits_CV)} positions",
        ),
        notes=_notes(settings, encoded.n_tokens, start),
        flags=("preview",) if settings.unembedding_precision == "bfloat16" else (),
    )


_TOOLTIP = (
    "token",
    "target",
    "top1",
    "p_top1",
    "entropy_nats",
    "kl_to_final_nats",
    "rank_of_target",
    "p_target",
)
_VIEWS = (
    View(
        "heatmap",
        x="position",
        y="layer",
        color="entropy_nats",
        text="top1",
        title="Entropy of each layer's prediction",
        unit="nats",
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="kl_to_final_nats",
        text="top1",
        title="Distance to the final prediction (KL)",
        unit="nats",
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="rank_of_target",
        text="top1",
        title="Rank of the true next token",
        log=True,
        tooltip=_TOOLTIP,
    ),
    View(
        "tokens",
        x="position",
        color="settling_layer",
        text="token",
        frame="tokens",
        title="Layer from which the prediction stays",
        unit="layer",
        tooltip=("target", "final_top1", "final_entropy_nats"),
    ),
    View(
        "table",
        x="position",
        y="layer",
        color="probability",
        text="token",
        frame="topk",
        title="Top tokens of one cell",
        tooltip=("rank", "token_id"),
    ),
)


@dataclass(frozen=True)
class _Grid:
    """The lens as arrays: S shown layers, N shown positions, K top tokens."""

    top_ids_SNK: np.ndarray
    top_p_SNK: np.ndarray
    entropy_SN: np.ndarray
    kl_SN: np.ndarray
    rank_SN: np.ndarray
    p_target_SN: np.ndarray
    exactness_gap: float

    @classmethod
    def join(cls, batches: list[list[Described]], n_shown: int, *, exactness_gap: float) -> _Grid:
        """Put position batches, each a list of layer batches in order, side by side."""

        def grid(field: str) -> np.ndarray:
            columns = [torch.cat([getattr(part, field) for part in parts]) for parts in batches]
            joined = torch.cat([column.reshape(n_shown, -1, *column.shape[1:]) for column in columns], dim=1)
            return joined.cpu().numpy()

        return cls(
            grid("top_ids_RK"),
            grid("top_p_RK"),
            grid("entropy_R"),
            grid("kl_R"),
            grid("rank_R"),
            np.exp(grid("log_p_target_R")),
            exactness_gap,
        )


def _shown_layers(n_layers: int, stride: int) -> list[int]:
    """Every ``stride``-th layer from the embedding (0) on, and the last."""
    return sorted({*range(0, n_layers + 1, stride), n_layers})


def _forward(loaded: LoadedModel, encoded: Encoded, start: int, layers: list[int]) -> tuple[Tensor, Tensor]:
    """One forward pass: residuals [S, N, D] of the shown layers and positions, and the model's last logits [C, V]."""
    names = [*(block.path for block in loaded.anatomy.blocks), "final"]
    shown = {names[layer] for layer in layers}

    def keep(path: str, residual_BPD: Tensor) -> Tensor | None:
        return residual_BPD[0, start:].clone() if path in shown else None

    with capture_residual(loaded, reduce=keep) as residual:
        checked = min(SPAN, encoded.n_tokens - start)
        output = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=checked)
    return torch.stack([residual[names[layer]] for layer in layers]), output.logits[0].float()


def _targets(encoded: Encoded, start: int, device: str) -> Tensor:
    """The true next token of each shown position; the last has none and gets token 0, blanked in ``_cells``."""
    return torch.tensor([*encoded.ids[start + 1 :], 0], device=device)


def _read_layers(
    read: Read,
    read_final: Read,
    residual_SND: Tensor,
    targets_N: Tensor,
    layers: list[int],
    *,
    top_k: int,
    logits_CV: Tensor,
    progress: Progress,
) -> _Grid:
    """Unembed and describe every shown cell: a span of positions at a time, and within it layers in batches.

    The last span is the C positions whose logits the model gave, so that the last layer can be held against them.
    """
    n_shown, n_positions, _ = residual_SND.shape
    batches: list[list[Described]] = []
    for span in _spans(n_positions):
        progress(span.start, n_positions, "reading the residual stream as predictions")
        final_NV = read_final(residual_SND[-1, span])
        gap = (
            float((final_NV[-len(logits_CV) :] - logits_CV).abs().max()) if span.stop == n_positions else 0.0
        )
        reference = Reference.of(final_NV)
        last = describe(
            final_NV,
            targets_N[span],
            top_k=top_k,
            reference=reference,
            where=lambda row: f"layer {layers[-1]}",
        )
        n = span.stop - span.start
        at_once = max(1, rows_at_once(logits_CV.shape[-1]) // n)
        parts = []
        for low in range(0, n_shown - 1, at_once):
            high = min(low + at_once, n_shown - 1)
            parts.append(
                describe(
                    read(residual_SND[low:high, span].flatten(0, 1)),
                    targets_N[span],
                    top_k=top_k,
                    reference=reference,
                    where=lambda row, low=low, n=n: f"layer {layers[low + row // n]}",  # type: ignore[misc]
                )
            )
        batches.append([*parts, last])
    return _Grid.join(batches, n_shown, exactness_gap=gap)


def _spans(n: int) -> list[slice]:
    """Positions in spans of ``SPAN``, the shorter one first."""
    stops = range(n, 0, -SPAN)
    return [slice(max(0, stop - SPAN), stop) for stop in reversed(stops)]


def _cells(loaded: LoadedModel, encoded: Encoded, start: int, layers: list[int], grid: _Grid) -> pd.DataFrame:
    """One row per shown layer and position, layers outermost."""
    n_shown, n = grid.entropy_SN.shape
    positions = np.arange(start, start + n)
    has_target_N = positions < encoded.n_tokens - 1
    has_target = np.tile(has_target_N, n_shown)
    targets = [*encoded.texts[start + 1 :], ""]
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, n),
            "position": np.tile(positions, n_shown),
            "token": np.tile(np.array(encoded.texts[start:], dtype=object), n_shown),
            "target": np.tile(np.array(targets, dtype=object), n_shown),
            "top1": token_texts(loaded.tokenizer, grid.top_ids_SNK[:, :, 0].ravel().tolist()),
            "p_top1": grid.top_p_SNK[:, :, 0].ravel(),
            "entropy_nats": grid.entropy_SN.ravel(),
            "kl_to_final_nats": grid.kl_SN.ravel(),
            "rank_of_target": np.where(has_target, grid.rank_SN.ravel(), np.nan),
            "p_target": np.where(has_target, grid.p_target_SN.ravel(), np.nan),
        }
    )


def _top_tokens(loaded: LoadedModel, start: int, layers: list[int], grid: _Grid) -> pd.DataFrame:
    """One row per shown layer, position and rank; narrow numbers, since this frame is the largest to cross the pipe."""
    n_shown, n, k = grid.top_ids_SNK.shape
    ids = grid.top_ids_SNK.ravel()
    layer = np.repeat(np.array(layers, dtype=np.int32), n * k)
    position = np.repeat(np.arange(start, start + n, dtype=np.int32), k)
    return pd.DataFrame(
        {
            "layer": layer,
            "position": np.tile(position, n_shown),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), n_shown * n),
            "token_id": ids.astype(np.int32),
            "token": token_texts(loaded.tokenizer, ids.tolist()),
            "probability": grid.top_p_SNK.ravel(),
        }
    )


def _token_strip(cells: pd.DataFrame, last_layer: int, settled_N: np.ndarray) -> pd.DataFrame:
    """One row per position: where its prediction settled, and what the model finally says."""
    final = cells[cells["layer"] == last_layer]
    return pd.DataFrame(
        {
            "position": final["position"].to_numpy(),
            "token": final["token"].to_numpy(),
            "target": final["target"].to_numpy(),
            "settling_layer": settled_N,
            "final_top1": final["top1"].to_numpy(),
            "final_entropy_nats": final["entropy_nats"].to_numpy(),
        }
    )


def _settling_layers(top1_SN: np.ndarray, layers: list[int]) -> np.ndarray:
    """Per position the first shown layer from which the top token never changes again."""
    differs_SN = top1_SN != top1_SN[-1]
    n_until_settled_N = len(layers) - np.argmax(differs_SN[::-1], axis=0)
    return np.where(differs_SN.any(axis=0), np.array(layers)[n_until_settled_N % len(layers)], layers[0])


def _notes(settings: LogitLensSettings, n_tokens: int, start: int) -> tuple[str, ...]:
    notes = ["Layer 0 is the embedding; layer l is the residual stream after l blocks."]
    if start:
        notes.append(f"The last {n_tokens - start} of {n_tokens} positions are shown.")
    if settings.unembedding_precision == "bfloat16":
        notes.append("Preview: the unembedding was rounded to bfloat16; about 1 in 60 top tokens may differ.")
    return tuple(notes)
