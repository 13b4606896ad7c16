"""From a mixture of experts to a dense model: experts laid side by side, each with one constant gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field

from core.compress._constant_gates import (
    Moments,
    expert_mlp,
    gap_at_constant_gates,
    gather_moments,
)
from core.compress._conversion import Source, converted_result
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.routing._upcycling import GatedMlp, constant_gates, laid_side_by_side
from core.routing._upcycling_build import dense_config, dense_tensors, rebuilt, refuse_gap
from core.routing.aggregate import Aggregates, aggregate
from core.routing.criteria import scores_LE
from core.routing.discover import MoeLayer
from core.routing.surgery import experts_of
from core.train._residuals import cut_text
from core.types import Documents, Metric, Progress, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 256
VIEWS = (
    View(
        "line", x="layer", y="relative_error", color="gates", frame="layers",
        title="What constant gates cannot give of each layer's output, on held-out text",
    ),
    View("heatmap", x="layer", y="expert", color="gate", frame="experts", title="Constant gate of each expert kept"),
)  # fmt: skip


class DensifySettings(Settings):
    """Which experts stay, and with what weight."""

    experts: int = Field(
        default=0, ge=0, le=256, description="Experts laid side by side; 0: as many as a token uses now"
    )
    select: Literal["reap", "frequency", "random"] = Field(
        default="reap",
        description="Which stay: reap, those that add most where they are chosen; frequency, those chosen most; random, "
        "the control",
    )
    gates: Literal["fitted", "mean"] = Field(
        default="fitted",
        description="fitted: constants with the least squared error on calibration text; mean: the average routing weight",
    )
    max_tokens: int = Field(
        default=8192, ge=64, le=262_144, description="Calibration tokens; a fifth is held out to measure on"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the random selection")


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays of one layer."""

    layer: MoeLayer
    experts: tuple[int, ...]
    mlps: tuple[GatedMlp, ...]
    """Of ``experts``, then the shared expert if there is one."""
    mean_M: Tensor
    """Average weight of each, scaled so that the routed ones sum to what all experts' weights sum to."""


