"""Merge experts: groups of experts that do alike become one each, by HC-SMoE or REAM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.compress._experts_left import kept_by_share, share_left
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.reshape.structure import Inventory, structural_result
from core.routing.alignment import cheapest_order, neuron_activations, neuron_cost, reordered
from core.routing.discover import MoeLayer
from core.routing.kept import kept_record
from core.routing.merging import (
    Linkage,
    Merge,
    agglomerate,
    average,
    distances,
    greedy_groups,
    in_router_groups,
)
from core.routing.merging_profile import Profile, expert_output, read_profile
from core.routing.passages import passages
from core.routing.surgery import (
    ExpertWeights,
    check_count,
    experts_of,
    keep_in_layer,
    read_expert,
    settle_counts,
    write_expert,
)
from core.types import Documents, Metric, Progress, Result, View, part_of

PASSAGE = 256
"""Tokens run together at most."""


class MergeExpertsSettings(Settings):
    """How many experts become one, and which."""

    scheme: Literal["ream", "hc_smoe"] = Field(
        default="ream",
        description="ream: groups around the most salient experts, layer after layer; hc_smoe: clusters of mean outputs",
    )
    share: float = Field(
        default=0.25, gt=0, lt=1, description="Share of every layer's experts that are merged away"
    )
    align: bool = Field(
        default=True,
        description="Bring neurons into the same order before averaging (HC-SMoE as published does not)",
    )
    linkage: Linkage = Field(
        default="average",
        description="hc_smoe: distance of two clusters, the mean or the smallest of their pairs",
    )
    largest_group: int = Field(default=16, ge=2, le=256, description="ream: experts that become one at most")
    calibration_tokens: int = Field(
        default=4096, ge=64, le=262_144, description="Calibration tokens that all experts of a layer compute"
    )


@method(
    "compress",
    title="Merge experts",
    needs=["moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2604.04356",
    left=lambda anatomy, settings: share_left(
        kept_by_share(anatomy.n_experts, settings.share), anatomy.n_experts
    ),
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: MergeExpertsSettings
) -> Result:
    """Average experts that do alike, so that fewer remain and none is simply thrown away.

    Every expert of a layer computes every calibration token, chosen or not. **REAM** (arXiv 2604.04356) keeps the most
    salient experts (REAP: mean of routing weight · ‖output‖) as centroids; each in turn takes in the experts most like
    it by ½ (cosine of outputs + cosine of router logits), members are weighed by saliency, and the next layer is read
    with this one already merged. **HC-SMoE** (arXiv 2410.08589) clusters the mean outputs bottom-up and weighs members
    by how often they were chosen, all on the original model. Before averaging, neurons are matched one to one
    (Hungarian algorithm) by what they do and by their weights. A merged expert takes the place and the router row of
    its centroid, or of its most used member.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    n_kept = kept_by_share(layers[0].n_experts, settings.share, n_groups=layers[0].n_groups)
    check_count(layers, n_kept)
    texts = passages(loaded, calibration, length=PASSAGE, max_tokens=settings.calibration_tokens)
    before = Inventory.of(loaded)
    kept: dict[int, list[int]] = {}
    rows: list[dict[str, object]] = []
    sharing = []
    for index, layer in enumerate(layers):
        stage = part_of(progress, index / len(layers), (index + 1) / len(layers))
        profile = read_profile(loaded, layer, texts, stage)
        merges = plan(profile, layer, n_kept, settings)
        rows += _merged(loaded, layer, profile, merges, align=settings.align)
        kept[layer.layer] = sorted(merge.kept for merge in merges)
        sharing.append(profile.share_sharing(_group_of(merges, layer.n_experts)))
        if settings.scheme == "ream":
            keep_in_layer(loaded, layer, kept[layer.layer])
    if settings.scheme == "hc_smoe":
        for layer in layers:
            keep_in_layer(loaded, layer, kept[layer.layer])
    settle_counts(loaded, layers[0].n_experts, n_kept)
    return structural_result(
        before,
        loaded,
        settings,
        method="merge_experts",
        frames={"groups": pd.DataFrame(rows), "layers": _layer_frame(layers, sharing)},
        views=_VIEWS,
        metrics=(
            Metric("experts_per_layer", n_kept, "experts"),
            Metric("tokens_sharing_a_group", float(np.mean(sharing)), "", "lower", n=sum(map(len, texts))),
        ),
        notes=_notes(layers[0], n_kept, float(np.mean(sharing)), settings),
        inputs={"calibration": calibration.fingerprint},
        conditions={
            "calibration": calibration.name,
            "calibration_tokens": sum(map(len, texts)),
            **kept_record(kept),
        },
    )


