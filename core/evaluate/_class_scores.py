"""From two models' class distributions on labelled examples to numbers, whatever the examples are.

Knows probabilities and labels, no model and no example. Legend: N examples, B of a batch, C classes, R draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.evaluate._intervals import Bootstrap, Floats, Interval
from core.lazy import torch
from core.types import Metric

if TYPE_CHECKING:
    from torch import Tensor

Labels = NDArray[np.int64]


def scores_of(log_p_BC: Tensor, log_q_BC: Tensor, label_B: Labels) -> dict[str, list[float]]:
    """Per example: both first classes, both probabilities of the label, and KL(base‖variant) in nats."""
    each = torch.arange(len(label_B)), torch.tensor(label_B)
    return {
        "top_base": log_p_BC.argmax(-1).tolist(),
        "top": log_q_BC.argmax(-1).tolist(),
        "p_label_base": log_p_BC[each].exp().tolist(),
        "p_label": log_q_BC[each].exp().tolist(),
        "kl": (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(-1).clamp(min=0).tolist(),
    }


def class_metrics(
    scores: pd.DataFrame,
    label_N: Labels,
    bootstrap: Bootstrap,
    *,
    example: str,
    share: Callable[[Floats], Interval],
    same: bool,
) -> tuple[Metric, ...]:
    """kl, accuracy, accuracy_base, top1_agreement, flips, delta_accuracy.

    ``example`` is what one is called in the unit of the KL; ``share`` gives the interval of a share of hits; ``same``
    says that the variant is the base, whose distance to itself is known.
    """
    one_N = np.ones(len(label_N))
    kl_N = scores["kl"].to_numpy()
    agree_N, was_N, is_N = (
        np.asarray(hits, dtype=np.float64)
        for hits in (
            scores["top"] == scores["top_base"],
            scores["top_base"] == label_N,
            scores["top"] == label_N,
        )
    )

    def metric(
        name: str, values_N: Floats, unit: str, better: Literal["lower", "higher"], between: Interval
    ) -> Metric:
        value = float(values_N.mean())
        return Metric(name, value, unit, better, len(values_N), between.low, between.high, between.how)

    def compared(
        name: str, values_N: Floats, unit: str, better: Literal["lower", "higher"], between: Interval
    ) -> Metric:
        exact = Interval.exact(float(values_N.mean()), "the variant is the base itself")
        return metric(name, values_N, unit, better, exact if same else between)

    changed_N = np.abs(is_N - was_N)
    return (
        compared("kl", kl_N, f"nats/{example}", "lower", bootstrap.ratio(kl_N, one_N)),
        metric("accuracy", is_N, "share", "higher", share(is_N)),
        metric("accuracy_base", was_N, "share", "higher", share(was_N)),
        compared("top1_agreement", agree_N, "share", "higher", share(agree_N)),
        compared("flips", changed_N, "share", "lower", share(changed_N)),
        compared("delta_accuracy", is_N - was_N, "share", "higher", bootstrap.ratio(is_N - was_N, one_N)),
    )


def macro_f1_metrics(scores: pd.DataFrame, label_N: Labels, bootstrap: Bootstrap) -> tuple[Metric, ...]:
    """The mean of the classes' F1, of the variant and of the base, with bootstrap intervals.

    A class that occurs neither among labels nor answers has no F1 and is left out, also of a draw.
    """
    found = []
    for name, column in (("macro_f1", "top"), ("macro_f1_base", "top_base")):
        answer_N = scores[column].to_numpy().astype(np.int64)
        value = float(macro_f1(np.ones((1, len(label_N)), np.int64), label_N, answer_N)[0])
        of_draws = bootstrap.of(
            lambda counts_RN, answer_N=answer_N: macro_f1(counts_RN, label_N, answer_N)  # type: ignore[misc]
        )
        found.append(
            Metric(name, value, "share", "higher", len(label_N), of_draws.low, of_draws.high, of_draws.how)
        )
    return tuple(found)


def macro_f1(counts_RN: NDArray[np.int64], label_N: Labels, answer_N: Labels) -> Floats:
    """[R] mean over classes of 2 TP / (labels + answers), each example counted so many times in each draw."""
    n_classes = int(max(label_N.max(), answer_N.max())) + 1
    labelled_NC, answered_NC = (np.eye(n_classes)[values] for values in (label_N, answer_N))
    counts = counts_RN.astype(np.float64)
    right_RC = counts @ (labelled_NC * answered_NC)
    there_RC = counts @ (labelled_NC + answered_NC)
    f1_RC = np.divide(2 * right_RC, there_RC, out=np.full_like(there_RC, np.nan), where=there_RC > 0)
    mean_R: Floats = np.nanmean(f1_RC, axis=1)
    return mean_R


def flip(was_right: NDArray[np.bool_], is_right: NDArray[np.bool_]) -> NDArray[np.str_]:
    """``lost``, ``gained`` or nothing, per example."""
    return np.select([was_right & ~is_right, ~was_right & is_right], ["lost", "gained"], "")


def by_class(frame: pd.DataFrame, *, counted: str) -> pd.DataFrame:
    """Accuracy and KL per label of a frame with label, answer_base, answer and kl; ``counted`` names the count."""
    right = frame.assign(
        right_base=frame["answer_base"] == frame["label"], right=frame["answer"] == frame["label"], one=1
    )
    return right.groupby("label", as_index=False).agg(
        **{counted: ("one", "sum")},
        accuracy_base=("right_base", "mean"),
        accuracy=("right", "mean"),
        kl=("kl", "mean"),
    )