@method(
    "compress",
    title="Make dense",
    needs=["decoder", "moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2605.28207",
    left=lambda anatomy, settings: {
        "experts": (settings.experts or anatomy.experts_per_token) / anatomy.n_experts,
        "router": 0.0,
    },
    group="convert",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: DensifySettings
) -> Result:
    """Turn every mixture of experts into one dense MLP: the chosen experts side by side, all of them for every token.

    Experts with gates that never change are one wide MLP, because Σ c_j f_j(x) is a sum of neurons and c_j a factor on
    W_down. So the best experts of each layer are kept, a constant takes the place of each gate, and the router goes.
    What is lost is what routing did: the model must be distilled afterwards, for which it is a far better start than
    a fresh one. A shared expert is kept as one more. Where gates are constant already, nothing is lost.

    Mixtral becomes Mistral, Qwen2-MoE and Qwen3-MoE become Qwen2 and Qwen3, Granite-MoE Granite, and DeepSeek-V3 a
    DeepSeek-V3 of dense layers only. OLMoE has no dense relative (its norm over all query heads is its own): it becomes
    an OLMoE of one expert, which every token uses with weight 1.
    """
    assert calibration is not None, "the registry's `needs` ask for calibration text"
    source = Source.of(loaded)
    layers = experts_of(loaded)
    n_kept = settings.experts or layers[0].top_k
    if n_kept > layers[0].n_experts:
        raise CannotCompress(
            f"experts={n_kept}, but every layer has {layers[0].n_experts}; choose at most as many"
        )
    dense_config(loaded, width=1)  # refuses an architecture without dense relative before any work
    counts = aggregate(
        loaded, calibration, part_of(progress, 0, 0.4), max_tokens=settings.max_tokens, norms=True
    )
    kept = _select(loaded, layers, counts, n_kept, settings)
    parts = cut_text(loaded, calibration, window=WINDOW, max_tokens=settings.max_tokens)
    chosen = {k.layer.layer: k.mlps for k in kept}
    with loaded.lock, torch.inference_mode():
        learned = gather_moments(loaded, chosen, parts.training, part_of(progress, 0.4, 0.8))
        held_out = gather_moments(loaded, chosen, parts.held_out, part_of(progress, 0.8, 0.9))
    fitted = {i: constant_gates(m.gram_MM, m.moment_M) for i, m in learned.items()}
    mean = {k.layer.layer: k.mean_M for k in kept}
    gates = fitted if settings.gates == "fitted" else mean
    with torch.inference_mode(False), torch.no_grad():
        gates = {i: gate.clone() for i, gate in gates.items()}
        progress(0.9, 1.0, "comparing with the mixture at constant gates")
        mlps = _mlps(loaded, chosen, gates)
        config = dense_config(loaded, width=max(mlp.width for mlp in mlps.values()))
        model = rebuilt(loaded, config, dense_tensors(loaded, mlps))
        gap = gap_at_constant_gates(loaded, model, chosen, gates)
        refuse_gap(loaded, model, gap)
        progress(0.95, 1.0, "proving the anatomy of the dense model")
        loaded.become(model)
    errors = _errors(held_out, {"fitted": fitted, "mean": mean})
    of_used = errors.loc[errors["gates"] == settings.gates, "relative_error"].mean()
    return converted_result(
        source,
        loaded,
        settings,
        method="densify",
        exactness=(
            gap,
            "logits against the mixture's with the same constant gates, largest relative difference",
        ),
        frames={"layers": errors, "experts": _gates_frame(kept, gates, counts)},
        views=VIEWS,
        metrics=(Metric("missing_of_mlp_output", float(of_used), "", "lower"),),
        notes=(_note(loaded, float(of_used)),),
        calibration=calibration,
    )


def _select(
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    counts: Aggregates,
    n_kept: int,
    settings: DensifySettings,
) -> list[_Kept]:
    scores = scores_LE(settings.select, loaded, layers, counts, seed=settings.seed)
    weights_LE = torch.from_numpy(counts.weight_LE / counts.n_tokens)
    kept = []
    for row, layer in enumerate(layers):
        best = sorted(scores[row].argsort(kind="stable")[::-1][:n_kept].tolist())
        mean_M = weights_LE[row][best]
        total = float(mean_M.sum())
        mean_M = (
            mean_M * (float(weights_LE[row].sum()) / total) if total else torch.full_like(mean_M, 1 / n_kept)
        )
        mlps = [expert_mlp(loaded, layer.layer, expert) for expert in best]
        if layer.shared is not None:
            mlps.append(_linear_mlp(loaded, layer.shared))
            # A shared expert's sigmoid gate starts at one half; least squares finds what it really is.
            mean_M = torch.cat([mean_M, mean_M.new_tensor([1.0 if layer.shared_gate is None else 0.5])])
        kept.append(_Kept(layer, tuple(best), tuple(mlps), mean_M.to(loaded.device)))
    return kept


def _linear_mlp(loaded: LoadedModel, path: str) -> GatedMlp:
    module = loaded.model.get_submodule(path)
    return GatedMlp(
        *(getattr(module, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj"))
    )


def _mlps(
    loaded: LoadedModel, chosen: Mapping[int, Sequence[GatedMlp]], gates: Mapping[int, Tensor]
) -> dict[int, GatedMlp]:
    """The dense MLP of every block; blocks that were dense keep theirs."""
    return {
        block.index: laid_side_by_side(chosen[block.index], gates[block.index])
        if block.is_moe
        else _linear_mlp(loaded, str(block.mlp))
        for block in loaded.anatomy.blocks
    }


def _errors(held_out: Mapping[int, Moments], gates: Mapping[str, Mapping[int, Tensor]]) -> pd.DataFrame:
    rows = [
        {"layer": layer, "gates": name, "relative_error": moments.relative_error(of_layer[layer])}
        for name, of_layer in gates.items()
        for layer, moments in held_out.items()
    ]
    return pd.DataFrame(rows)


def _gates_frame(kept: Sequence[_Kept], gates: Mapping[int, Tensor], counts: Aggregates) -> pd.DataFrame:
    rows = []
    for row, k in enumerate(kept):
        names = [*map(str, k.experts), *(["shared"] if k.layer.shared else [])]
        for place, (name, gate) in enumerate(zip(names, gates[k.layer.layer].tolist(), strict=True)):
            load = counts.load_LE[row, k.experts[place]] / counts.n_tokens if place < len(k.experts) else 1.0
            rows.append({"layer": k.layer.layer, "expert": name, "gate": gate, "share_of_tokens": load})
    return pd.DataFrame(rows)


def _note(loaded: LoadedModel, error: float) -> str:
    still = (
        " It is still an OLMoE in name: one expert, always chosen, with weight 1."
        if loaded.anatomy.n_experts
        else ""
    )
    return (
        f"Constant gates miss {error:.0%} of a layer's output on held-out text on average (root mean square); distil it "
        f"from the mixture before it is judged.{still}"
    )
