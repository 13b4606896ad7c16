"""Gradients of a prompt's answer with respect to the residual stream at one layer's entrance; layer 0 is the embedding.

Legend: B points, P positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from core.capture import capture
from core.intervene import intervene
from core.lazy import torch
from core.models.gradients import differentiable
from core.probes._batching import in_batches
from core.probes._input_game import BATCH_BYTES, Game, row_bytes

if TYPE_CHECKING:
    from torch import Tensor


class Points:
    """f and its gradient at points of the stream before layer ``layer``; every method needs the model's lock."""

    def __init__(self, game: Game, layer: int) -> None:
        self._game = game
        self._layer = layer

    def stream(self, embeddings_PD: Tensor) -> Tensor:
        """The residual stream [P, D] before the layer, when the prompt's embeddings are these."""
        if self._layer == 0:
            return embeddings_PD.clone()
        with capture(self._game.loaded.model, [self._path], inputs=True) as fed:
            self._run(embeddings_PD[None])
        stream_PD: Tensor = fed[self._path][0].clone()
        return stream_PD

    def value(self, points_BPD: Tensor) -> Tensor:
        """f at each point, float64 [B]."""
        values_B: Tensor = self._f(points_BPD).detach()
        return values_B

    def value_and_gradient(self, points_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """f [B] and df/dpoint [B, P, D]."""
        with differentiable():
            points_BPD = points_BPD.detach().clone().requires_grad_()
            f_B = self._f(points_BPD)
            (gradient_BPD,) = torch.autograd.grad(f_B.sum(), points_BPD)
        return f_B.detach(), gradient_BPD

    @property
    def _path(self) -> str:
        return self._game.loaded.anatomy.blocks[self._layer].path

    def _f(self, points_BPD: Tensor) -> Tensor:
        model = self._game.loaded.model
        if self._layer == 0:
            return self._run(points_BPD)
        # What the layers below make of any prompt of this length is replaced whole.
        below_BPD = self._game.embeddings().detach().expand(points_BPD.shape)
        with intervene(model, [self._path], lambda path, stream: points_BPD, inputs=True):
            return self._run(below_BPD)

    def _run(self, embeddings_BPD: Tensor) -> Tensor:
        game = self._game
        output = game.loaded.model(inputs_embeds=embeddings_BPD, use_cache=False, logits_to_keep=1)
        return game.read(output.logits[:, -1])


class StraightPath:
    """The straight line from one stream to another, as functions of α for ``_path_integral``."""

    def __init__(self, game: Game, points: Points, start_PD: Tensor, end_PD: Tensor) -> None:
        self._game, self._points = game, points
        self._start_PD, self._step_PD = start_PD, end_PD - start_PD

    def value(self, alpha_S: np.ndarray) -> np.ndarray:
        """f at each α."""

        def run(points_BPD: Tensor) -> np.ndarray:
            with torch.no_grad():
                return self._points.value(points_BPD).cpu().numpy()

        return np.concatenate(self._batched(alpha_S, run, layers_kept=1))

    def evaluate(self, alpha_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f at each α, and each position's share of the slope [S, P]."""

        def run(points_BPD: Tensor) -> tuple[np.ndarray, np.ndarray]:
            f_B, gradient_BPD = self._points.value_and_gradient(points_BPD)
            share_BP = (gradient_BPD.double() * self._step_PD.double()).sum(-1)
            return f_B.cpu().numpy(), share_BP.cpu().numpy()

        batches = self._batched(alpha_S, run, layers_kept=self._game.loaded.anatomy.n_layers)
        return np.concatenate([f for f, _ in batches]), np.concatenate([share for _, share in batches])

    def _batched(self, alpha_S: np.ndarray, run: Callable[[Tensor], Any], *, layers_kept: int) -> list[Any]:
        device = self._game.loaded.device
        alpha_S11 = torch.as_tensor(alpha_S, dtype=self._start_PD.dtype, device=device)[:, None, None]
        return in_batches(
            len(alpha_S),
            lambda start, stop: run(self._start_PD + alpha_S11[start:stop] * self._step_PD),
            bytes_each=layers_kept * row_bytes(self._game.loaded.anatomy, self._game.n_positions),
            device=device,
            at_most_bytes=BATCH_BYTES * layers_kept if device == "cpu" else None,
        )


def per_player(game: Game, value_P: np.ndarray) -> np.ndarray:
    """Sums over the positions of each player, [N]."""
    return np.array([value_P[list(positions)].sum() for positions in game.players])
