"""What a sparse autoencoder keeps of a layer: sparsity, unexplained variance, and the model's own loss on its output.

Legend: P positions of a window, N rows, R rows of one batch, D d_model, K active features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from core.capture import capture
from core.intervene import intervene
from core.lazy import torch
from core.models.readout import unembed
from core.train._residuals import TextWindow, run_window
from core.train._sparse_code import SparseCode
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

ROWS_AT_ONCE = 2048
LOGIT_ROWS = 64


@dataclass(frozen=True)
class Quality:
    """What an autoencoder keeps of a layer, on held-out text. Losses in nats per token."""

    l0: float
    fvu: float
    dead_share: float
    loss: float
    loss_reconstructed: float
    loss_zero: float
    held_out_tokens: int
    loss_tokens: int

    @property
    def ce_recovered(self) -> float | None:
        """(CE_zero − CE_ĥ) / (CE_zero − CE); None where the layer is no help to the model, so nothing can be lost."""
        if self.loss_zero <= self.loss:
            return None
        return (self.loss_zero - self.loss_reconstructed) / (self.loss_zero - self.loss)

    @property
    def facts(self) -> dict[str, float | None]:
        """For the artifact."""
        return {**asdict(self), "ce_recovered": self.ce_recovered}


def mean_l0(code: SparseCode, rows_ND: Tensor) -> float:
    """Mean number of active features per row."""
    parts = (code.encode(part)[0] for part in torch.split(rows_ND, ROWS_AT_ONCE))
    return sum(int((values_NK > 0).sum()) for values_NK in parts) / len(rows_ND)


def fvu(code: SparseCode, rows_ND: Tensor) -> float:
    """Share of variance that the reconstruction leaves unexplained."""
    left = sum(
        float((part - code.reconstruct(part)).double().square().sum())
        for part in torch.split(rows_ND, ROWS_AT_ONCE)
    )
    return left / float((rows_ND - rows_ND.mean(0)).double().square().sum())


def measure_losses(
    loaded: LoadedModel, code: SparseCode, layer: int, windows: tuple[TextWindow, ...], progress: Progress
) -> tuple[float, float, float]:
    """The model's mean loss (nats per token) on these windows: as it is, on reconstructions, and on zeros."""
    path = loaded.anatomy.blocks[layer - 1].path

    def zeros(residual_ND: Tensor) -> Tensor:
        return torch.zeros_like(residual_ND)

    edits: list[Callable[[Tensor], Tensor] | None] = [None, code.reconstruct, zeros]
    sums = [0.0, 0.0, 0.0]
    for index, window in enumerate(windows):
        for which, edit in enumerate(edits):
            progress(3 * index + which, 3 * len(windows), "measuring the model's loss on reconstructions")
            if edit is None:
                sums[which] += _loss(loaded, window)
            else:
                with intervene(loaded.model, [path], _Replace(code, edit)):
                    sums[which] += _loss(loaded, window)
    n = sum(len(window.ids) - 1 for window in windows)
    return sums[0] / n, sums[1] / n, sums[2] / n


@dataclass(frozen=True)
class _Replace:
    """Change all readable positions but the first."""

    code: SparseCode
    edit: Callable[[Tensor], Tensor]

    def __call__(self, path: str, hidden_BPD: Tensor) -> Tensor:
        changed_BPD = hidden_BPD.clone()
        chosen_P = self.code.readable(hidden_BPD[0])
        chosen_P[0] = False
        changed_BPD[0, chosen_P] = self.edit(hidden_BPD[0, chosen_P])
        return changed_BPD


def _loss(loaded: LoadedModel, window: TextWindow) -> float:
    """Summed loss of a window's tokens but the first, a few rows of logits at a time."""
    last = loaded.anatomy.blocks[-1].path
    with capture(loaded.model, [last]) as residual:
        run_window(loaded, window)
    residual_PD = residual[last][0, :-1]
    targets_P = torch.tensor(window.ids[1:], device=residual_PD.device)
    total = 0.0
    for rows_RD, targets_R in zip(
        torch.split(residual_PD, LOGIT_ROWS), torch.split(targets_P, LOGIT_ROWS), strict=True
    ):
        logits_RV = unembed(loaded.model, loaded.anatomy, rows_RD).float()
        total += float(torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="sum"))
    return total
