"""What linear probes found, as a table, headline numbers, sentences and views. It fits nothing.

Legend: N texts, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from core.evaluate._intervals import Bootstrap, Interval, wilson
from core.probes._linear_fit import Floats, Ints
from core.text.labelled import Labelled
from core.types import Metric, View

DRAWS = 1_000
SHUFFLED_SIGMAS = 4
"""Shuffled labels read this much better than chance mean that the folds leak; over tens of layers 3 σ is met by luck."""


@dataclass
class Layers:
    """What was predicted at each layer, appended layer by layer."""

    labels_N: Ints
    shuffled_N: Ints
    controls_TN: Ints
    data: Labelled
    gradient: float = 0.0
    right: dict[str, list[Floats]] = field(default_factory=dict)
    """Series → per layer, per text: 1.0 where the prediction was right."""

    def add(self, unseen_TN: Ints, seen_TN: Ints, twin_N: Ints | None) -> None:
        """Predictions of one more layer: (labels, shuffled), control tasks, and the random twin's."""
        rows: dict[str, Any] = {
            "accuracy": unseen_TN[0] == self.labels_N,
            "control_accuracy": (seen_TN == self.controls_TN).mean(0),
            "shuffled_accuracy": unseen_TN[1] == self.shuffled_N,
        }
        if twin_N is not None:
            rows["twin_accuracy"] = twin_N == self.labels_N
        for name, right_N in rows.items():
            self.right.setdefault(name, []).append(right_N.astype(np.float64))

    @property
    def majority(self) -> float:
        """Share of texts that have the commonest label: what knowing nothing about a text is worth."""
        return float(np.bincount(self.labels_N).max() / len(self.labels_N))

    @property
    def memorable(self) -> float:
        """Share of texts whose group has another text: only there can a control task be learned by heart."""
        counts = pd.Series(self.data.groups).value_counts()
        return float((counts[list(self.data.groups)].to_numpy() > 1).mean())

    def flags(self, frame: pd.DataFrame) -> tuple[str, ...]:
        """Why the accuracies must be read with care."""
        n = len(self.labels_N)
        sigma = np.sqrt(self.majority * (1 - self.majority) / n)
        found = []
        if frame["shuffled_accuracy"].max() > self.majority + SHUFFLED_SIGMAS * sigma:
            found.append("shuffled_labels_learned")
        if self.memorable < 0.5:
            found.append("weak_control")
        return tuple(found)


def table(layers: Layers, data: Labelled) -> pd.DataFrame:
    """One row per layer: every series' share of texts read right, the accuracy with its 95 % interval."""
    groups, owner_N = np.unique(np.array(data.groups), return_inverse=True)
    trials_G = np.bincount(owner_N).astype(np.float64)
    bootstrap = Bootstrap(len(groups), draws=DRAWS, seed=0, unit="groups")
    rows = []
    for layer, right_N in enumerate(layers.right["accuracy"]):
        hits_G = np.bincount(owner_N, weights=right_N).astype(np.float64)
        interval = _interval(bootstrap, hits_G, trials_G)
        row: dict[str, Any] = {name: float(values[layer].mean()) for name, values in layers.right.items()}
        row |= {"layer": layer, "low": interval.low, "high": interval.high, "majority": layers.majority}
        row["selectivity"] = row["accuracy"] - row["control_accuracy"]
        rows.append(row)
    first = ["layer", "accuracy", "low", "high", "selectivity", "control_accuracy"]
    frame = pd.DataFrame(rows)
    frame = frame[[*first, *(name for name in frame if name not in first)]]
    return frame if frame["low"].notna().all() else frame.drop(columns=["low", "high"])


def metrics(frame: pd.DataFrame, layers: Layers, best: int) -> tuple[Metric, ...]:
    """The best layer's numbers, and what they stand against."""
    n = len(layers.labels_N)
    row = {str(name): value for name, value in frame.iloc[best].items()}
    how = f"bootstrap over {len(set(layers.data.groups))} groups; the best of {len(frame)} layers, so a little high"
    found = [
        Metric("best_layer", float(best), "layer"),
        Metric("accuracy", row["accuracy"], "share", "higher", n, row.get("low"), row.get("high"), how),
        Metric("selectivity", row["selectivity"], "share", "higher", n),
        Metric("control_accuracy", row["control_accuracy"], "share", "lower", n),
        Metric("shuffled_accuracy", row["shuffled_accuracy"], "share", n=n),
        Metric("majority", layers.majority, "share", n=n),
    ]
    if "twin_accuracy" in frame:
        found.append(Metric("best_twin_accuracy", float(frame["twin_accuracy"].max()), "share", "lower", n))
    return tuple(found)


def notes(data: Labelled, layers: Layers, chosen: int) -> tuple[str, ...]:
    """What a reader must know."""
    n_groups = len(set(data.groups))
    found = [
        "Layer 0 is the embedding; layer l is the residual stream after l blocks.",
        f"{len(data.texts)} texts, {len(data.classes)} labels, {n_groups} groups; no group is in training and test at once.",
        f"The prompt is read by probes trained on all texts; the strip shows layer {chosen}.",
    ]
    if data.about:
        found.insert(0, data.about)
    if not data.has_groups:
        found.append("The file names no groups: the last word of each text stands in for one.")
    if layers.memorable < 0.5:
        found.append(
            f"Only {layers.memorable:.0%} of texts share their group with another, so the control task cannot be learned "
            "by heart and selectivity says little."
        )
    return tuple(found)


def views(data: Labelled, chosen: int) -> tuple[View, ...]:
    """The curves that answer the question, the prompt's map, one layer's strip, the table."""
    two = len(data.classes) == 2
    title = f"Probability of “{data.classes[-1]}”" if two else "Probability of the probe's answer"
    tooltip = ("token", "answer", "score")
    return (
        View(
            "line",
            x="layer",
            y="share_right",
            color="series",
            frame="curves",
            title="Share of texts whose label is read right",
            unit="share",
        ),
        View(
            "heatmap",
            x="position",
            y="layer",
            color="score",
            text="answer",
            frame="prompt",
            title=f"{title} at each token of the prompt",
            unit="probability",
            midpoint=0.5 if two else None,
            tooltip=tooltip,
        ),
        View(
            "tokens",
            x="position",
            color="score",
            text="token",
            frame="tokens",
            title=f"{title}, read at layer {chosen}",
            unit="probability",
            tooltip=("answer",),
        ),
        View(
            "table", x="layer", y="accuracy", title="All layers", tooltip=("selectivity", "control_accuracy")
        ),
    )


def _interval(bootstrap: Bootstrap, hits_G: Floats, trials_G: Floats) -> Interval:
    """Groups are what is resampled; where no or every text was right, a group counts as one trial."""
    if 0 < hits_G.sum() < trials_G.sum():
        return bootstrap.ratio(hits_G, trials_G)
    n = len(trials_G)
    return Interval(*wilson(n if hits_G.any() else 0, n), f"Wilson, {n} groups")
