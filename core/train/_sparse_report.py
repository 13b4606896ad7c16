"""How the training of a sparse autoencoder went, as a result: its quality, its features, its curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.train._feature_tables import marked
from core.train._provenance import provenance
from core.types import Documents, Metric, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.registry import Settings
    from core.train._sparse_quality import Quality

SHOWN = 200
ALWAYS_ON = 0.1
"""Features denser than this are rarely about anything one can name."""


def report(
    loaded: LoadedModel,
    documents: Documents,
    settings: Settings,
    *,
    quality: Quality,
    features: pd.DataFrame,
    snippets: pd.DataFrame,
    curve: Sequence[tuple[int, int, float, float]],
    conditions: Mapping[str, Any],
    seconds: float,
) -> Result:
    """Metrics, the strongest features with their first snippet, feature densities and the training curve."""
    k = settings.model_dump()["k"]
    recovered = [] if quality.ce_recovered is None else [quality.ce_recovered]
    return Result(
        frames={
            "main": _strongest(features, snippets),
            "density": _densities(features),
            "curve": _thinned(pd.DataFrame(curve, columns=["step", "tokens", "fvu", "dead_share"])),
        },
        views=_VIEWS,
        metrics=(
            Metric("l0", quality.l0, "features/token", n=quality.held_out_tokens),
            Metric("fvu", quality.fvu, "", "lower", n=quality.held_out_tokens),
            *(Metric("ce_recovered", value, "", "higher", n=quality.loss_tokens) for value in recovered),
            Metric("dead_share", quality.dead_share, "", "lower", n=len(features)),
            Metric("loss", quality.loss, "nats/token", "neither", n=quality.loss_tokens),
            Metric(
                "loss_reconstructed", quality.loss_reconstructed, "nats/token", "lower", n=quality.loss_tokens
            ),
            Metric("loss_zero", quality.loss_zero, "nats/token", "neither", n=quality.loss_tokens),
        ),
        provenance=provenance(
            loaded,
            documents,
            method="sparse_autoencoder",
            settings=settings,
            conditions=conditions,
            seconds=seconds,
            exactness_gap=max(0.0, quality.l0 - k),
            exactness_check="active features per token above k",
        ),
        notes=(
            "Dead: active at no token of the whole text, held-out part included.",
            "Loss is the model's own, with the layer's readable positions replaced; the first position is never replaced.",
            *_SENSELESS[len(recovered) :],
        ),
        flags=("loss_not_recovered",) if recovered and recovered[0] < 0.5 else (),
    )


def _strongest(features: pd.DataFrame, snippets: pd.DataFrame) -> pd.DataFrame:
    """Features that are not always on, the strongest first, each with the text where it is strongest."""
    first = snippets[snippets["rank"] == 1]
    lines = [marked(*place) for place in zip(first["tokens"], first["peak"], strict=True)]
    first = first.assign(snippet=lines)
    named = features[features["density"].between(1e-12, ALWAYS_ON)]
    table = named.nlargest(SHOWN, "max_activation").merge(first[["feature", "snippet"]], on="feature")
    return table.reset_index(drop=True)


def _densities(features: pd.DataFrame) -> pd.DataFrame:
    """How many features have which density, in half decades; dead ones are counted apart as 0."""
    density = features["density"]
    alive = np.floor(2 * np.log10(density[density > 0])) / 2
    counts = alive.value_counts().sort_index()
    bins = [0.0, *(10.0**edge for edge in counts.index)]
    return pd.DataFrame({"density_from": bins, "features": [int((density == 0).sum()), *counts.tolist()]})


def _thinned(curve: pd.DataFrame, most: int = 500) -> pd.DataFrame:
    step = max(1, len(curve) // most)
    return curve.iloc[::step].reset_index(drop=True)


_SENSELESS = (
    "CE recovered is left out: on this text the model does no better with this layer than with zeros in its place.",
)
_VIEWS = (
    View(
        "table",
        x="feature",
        color="max_activation",
        text="snippet",
        title="Strongest features, and where",
        tooltip=("density", "mean_activation"),
    ),
    View(
        "bar", x="density_from", y="features", frame="density", title="Features by density", unit="features"
    ),
    View("line", x="tokens", y="fvu", frame="curve", title="Variance left unexplained in training", log=True),
)
