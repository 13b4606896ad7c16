"""Residual norms: how large the residual stream is at every layer and position, and who made it so.

Legend: P positions, D d_model. Numbers are taken while the model runs; at most three tensors [P, D] are kept at a
time. Massive activations follow Sun et al. 2024. It does not say what a direction means.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture, capture_residual
from core.errors import SlimscopeError
from core.lazy import torch
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode, limit_cells
from core.registry import Settings, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

MASSIVE_VALUE = 100.0
MASSIVE_RATIO = 1000.0
"""Sun et al. 2024: an activation above 100 and at least about 1000 times its layer's median is massive."""


class ResidualNormsSettings(Settings):
    """How much to show."""

    positions: int = Field(0, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")
    sink_ratio: float = Field(
        10.0,
        ge=2,
        le=1000,
        description="A position whose norm is at least this many times the median of its layer is a sink",
    )


@method("probe", title="Residual norms", needs=["text"], paper="https://arxiv.org/abs/2402.17762")
def residual_norms(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ResidualNormsSettings
) -> Result:
    """Follow the size of the residual stream through the layers.

    For each layer and position: the Euclidean norm of the residual stream, its cosine with the layer before, the norms
    of what attention and MLP added, attention's share ‖a‖ / (‖a‖ + ‖m‖), and the dimension with the largest absolute
    value. Positions far above their layer's median are sinks (often the first token); single values above 100 and
    1000 times the layer's median are massive activations. Layer 0 is the embedding.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    limit_cells(loaded.anatomy.n_layers + 1, encoded.n_tokens - start)
    walk = _Walk(loaded.anatomy)
    blocks = loaded.anatomy.blocks
    with (
        loaded.lock,
        torch.inference_mode(),
        capture(loaded.model, [block.attention_write for block in blocks], reduce=walk.attention),
        capture(loaded.model, [block.mlp_write for block in blocks], reduce=walk.mlp),
        capture_residual(loaded, reduce=walk.residual),
    ):
        loaded.model(**encoded.inputs)
    frame = _frame(walk.rows, encoded, start, settings)
    return Result(
        frames={"main": frame, "sinks": _sinks(frame)},
        views=_VIEWS,
        metrics=(
            Metric("sink_positions", float(frame.loc[frame["is_sink"], "position"].nunique()), "positions"),
            Metric("massive_activations", float(frame["is_massive"].sum()), "cells", n=len(frame)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="residual_norms",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens},
            exactness_gap=walk.gap,
            exactness_check="largest |before + attention + MLP − after| over the largest |after|, any layer"
            if walk.gap is not None
            else "none: a post-norm model's residual stream is normed after each addition, so it has no sum",
        ),
        notes=(
            "Norms are Euclidean and depend on d_model; compare layers of one model, not models of two widths.",
        ),
    )


_TOOLTIP = ("token", "norm", "cosine_to_previous", "attention_share", "top_dimension", "top_value")
_VIEWS = (
    View(
        "heatmap",
        x="position",
        y="layer",
        color="norm",
        title="Norm of the residual stream",
        unit="norm",
        log=True,
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="cosine_to_previous",
        title="Cosine with the layer before",
        unit="cosine",
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="attention_share",
        title="Attention's share of what the layer wrote",
        unit="share",
        midpoint=0.5,
        tooltip=_TOOLTIP,
    ),
    View(
        "table",
        x="position",
        y="max_norm_ratio",
        text="token",
        frame="sinks",
        title="Sinks and massive activations",
        tooltip=("first_layer", "n_layers", "top_dimension", "max_top_value", "massive"),
    ),
)


class _Walk:
    """Sees the residual stream and both writes of each block in the order the model makes them."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.rows: list[dict[str, np.ndarray]] = []
        self._d_model = anatomy.d_model
        self._scale = anatomy.residual_scale
        self._sums = anatomy.norm_place != "post"
        self.gap: float | None = 0.0 if self._sums else None
        self._before: Tensor | None = None
        self._attention: Tensor | None = None
        self._mlp: Tensor | None = None

    def attention(self, path: str, write: Tensor) -> None:
        """What attention adds to the residual stream."""
        self._attention = write.reshape(-1, self._d_model).float() * self._scale

    def mlp(self, path: str, write: Tensor) -> None:
        """What the MLP adds; some models run it on flattened positions."""
        self._mlp = write.reshape(-1, self._d_model).float() * self._scale

    def residual(self, path: str, stream: Tensor) -> None:
        """The residual stream before a block, or after the last: closes the row of the block before."""
        now_PD = stream[0].float()
        size_PD = now_PD.abs()
        top = size_PD.max(-1)
        if not torch.isfinite(top.values).all():
            raise SlimscopeError(
                f"the residual stream after layer {len(self.rows)} is not finite (NaN or infinity); "
                "open the model in float32, or check its weights"
            )
        values = {
            "norm": now_PD.norm(dim=-1),
            "top_dimension": top.indices,
            "top_value": now_PD.gather(-1, top.indices[:, None])[:, 0],
            "median_value": size_PD.median().expand(len(now_PD)),
            **self._change(now_PD),
        }
        self.rows.append({name: value.cpu().numpy() for name, value in values.items()})
        self._before, self._attention, self._mlp = now_PD, None, None

    def _change(self, now_PD: Tensor) -> dict[str, Any]:
        """How the last block changed the stream; NaN for the embedding."""
        if self._before is None or self._attention is None or self._mlp is None:
            nothing = torch.full((len(now_PD),), torch.nan)
            names = ("cosine_to_previous", "attention_norm", "mlp_norm", "attention_share")
            return dict.fromkeys(names, nothing)
        if self.gap is not None:
            difference_PD = self._before + self._attention + self._mlp - now_PD
            self.gap = max(self.gap, float(difference_PD.abs().max() / now_PD.abs().max()))
        attention_P, mlp_P = self._attention.norm(dim=-1), self._mlp.norm(dim=-1)
        return {
            "cosine_to_previous": torch.cosine_similarity(self._before, now_PD, dim=-1),
            "attention_norm": attention_P,
            "mlp_norm": mlp_P,
            "attention_share": attention_P / (attention_P + mlp_P),
        }


def _frame(
    rows: list[dict[str, np.ndarray]], encoded: Encoded, start: int, settings: ResidualNormsSettings
) -> pd.DataFrame:
    """One row per layer and shown position; medians are over all positions of the prompt."""
    parts = []
    for layer, row in enumerate(rows):
        part = pd.DataFrame(
            {"layer": layer, "position": np.arange(encoded.n_tokens), "token": encoded.texts, **row}
        )
        part["norm_ratio"] = part["norm"] / part["norm"].median()
        parts.append(part.iloc[start:])
    frame = pd.concat(parts, ignore_index=True)
    size = frame["top_value"].abs()
    frame["is_sink"] = frame["norm_ratio"] >= settings.sink_ratio
    frame["is_massive"] = (size > MASSIVE_VALUE) & (size >= MASSIVE_RATIO * frame["median_value"])
    return frame.drop(columns="median_value")


def _sinks(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per position that is a sink or massive at some layer, the strongest first."""
    marked = frame[frame["is_sink"] | frame["is_massive"]]
    grouped = marked.assign(size=marked["top_value"].abs()).groupby("position", as_index=False)
    table = grouped.agg(
        token=("token", "first"),
        first_layer=("layer", "min"),
        n_layers=("layer", "nunique"),
        max_norm_ratio=("norm_ratio", "max"),
        top_dimension=("top_dimension", lambda dimension: dimension.mode().iloc[0]),
        max_top_value=("size", "max"),
        massive=("is_massive", "any"),
    )
    return table.sort_values("max_norm_ratio", ascending=False, ignore_index=True)
