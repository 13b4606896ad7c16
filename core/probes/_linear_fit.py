"""Linear classifiers: fitted exactly, tested on folds that they were not trained on.

Legend: N texts, D d_model, R rank of the training texts, C classes, T targets (label columns fitted together).

Features are standardised on the training texts and the fit runs in their principal axes, which changes nothing: an L2
penalty leaves no weight outside the texts' span, and it is blind to rotation. Knows nothing about models or what
labels mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Classifier = Literal["logistic", "ridge"]
MAX_ITERATIONS = 500
TOLERANCE = 1e-7
_SPAN = 1e-12
"""Principal axes with a smaller share of the largest variance than this are rounding noise."""


@dataclass(frozen=True)
class Fit:
    """Weights on raw (not standardised) features, float64."""

    weight_TDC: Tensor
    bias_TC: Tensor
    gradient: float
    """Largest |gradient| of the mean loss at the solution, in the principal axes; 0 is the exact optimum."""

    def scores(self, x_ND: Tensor) -> Tensor:
        """[T, N, C]: log-odds for a logistic classifier, fitted values for a ridge classifier."""
        return x_ND @ self.weight_TDC + self.bias_TC[:, None]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run many small fits on one thread: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(x_ND: Tensor, y_TN: Ints, *, n_classes: int, classifier: Classifier, l2: float) -> Fit:
    """Minimise (Σ loss + l2/2 · ‖W‖²) / N on standardised features in float64; the bias is not penalised.

    ``logistic``: softmax cross-entropy (scikit-learn's C is 1 / l2, for two classes 2 / l2). ``ridge``: half the squared error to one-hot labels.
    """
    mean_D = x_ND.mean(0)
    scale_D = x_ND.std(0, correction=0)
    scale_D[scale_D <= 1e-12 * x_ND.abs().max()] = 1.0
    z_ND = (x_ND - mean_D) / scale_D
    wide = z_ND.shape[1] > z_ND.shape[0]
    variance_R, axes = torch.linalg.eigh(z_ND @ z_ND.T if wide else z_ND.T @ z_ND)
    kept_R = variance_R > _SPAN * variance_R[-1].clamp(min=1.0)
    variance_R, axes = variance_R[kept_R], axes[:, kept_R]
    axes_DR = z_ND.T @ axes / variance_R.sqrt() if wide else axes
    z_NR = z_ND @ axes_DR
    onehot_TNC = torch.eye(n_classes, dtype=torch.float64)[torch.from_numpy(y_TN)]
    if classifier == "logistic":
        weight_TRC, bias_TC, gradient = _logistic(z_NR, onehot_TNC, variance_R, l2)
    else:
        weight_TRC, bias_TC, gradient = _ridge(z_NR, onehot_TNC, variance_R, l2)
    weight_TDC = axes_DR @ weight_TRC / scale_D[:, None]
    return Fit(weight_TDC, bias_TC - mean_D @ weight_TDC, gradient)


def out_of_fold(
    x_ND: Tensor, y_TN: Ints, fold_N: Ints, *, n_classes: int, classifier: Classifier, l2: float
) -> tuple[Ints, float]:
    """Each text's predicted class [T, N] by the classifier that was fitted without its fold; and the worst gradient."""
    predicted_TN = np.empty_like(y_TN)
    gradient = 0.0
    for fold in np.unique(fold_N):
        test_N = fold_N == fold
        fitted = fit(x_ND[~test_N], y_TN[:, ~test_N], n_classes=n_classes, classifier=classifier, l2=l2)
        predicted_TN[:, test_N] = fitted.scores(x_ND[test_N]).argmax(-1).numpy()
        gradient = max(gradient, fitted.gradient)
    return predicted_TN, gradient


def unseen_groups(groups: Sequence[str], y_N: Ints, *, folds: int, generator: np.random.Generator) -> Ints:
    """A fold per text, equal within a group, every label spread evenly: what is tested was never met in training."""
    label_of: dict[str, int] = {}
    for group in sorted(set(groups)):
        of_group = [int(y) for g, y in zip(groups, y_N, strict=True) if g == group]
        label_of[group] = Counter(of_group).most_common(1)[0][0]
    sizes = Counter(groups)
    shuffled = generator.permutation(sorted(sizes)).tolist()
    order = sorted(shuffled, key=lambda group: (label_of[group], -sizes[group]))
    filled = {label: [0] * folds for label in label_of.values()}
    total = [0] * folds
    fold_of: dict[str, int] = {}
    for group in order:
        of_label = filled[label_of[group]]
        fold = min(range(folds), key=lambda fold: (of_label[fold], total[fold]))
        fold_of[group] = fold
        of_label[fold] += sizes[group]
        total[fold] += sizes[group]
    return np.array([fold_of[group] for group in groups])


def seen_groups(groups: Sequence[str], y_N: Ints, *, folds: int, generator: np.random.Generator) -> Ints:
    """A fold per text that spreads every group and label over all folds: groups are met in training and in testing."""
    fold_N = np.empty(len(groups), dtype=np.int64)
    order = sorted(generator.permutation(len(groups)).tolist(), key=lambda row: (groups[row], int(y_N[row])))
    # Dealt out one after another: a group's rows, however few, never all fall into one fold.
    fold_N[order] = np.arange(len(groups)) % folds
    return fold_N


def _ridge(z_NR: Tensor, onehot_TNC: Tensor, variance_R: Tensor, l2: float) -> tuple[Tensor, Tensor, float]:
    """Normal equations, diagonal in the principal axes; features are centred, so the bias is the labels' mean."""
    bias_TC = onehot_TNC.mean(1)
    right_TRC = z_NR.T @ (onehot_TNC - bias_TC[:, None])
    weight_TRC = right_TRC / (variance_R + l2)[:, None]
    gradient_TRC = z_NR.T @ (z_NR @ weight_TRC) + l2 * weight_TRC - right_TRC
    return weight_TRC, bias_TC, float(gradient_TRC.abs().max()) / len(z_NR)


def _logistic(
    z_NR: Tensor, onehot_TNC: Tensor, variance_R: Tensor, l2: float
) -> tuple[Tensor, Tensor, float]:
    """L-BFGS on all targets together: their losses do not share a weight.

    Each axis is scaled by the loss's curvature along it at W = 0 (variance / 4 + l2), from where few steps are left.
    """
    n, rank = z_NR.shape
    n_targets, _, n_classes = onehot_TNC.shape
    unit_R1 = (variance_R / 4 + l2).rsqrt()[:, None] * n**0.5
    x_NR = torch.cat([z_NR * unit_R1.T, torch.full((n, 1), 2.0, dtype=torch.float64)], 1)
    penalty_R1 = torch.cat([l2 / n * unit_R1.square(), torch.zeros(1, 1, dtype=torch.float64)])
    scaled = torch.zeros(n_targets, rank + 1, n_classes, dtype=torch.float64)

    def loss() -> Tensor:
        """The mean loss; leaves its gradient, written out, in ``scaled.grad``."""
        log_p = (x_NR @ scaled).log_softmax(-1)
        scaled.grad = x_NR.T @ ((log_p.exp() - onehot_TNC) / n) + penalty_R1 * scaled
        value: Tensor = (penalty_R1 * scaled.square()).sum() / 2 - (onehot_TNC * log_p).sum() / n
        return value

    optimiser = torch.optim.LBFGS(
        [scaled],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    optimiser.step(loss)  # type: ignore[no-untyped-call]
    loss()
    assert scaled.grad is not None
    return scaled[:, :-1] * unit_R1, 2 * scaled[:, -1], float(scaled.grad.abs().max())
