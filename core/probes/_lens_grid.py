"""A lens: residuals of chosen points of a model, read as predictions of the next token.

Legend: S shown points (the embedding, after each block, and where asked for between a block's attention and MLP),
N shown positions, C positions with the model's own logits, R rows (points × positions), V vocabulary, K top tokens,
D d_model.

Only residuals at the shown points and positions are kept, [S, N, D]; logits exist for a few rows at a time
(``_distribution.py``). It knows neither settings nor how a residual is translated before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from core.capture import capture, capture_residual
from core.lazy import torch
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
from core.probes._targets import resolve_token
from core.probes._tokens import Encoded
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

SPAN = 64
"""Positions read together; the model's own logits are kept for the last span, as the check."""
Points = Literal["block", "attention"]
Translate = Callable[["Tensor", Sequence["Point"]], "Tensor"]
"""What is done to residuals [S, N, D] before they are read."""


@dataclass(frozen=True)
class Point:
    """One place of the residual stream: after ``layer`` blocks; l + ½ is after attention of block l + 1."""

    layer: float

    @property
    def whole(self) -> bool:
        """After a whole block, or the embedding."""
        return self.layer == int(self.layer)

    @property
    def name(self) -> str:
        """For messages and tables."""
        if self.layer == 0:
            return "embedding"
        return f"layer {int(self.layer)}" if self.whole else f"layer {int(self.layer) + 1} after attention"


def shown_points(n_layers: int, *, stride: int, points: Points) -> list[Point]:
    """Every ``stride``-th layer from the embedding on, and the last; each with its block's middle where asked for."""
    layers = sorted({*range(0, n_layers + 1, stride), n_layers})
    if points == "block":
        return [Point(layer) for layer in layers]
    return [Point(at) for layer in layers for at in (layer - 0.5, layer) if at >= 0]


@dataclass(frozen=True)
class Lens:
    """The lens as arrays over shown points and positions, with what they were read from."""

    grid: Grid
    points: Sequence[Point]
    start: int
    encoded: Encoded
    target: str
    """The one token whose rank is followed at every position; empty: each position's true next token."""
    checked: int
    """Positions at which the last point was held against the model's own logits."""

    @property
    def layers(self) -> np.ndarray:
        """[S]; whole numbers where only whole layers are shown."""
        layers = np.array([point.layer for point in self.points])
        return layers.astype(np.int32) if all(point.whole for point in self.points) else layers

    @property
    def exactness_check(self) -> str:
        """Which identity the grid's exactness gap is of."""
        return (
            f"largest |lens at the last layer − the model's own logits| at the last {self.checked} positions"
        )

    @property
    def target_texts(self) -> list[str]:
        """The followed token of each shown position; empty where there is none."""
        if self.target:
            return [self.target] * (self.encoded.n_tokens - self.start)
        return [*self.encoded.texts[self.start + 1 :], ""]


def read_lens(
    loaded: LoadedModel,
    encoded: Encoded,
    points: Sequence[Point],
    progress: Progress,
    *,
    start: int,
    top_k: int,
    target: str = "",
    precision: UnembeddingPrecision = "model",
    translate: Translate | None = None,
) -> Lens:
    """One forward pass and one reading of every shown cell. Hold ``loaded.lock`` and run without gradients."""
    residual_SND, logits_CV = _forward(loaded, encoded, start, points)
    if translate is not None:
        residual_SND = translate(residual_SND, points)
    followed = resolve_token(loaded, target) if target else None
    ids = [*encoded.ids[start + 1 :], 0] if followed is None else [followed.id] * residual_SND.shape[1]
    read = batch_reader(loaded, precision)
    grid = read_layers(
        read,
        reader(loaded) if precision == "model" else read,
        residual_SND,
        torch.tensor(ids, device=loaded.device),
        points,
        top_k=top_k,
        logits_CV=logits_CV,
        progress=progress,
    )
    return Lens(grid, points, start, encoded, followed.text if followed else "", len(logits_CV))


@dataclass(frozen=True)
class Grid:
    """The lens as arrays: S shown points, N shown positions, K top tokens."""

    top_ids_SNK: np.ndarray
    top_p_SNK: np.ndarray
    entropy_SN: np.ndarray
    kl_SN: np.ndarray
    rank_SN: np.ndarray
    p_target_SN: np.ndarray
    exactness_gap: float

    @classmethod
    def join(cls, batches: list[list[Described]], n_shown: int, *, exactness_gap: float) -> Grid:
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


def _forward(
    loaded: LoadedModel, encoded: Encoded, start: int, points: Sequence[Point]
) -> tuple[Tensor, Tensor]:
    """One forward pass: residuals [S, N, D] of the shown points and positions, and the model's last logits [C, V].

    The middle of a block is the stream before it plus what its attention adds, whether or not the model computes
    that sum (with a parallel residual it does not).
    """
    blocks = loaded.anatomy.blocks
    names = [*(block.path for block in blocks), "final"]
    halves = [int(point.layer) for point in points if not point.whole]
    kept = {names[int(point.layer)] for point in points}

    def keep(path: str, residual_BPD: Tensor) -> Tensor | None:
        return residual_BPD[0, start:].clone() if path in kept else None

    def keep_write(path: str, write: Tensor) -> Tensor:
        return write.reshape(-1, loaded.anatomy.d_model)[start:] * loaded.anatomy.residual_scale

    writes = [blocks[layer].attention_write for layer in halves]
    with (
        capture_residual(loaded, reduce=keep) as residual,
        capture(loaded.model, writes, reduce=keep_write) as added,
    ):
        checked = min(SPAN, encoded.n_tokens - start)
        output = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=checked)
    rows = [
        residual[names[int(point.layer)]]
        if point.whole
        else residual[names[int(point.layer)]] + added[blocks[int(point.layer)].attention_write]
        for point in points
    ]
    return torch.stack(rows), output.logits[0].float()


def read_layers(
    read: Read,
    read_final: Read,
    residual_SND: Tensor,
    targets_N: Tensor,
    points: Sequence[Point],
    *,
    top_k: int,
    logits_CV: Tensor,
    progress: Progress,
) -> Grid:
    """Unembed and describe every shown cell: a span of positions at a time, and within it points in batches.

    The last span is the C positions whose logits the model gave, so that the last point can be held against them.
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
            where=lambda row: points[-1].name,
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
                    where=lambda row, low=low, n=n: points[low + row // n].name,  # type: ignore[misc]
                )
            )
        batches.append([*parts, last])
    return Grid.join(batches, n_shown, exactness_gap=gap)


def _spans(n: int) -> list[slice]:
    """Positions in spans of ``SPAN``, the shorter one first."""
    stops = range(n, 0, -SPAN)
    return [slice(max(0, stop - SPAN), stop) for stop in reversed(stops)]