def plan(profile: Profile, layer: MoeLayer, n_kept: int, settings: MergeExpertsSettings) -> list[Merge]:
    """Which experts of a layer become one; groups of a group-limited router lose equally and never mix."""
    merges = []
    for members in in_router_groups(layer.n_experts, layer.n_groups):
        inside = np.ix_(members, members)
        wanted = n_kept // layer.n_groups
        if settings.scheme == "ream":
            weight_E = profile.saliency_E
            found = greedy_groups(
                profile.similarity_EE()[inside], weight_E[list(members)], wanted, settings.largest_group
            )
            merges += [
                Merge.of([members[e] for e in group], weight_E, kept=members[group[0]]) for group in found
            ]
        else:
            found = agglomerate(distances(profile.mean_ED[list(members)]), wanted, settings.linkage)
            merges += [Merge.of([members[e] for e in group], profile.load_E) for group in found]
    return merges


def merged_weights(
    loaded: LoadedModel, layer: MoeLayer, profile: Profile, merge: Merge, *, align: bool
) -> ExpertWeights:
    """The average of a group, each member's neurons in the order of the kept one's where ``align``."""
    experts = loaded.model.get_submodule(layer.experts)
    reference = read_expert(loaded, layer.layer, merge.kept)
    parts = [reference]
    for member in merge.members[1:]:
        weights = read_expert(loaded, layer.layer, member)
        if align:
            done = [neuron_activations(experts, e, profile.hidden_TD) for e in (merge.kept, member)]
            weights = reordered(weights, cheapest_order(neuron_cost(reference, weights, *done)))
        parts.append(weights)
    return average(parts, merge.shares)


def _merged(
    loaded: LoadedModel, layer: MoeLayer, profile: Profile, merges: Sequence[Merge], *, align: bool
) -> Iterator[dict[str, object]]:
    """Write every merged expert in its place; one row per member, with how far its output is from what it was."""
    experts = loaded.model.get_submodule(layer.experts)
    load_E = profile.load_E / profile.load_E.sum()
    for merge in merges:
        weights = merged_weights(loaded, layer, profile, merge, align=align)
        was = {e: expert_output(experts, e, profile.hidden_TD) for e in merge.members}
        if len(merge.members) > 1:
            write_expert(loaded, layer.layer, merge.kept, weights)
        now_TD = expert_output(experts, merge.kept, profile.hidden_TD)
        for member, share in zip(merge.members, merge.shares, strict=True):
            gap = float((now_TD - was[member]).norm() / was[member].norm().clamp(min=1e-30))
            yield {
                "layer": layer.layer,
                "expert": member,
                "becomes": merge.kept,
                "group_size": len(merge.members),
                "share": share,
                "load_share": float(load_E[member]),
                "similarity": float(profile.similarity_EE()[merge.kept, member]),
                "output_change": gap,
            }


def _group_of(merges: Sequence[Merge], n_experts: int) -> np.ndarray:
    group_E = np.zeros(n_experts, dtype=np.int64)
    for merge in merges:
        group_E[list(merge.members)] = merge.kept
    return group_E


def _layer_frame(layers: Sequence[MoeLayer], sharing: Sequence[float]) -> pd.DataFrame:
    return pd.DataFrame({"layer": [layer.layer for layer in layers], "tokens_sharing_a_group": list(sharing)})


def _notes(layer: MoeLayer, n_kept: int, sharing: float, settings: MergeExpertsSettings) -> tuple[str, ...]:
    mass = (
        "; and its softmax over all experts loses what the removed rows had, so that the weights of the others grow"
        if layer.rule in ("softmax_topk", "softmax_group_topk")
        else ""
    )
    rows = (
        f"Routers go from {layer.n_experts} rows to {n_kept}, because a plain checkpoint has one per expert. That alone "
        f"changes the output, even where the merged experts were equal: {sharing:.1%} of the calibration tokens chose two "
        "experts of one group, and now choose the merged one once and some other expert with the slot that is free"
        f"{mass}. With a map from old to merged experts and all rows kept, equal experts merge without any loss."
    )
    order = "Neurons were averaged in the order they are stored in, which means nothing for experts trained apart."
    return (rows,) if settings.align else (rows, order)


_VIEWS = (
    View(
        "heatmap", x="expert", y="layer", color="output_change", text="becomes", frame="groups",
        title="Output of the merged expert against each member's own", unit="relative error",
        tooltip=("group_size", "share", "load_share", "similarity"),
    ),
    View(
        "bar", x="layer", y="tokens_sharing_a_group", frame="layers",
        title="Tokens that chose two experts of one group", unit="share",
    ),
)  # fmt: skip
