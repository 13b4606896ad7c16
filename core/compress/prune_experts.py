"""Prune experts: remove those that matter least by a criterion, as many in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from core.compress._experts_left import kept_by_share, share_left
from core.compress._unreached import never_note
from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.reshape.structure import Inventory, structural_result
from core.routing.criteria import Criterion
from core.routing.discover import MoeLayer, neutral_when_unused
from core.routing.exhaustive import refuse_shim, refuse_too_many
from core.routing.kept import kept_record
from core.routing.pruning import Choice, Evidence, choose, gather
from core.routing.surgery import check_count, experts_of, keep_experts
from core.types import Documents, Metric, Progress, Result, View, part_of

_VIEWS = (
    View(
        "heatmap", x="expert", y="layer", color="relative_score", frame="experts", midpoint=1.0,
        title="Score of every expert, relative to its layer's mean", tooltip=("score", "rank", "tokens", "status"),
    ),
    View(
        "heatmap", x="expert", y="layer", color="kept", frame="experts", title="What stays",
        tooltip=("status", "rank", "load_share"),
    ),
    View(
        "table", x="layer", text="removed", frame="layers", title="What each layer loses, against random choices",
        tooltip=("load_removed", "probability_removed", "change", "change_random", "change_best"),
    ),
)  # fmt: skip


class PruneExpertsSettings(Settings):
    """Which experts go, and how many."""

    criterion: Criterion = Field(
        default="reap",
        description="reap: routing weight · output norm, for one task; man, msan: output norm, for general use; "
        "aimer: weights alone; naee: every set tried; random: the control",
    )
    share: float = Field(default=0.25, gt=0, lt=1, description="Share of every layer's experts to remove")
    count: int | None = Field(
        default=None, ge=1, le=4096, description="Experts to remove of every layer, instead of a share"
    )
    protect_super: bool = Field(
        default=True, description="Never remove an expert whose output holds massive activations"
    )
    protect: str = Field(
        default="", max_length=4000, description="Experts never to remove: layer:expert, e.g. 0:3, 2:7"
    )
    calibration_tokens: int = Field(
        default=32_768, ge=64, le=4_194_304, description="Tokens that scores are summed over"
    )
    compare_tokens: int = Field(
        default=512,
        ge=0,
        le=16_384,
        description="Tokens on which the choice is held against random ones and, where few, all others; 0: not at all",
    )
    seed: int = Field(
        default=0, ge=0, le=1_000_000, description="Seed of criterion random and of the random choices"
    )


@method(
    "compress",
    title="Prune experts",
    needs=["moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2510.13999",
    left=lambda anatomy, settings: share_left(_n_kept(anatomy.n_experts, settings), anatomy.n_experts),
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: PruneExpertsSettings
) -> Result:
    """Remove the experts that matter least, with their rows of the router: fewer bytes, the same work per token.

    With X_j the calibration tokens routed to expert j, g_j the routing weight as applied and f_j the expert's output:
    **reap** keeps the largest mean over X_j of g_j·‖f_j‖, **man** of ‖f_j‖, **msan** of ‖f_j‖², **ean** the largest sum
    of ‖f_j‖, **frequency** the largest |X_j|; **aimer** removes those with the largest mean|W| / RMS(W), without any
    text; **naee** tries every set and keeps the one that changes the layer's output least. Every layer loses as many,
    and every group of a group-limited router, because plain transformers reloads nothing else. A text judges only what
    it reaches: an expert that no token was routed to scores 0, and is reported.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    n_kept = _n_kept(layers[0].n_experts, settings, n_groups=layers[0].n_groups)
    check_count(layers, n_kept)
    asked = read_pairs(settings.protect, layers)
    for at in layers if settings.criterion == "naee" else ():
        refuse_shim(at)
        refuse_too_many(at, n_kept)
    evidence = gather(
        loaded, layers, calibration, settings.criterion, part_of(progress, 0.0, 0.6),
        max_tokens=settings.calibration_tokens, compare_tokens=settings.compare_tokens, peaks=settings.protect_super,
    )  # fmt: skip
    protected = {
        at.layer: {*asked.get(at.layer, ()), *evidence.super_experts.get(at.layer, ())} for at in layers
    }
    choice = choose(
        loaded, layers, settings.criterion, n_kept, evidence, part_of(progress, 0.6, 0.95),
        protected=protected, seed=settings.seed,
    )  # fmt: skip
    before = Inventory.of(loaded)
    keep_experts(loaded, choice.kept)
    counts = evidence.counts
    return structural_result(
        before,
        loaded,
        settings,
        method="prune_experts",
        frames={"experts": choice.experts, "layers": choice.layers},
        views=[view for view in _VIEWS if settings.criterion != "naee" or view.color != "relative_score"],
        metrics=_metrics(layers, n_kept, choice, evidence),
        notes=_notes(layers, n_kept, settings, choice, evidence),
        inputs={"calibration": calibration.fingerprint} if counts or evidence.inputs else {},
        conditions={
            "calibration": calibration.name,
            "calibration_tokens": counts.n_tokens if counts else 0,
            **kept_record(choice.kept),
        },
    )


