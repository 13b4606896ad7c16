"""How the training of a tuned lens went, as a result: KL per layer of every candidate, and which one was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.train._provenance import provenance
from core.types import Documents, Metric, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.registry import Settings


@dataclass(frozen=True)
class Curve:
    """Held-out KL(model ‖ lens) per layer, nats, of one candidate."""

    name: str
    kl_L: Tensor


def report(
    loaded: LoadedModel,
    documents: Documents,
    settings: Settings,
    *,
    curves: Sequence[Curve],
    kept: Sequence[str],
    kl_L: Tensor,
    conditions: Mapping[str, Any],
    seconds: float,
) -> Result:
    """The first curve is the logit lens, which every other one has to beat."""
    plain, tuned = curves[0].kl_L.numpy(), kl_L.numpy()
    layers = list(range(len(plain)))
    main = pd.DataFrame(
        {
            "layer": layers,
            "kl_logit_lens": plain,
            "kl_tuned_lens": tuned,
            "reduction": 1 - tuned / plain.clip(min=1e-12),
            "kept": list(kept),
        }
    )
    ends = [Curve("tuned lens", kl_L)]
    long = pd.concat(
        [
            pd.DataFrame({"layer": layers, "lens": curve.name, "kl_nats": curve.kl_L.numpy()})
            for curve in (*curves, *ends)
        ],
        ignore_index=True,
    )
    n = int(conditions["held_out_positions"])
    return Result(
        frames={"main": main, "curves": long},
        views=_VIEWS,
        metrics=(
            Metric("kl_tuned_lens", float(tuned.mean()), "nats", "lower", n=n),
            Metric("kl_logit_lens", float(plain.mean()), "nats", "lower", n=n),
            Metric("layers_improved", float((tuned < plain).sum()), "layers", "higher", n=len(layers)),
        ),
        provenance=provenance(
            loaded,
            documents,
            method="tuned_lens",
            settings=settings,
            conditions=conditions,
            seconds=seconds,
            exactness_gap=float((tuned - plain).clip(min=0).max()),
            exactness_check="how far the tuned lens' held-out KL is above the logit lens' at any layer; 0 by its rule",
        ),
        notes=(
            "KL(model ‖ lens) in nats, mean over held-out positions; layer 0 is the embedding.",
            "Which candidate is kept per layer is decided on the same held-out positions: its KL is a little flattered.",
        ),
    )


_VIEWS = (
    View(
        "line",
        x="layer",
        y="kl_nats",
        color="lens",
        frame="curves",
        title="Distance to the model's final prediction (KL), held-out text",
        unit="nats",
    ),
    View(
        "table",
        x="layer",
        y="reduction",
        text="kept",
        title="What training gained per layer",
        tooltip=("kl_logit_lens", "kl_tuned_lens"),
    ),
)
