"""Novices: experts that hardly vary are replaced by their mean output, a constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from pydantic import Field

from core.compress._unreached import never_note
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.reshape.structure import Inventory, structural_result
from core.routing.discover import MoeLayer
from core.routing.exhaustive import layer_inputs
from core.routing.merging_profile import expert_output
from core.routing.novices import Form, OutputMoments, constant_expert, form_of, output_moments
from core.routing.passages import passages
from core.routing.surgery import experts_of, read_expert, write_expert
from core.types import Documents, Metric, Progress, Result, View

PASSAGE = 256
CHECKED_TOKENS = 512
"""Tokens on which the norm is checked before, and every constant after."""
_VIEWS = (
    View(
        "heatmap", x="expert", y="layer", color="mean_holds", frame="experts",
        title="Share of an expert's squared output that a constant holds",
        tooltip=("status", "tokens", "output_std", "score"),
    ),
)  # fmt: skip


class NoviceExpertsSettings(Settings):
    """How many experts become constants."""

    share: float = Field(default=0.25, gt=0, le=1, description="Share of every layer's experts to replace")
    count: int | None = Field(
        default=None, ge=1, le=4096, description="Experts to replace in every layer, instead of a share"
    )
    calibration_tokens: int = Field(
        default=8192, ge=64, le=1_048_576, description="Tokens that means and deviations are of"
    )


@method(
    "compress",
    title="Experts to constants",
    needs=["moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2507.00390",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: NoviceExpertsSettings
) -> Result:
    """Replace the experts that are rare and hardly vary by their mean output, so that routing stays as it was (MoNE).

    Experts are ranked by frequency × standard deviation of their output over the calibration tokens routed to them; the
    lowest of each layer put out their mean from now on. Against pruning, no token is sent elsewhere and no routing
    weight changes. Plain checkpoints hold only experts of one shape, so a constant is written as weights that compute
    it: as the bias of a zero down projection, or as neurons that pair up to squares and sum to a constant because their
    input has constant length. **The bytes stay as they are**; it tells what the experts are worth, and a runtime that
    knows constants can skip them. Where a family can express no constant, the method refuses.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    count = _count(layers[0], settings)
    texts = passages(loaded, calibration, length=PASSAGE, max_tokens=settings.calibration_tokens)
    with loaded.lock, torch.inference_mode():
        inputs = layer_inputs(loaded, texts, CHECKED_TOKENS)
        forms: dict[int, Form] = {at.layer: form_of(loaded, at, inputs[at.layer]) for at in layers}
        progress(0.2, 1.0, "reading what every expert puts out")
        moments = output_moments(loaded, layers, texts)
        chosen = {
            at.layer: sorted(np.argsort(moments[at.layer].redundancy_score_E, kind="stable")[:count].tolist())
            for at in layers
        }
        before = Inventory.of(loaded)
        progress(0.8, 1.0, "writing constants")
        for at in layers:
            for expert in chosen[at.layer]:
                like = read_expert(loaded, at.layer, expert)
                constant_D = moments[at.layer].mean_ED[expert]
                write_expert(
                    loaded, at.layer, expert, constant_expert(loaded, at, like, forms[at.layer], constant_D)
                )
        gap = _gap(loaded, layers, chosen, moments, texts)
    loaded.become(loaded.model)
    frame = _expert_frame(layers, chosen, moments)
    never = {
        at.layer: tuple(np.flatnonzero(moments[at.layer].tokens_E == 0).tolist())
        for at in layers
        if (moments[at.layer].tokens_E == 0).any()
    }
    return structural_result(
        before,
        loaded,
        settings,
        method="novice_experts",
        frames={"experts": frame},
        views=_VIEWS,
        metrics=(
            Metric("novices", count * len(layers), "experts"),
            Metric("mean_holds", _held_by_novices(frame), "", "higher"),
        ),
        notes=_notes(layers, count, set(forms.values()), never),
        inputs={"calibration": calibration.fingerprint},
        conditions={"calibration": calibration.name, "calibration_tokens": sum(map(len, texts))},
        exactness_gap=gap,
        exactness_check="largest ‖novice(x) − constant‖ / ‖constant‖ over tokens of the changed model",
    )


def _count(layer: MoeLayer, settings: NoviceExpertsSettings) -> int:
    count = settings.count if settings.count is not None else round(layer.n_experts * settings.share)
    if not 1 <= count <= layer.n_experts:
        raise CannotCompress(
            f"{count} of {layer.n_experts} experts per layer cannot be replaced; choose 1 to {layer.n_experts}"
        )
    return count


def _gap(
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    chosen: Mapping[int, list[int]],
    moments: Mapping[int, OutputMoments],
    texts: Sequence[Sequence[int]],
) -> float:
    """How far the written experts are from the constants they stand for."""
    inputs = layer_inputs(loaded, texts, CHECKED_TOKENS)
    worst = 0.0
    for at in layers:
        experts = loaded.model.get_submodule(at.experts)
        for expert in chosen[at.layer]:
            constant_D = moments[at.layer].mean_ED[expert]
            off_T = (expert_output(experts, expert, inputs[at.layer]).double() - constant_D).norm(dim=-1)
            worst = max(worst, float(off_T.max() / constant_D.norm().clamp(min=1e-30)))
    return worst


def _expert_frame(
    layers: Sequence[MoeLayer], chosen: Mapping[int, list[int]], moments: Mapping[int, OutputMoments]
) -> pd.DataFrame:
    rows = []
    for at in layers:
        found = moments[at.layer]
        std_E, score_E = found.std_E, found.redundancy_score_E
        mean_square_E = found.mean_ED.square().sum(-1).cpu().numpy()
        for e in range(at.n_experts):
            whole = found.mean_square_E[e]
            rows.append(
                {
                    "layer": at.layer,
                    "expert": e,
                    "tokens": int(found.tokens_E[e]),
                    "output_std": std_E[e],
                    "mean_holds": mean_square_E[e] / whole if whole else np.nan,
                    "score": score_E[e],
                    "status": "constant" if e in chosen[at.layer] else "kept",
                }
            )
    return pd.DataFrame(rows)


def _held_by_novices(frame: pd.DataFrame) -> float:
    held = frame.loc[(frame["status"] == "constant") & (frame["tokens"] > 0), "mean_holds"]
    return float(held.mean()) if len(held) else 0.0


def _notes(
    layers: Sequence[MoeLayer], count: int, forms: set[Form], never: Mapping[int, Sequence[int]]
) -> list[str]:
    written = {
        "bias": "Constants are biases of zero down projections: exact.",
        "squares": "Constants are sums of squares of a normed input: exact up to the norm's ε. Rounding these weights "
        "afterwards would undo them.",
    }
    same_bytes = (
        f"{count} of {layers[0].n_experts} experts of every layer are constants now, written in the shape experts have: the "
        "files have the same bytes, and plain transformers computes them like any other."
    )
    return [same_bytes, *(written[form] for form in sorted(forms)), never_note(never)]
