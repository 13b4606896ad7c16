"""MoEfication: a dense MLP's neurons dealt out to experts, of which each token runs some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field

from core.compress._conversion import RoutedSettings, Source, converted_result
from core.compress._dealing import by_activation, by_gate_rows, fit_routers, measure
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import method
from core.routing._upcycling import dealt
from core.routing._upcycling_build import (
    dense_mlps,
    moe_config,
    moe_tensors,
    output_gap,
    rebuilt,
    refuse_gap,
)
from core.train._residuals import cut_text
from core.types import Documents, Metric, Progress, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 256
SPREAD = 2.0**-13
"""Standard deviation of the routers' logits. So near zero, softmax gives every chosen expert 1/k to one part in about
ten thousand, while float32 still tells their order to a thousandth of the deviation."""
SPREAD_OF_ALL = 2.0**-40
"""Where every expert is chosen there is no order to tell, and the weights are 1/k to rounding."""
VIEWS = (
    View(
        "line", x="layer", y="relative_error", color="chosen_by", frame="layers", tooltip=("recall",),
        title="Share of the MLP's output that is missing",
    ),
)  # fmt: skip


class MoefySettings(RoutedSettings):
    """How many experts the neurons are dealt out to, and by what."""

    experts: int = Field(
        default=8, ge=2, le=256, description="Experts per layer; must divide the MLP's neurons"
    )
    top_k: int = Field(
        default=6, ge=1, le=256, description="Experts each token runs; all of them is the dense model exactly"
    )
    cluster_by: Literal["activations", "weights"] = Field(
        default="activations",
        description="activations: neurons active on the same calibration tokens go together; weights: those with "
        "similar gate rows",
    )
    max_tokens: int = Field(
        default=8192,
        ge=64,
        le=262_144,
        description="Calibration tokens; a fifth is held out to measure the routers on",
    )
    seed: int = Field(
        default=0, ge=0, le=1_000_000, description="Seed of the clustering and of the choice by chance"
    )


@method(
    "compress",
    title="Split into experts",
    needs=["decoder", "dense", "text", "calibration"],
    paper="https://arxiv.org/abs/2110.01786",
    left=lambda anatomy, settings: {},  # the neurons are only dealt out; the routers are small beside them
    group="convert",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: MoefySettings
) -> Result:
    """Deal the neurons of every MLP out to experts, so that a token runs only some: less work, the same bytes.

    An MLP is the sum of its neurons. Balanced k-means groups them into experts of equal size, and a linear router is
    fitted on calibration text to predict which experts' outputs will be large (MoEfication). With ``top_k`` =
    ``experts`` the result is the dense model. With fewer, what is not chosen is missing: gated SiLU MLPs are not
    sparse as the paper's ReLU ones are, so expect a loss that only training repairs. The chart says how much of each
    layer's output is missing on held-out text, beside a choice by the true norms and one by chance.

    Plain routers give weights that sum to 1 where MoEfication wants weight 1 for each. So W_down is multiplied by
    ``top_k``, and the routers' logits are kept so small that softmax gives each chosen expert 1/k: to rounding where all
    are chosen, else to about one part in ten thousand. Changing ``top_k`` afterwards changes that scale too.
    """
    assert calibration is not None, "the registry's `needs` ask for calibration text"
    source = Source.of(loaded)
    n, k, width = settings.experts, settings.top_k, loaded.anatomy.d_ff
    if width % n:
        raise CannotCompress(_indivisible(width, n))
    config = moe_config(loaded, n_experts=n, top_k=k, width=width // n)
    clusters, routers, layers = _learn(loaded, calibration, progress, settings)
    with torch.inference_mode(False), torch.no_grad():
        progress(0.9, 1.0, "comparing with the dense model, all experts chosen")
        everyone = moe_config(loaded, n_experts=n, top_k=n, width=width // n)
        gap = output_gap(loaded.model, _split(loaded, everyone, clusters), loaded.anatomy)
        model = _split(loaded, config, clusters)
        refuse_gap(loaded, model, gap)
        for block in loaded.anatomy.blocks:
            model.get_submodule(f"{block.mlp}.gate").weight.copy_(routers[block.index])
        moved = output_gap(loaded.model, model, loaded.anatomy)
        progress(0.95, 1.0, "proving the anatomy of the mixture")
        loaded.become(model)
    error, recall = layers.loc[layers["chosen_by"] == "router", ["relative_error", "recall"]].mean()
    return converted_result(
        source,
        loaded,
        settings,
        method="moefy",
        exactness=(
            gap,
            "logits with every expert chosen against the dense model's, largest relative difference",
        ),
        frames={"layers": layers},
        views=VIEWS,
        metrics=(
            Metric("relative_output_change", moved, "", "lower"),
            Metric("missing_of_mlp_output", float(error), "", "lower"),
            Metric("router_recall", float(recall), "", "higher"),
        ),
        notes=(_note(settings, layers),),
        calibration=calibration,
    )


def _learn(
    loaded: LoadedModel, calibration: Documents, progress: Progress, settings: MoefySettings
) -> tuple[dict[int, Tensor], dict[int, Tensor], pd.DataFrame]:
    """Cluster of each neuron and router rows per block, and how well they do on held-out text."""
    n, k, seed = settings.experts, settings.top_k, settings.seed
    parts = cut_text(loaded, calibration, window=WINDOW, max_tokens=settings.max_tokens)
    with loaded.lock, torch.inference_mode():
        clusters = (
            by_activation(loaded, parts.training, n, seed=seed, progress=part_of(progress, 0, 0.3))
            if settings.cluster_by == "activations"
            else by_gate_rows(loaded, n, seed=seed)
        )
        routers = fit_routers(
            loaded, parts.training, clusters, n, spread=SPREAD if k < n else SPREAD_OF_ALL,
            progress=part_of(progress, 0.3, 0.7),
        )  # fmt: skip
        layers = measure(
            loaded,
            parts.held_out,
            clusters,
            routers,
            top_k=k,
            seed=seed,
            progress=part_of(progress, 0.7, 0.9),
        )
    return clusters, routers, layers


def _split(loaded: LoadedModel, config: Any, clusters: Mapping[int, Tensor]) -> Any:
    """The mixture with routers of zeros: each chosen expert has weight 1/k and output k · f_e."""
    n, k = config.num_experts, config.num_experts_per_tok
    experts = {i: dealt(mlp, clusters[i], n, scale=k) for i, mlp in dense_mlps(loaded).items()}
    return rebuilt(loaded, config, moe_tensors(loaded, experts))


def _indivisible(width: int, n: int) -> str:
    fitting = [e for e in range(2, 257) if width % e == 0]
    near = sorted(sorted(fitting, key=lambda e: abs(e - n))[:4])
    choices = f"choose {', '.join(map(str, near))}" if near else "no number of experts up to 256 does"
    return f"experts={n} does not divide the {width} neurons of each MLP into equal parts; {choices}"


def _note(settings: MoefySettings, layers: pd.DataFrame) -> str:
    if settings.top_k == settings.experts:
        return "Every token runs every expert, so this is the dense model with another shape; lower top_k to save work."
    mean = layers.groupby("chosen_by")["relative_error"].mean()
    return (
        f"On held-out text {mean['router']:.0%} of an MLP's output is missing on average (root mean square), "
        f"{mean['true norms']:.0%} if the largest experts were always known, {mean['chance']:.0%} by chance. Only "
        "training brings that back."
    )