def read_pairs(text: str, layers: Sequence[MoeLayer]) -> dict[int, frozenset[int]]:
    """``layer:expert`` pairs, separated by commas or spaces; raises ``BadInput`` for any other and unknown ones."""
    counts = {at.layer: at.n_experts for at in layers}
    found: dict[int, frozenset[int]] = {}
    for pair in text.replace(",", " ").split():
        layer, _, expert = pair.partition(":")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise BadInput(f"protect has {pair!r}; write layer:expert pairs like 0:3, 2:7")
        if int(expert) >= counts.get(int(layer), 0):
            raise BadInput(
                f"protect names {pair}, but the MoE layers are {sorted(counts)} with experts 0 to {layers[0].n_experts - 1}"
            )
        found[int(layer)] = found.get(int(layer), frozenset()) | {int(expert)}
    return found


def _n_kept(n_experts: int, settings: PruneExpertsSettings, *, n_groups: int = 1) -> int:
    """Experts that stay in every layer."""
    if settings.count is not None:
        return max(0, n_experts - settings.count)
    return kept_by_share(n_experts, settings.share, n_groups=n_groups)


def _metrics(layers: Sequence[MoeLayer], n_kept: int, choice: Choice, evidence: Evidence) -> list[Metric]:
    never = sum(map(len, evidence.never(layers).values()))
    found = [
        Metric("experts_per_layer", n_kept, "experts"),
        Metric("experts_removed", (layers[0].n_experts - n_kept) * len(layers), "experts"),
    ]
    if evidence.counts is not None:
        tokens = evidence.counts.n_tokens
        found.append(Metric("experts_never_reached", never, "experts", "lower", n=tokens))
    if choice.layers["change"].notna().any():
        mean = choice.layers[["change", "change_random"]].mean()
        found += [
            Metric("layer_output_change", float(mean["change"]), "", "lower", n=len(layers)),
            Metric("layer_output_change_random", float(mean["change_random"]), "", "neither", n=len(layers)),
        ]
    return found


def _notes(
    layers: Sequence[MoeLayer],
    n_kept: int,
    settings: PruneExpertsSettings,
    choice: Choice,
    evidence: Evidence,
) -> list[str]:
    bytes_not_work = (
        f"Every layer keeps {n_kept} of {layers[0].n_experts} experts. Bytes fall, work per token does not: each token "
        f"still gets {layers[0].top_k}."
    )
    return [
        bytes_not_work,
        never_note(evidence.never(layers)),
        _super_note(evidence, settings),
        _neutral_note(layers, choice),
        _random_note(choice, settings),
    ]


def _super_note(evidence: Evidence, settings: PruneExpertsSettings) -> str:
    if not settings.protect_super:
        return "Super-experts were not looked for."
    named = [f"{layer}:{e}" for layer, experts in evidence.super_experts.items() for e in experts]
    return f"Protected as super-experts: {', '.join(named)} (layer:expert)." if named else ""


def _neutral_note(layers: Sequence[MoeLayer], choice: Choice) -> str:
    """Whether removing an expert that nobody chooses would be free, and how far it is from it."""
    if all(map(neutral_when_unused, layers)):
        return ""
    if layers[0].top_groups != layers[0].n_groups:
        return (
            "Not neutral: groups are ranked by all their experts, so removing one that no token chose can change which "
            "groups are chosen."
        )
    if layers[0].rule != "softmax_topk":
        return "This router's rule is not known here; removing experts that no token chose may change the others' weights."
    said = "Not neutral: this router's weights are a softmax over all experts and not divided by the sum of the chosen. "
    gone = choice.layers["probability_removed"]
    if gone.isna().any():
        return said + "What stays gets larger weights, w / (1 − p), p the probability of what was removed."
    grow = 1 / (1 - gone) - 1
    return said + (
        f"Even for a token that chose only kept experts, weights grow to w / (1 − p): on the calibration text the removed "
        f"experts held p = {gone.mean():.1%} on average, up to {gone.max():.1%} in a layer, so about {grow.mean():+.1%}."
    )


def _random_note(choice: Choice, settings: PruneExpertsSettings) -> str:
    """Say it where the criterion chose worse than chance."""
    if settings.criterion == "random":
        return ""
    worse = choice.layers[choice.layers["change"] > choice.layers["change_random"]]
    if worse.empty:
        return ""
    named = ", ".join(map(str, worse["layer"].head(8)))
    return (
        f"In {len(worse)} of {len(choice.layers)} layers ({named}) this choice moves the layer's output more than random "
        f"choices do on average ({np.mean(worse['change']):.3f} against {np.mean(worse['change_random']):.3f} of its norm)."
    )
