"""SmoothQuant: 8-bit weights and 8-bit activations, the activations' outliers moved into the weights first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field

from core.calibrate.matrices import matrices
from core.calibrate.walk import Collected, cost_of_walk, walk
from core.calibrate.windows import read_calibration
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.numerics.activations import ActivationScheme
from core.numerics.schemes import FloatScheme, IntegerScheme, Scheme
from core.quantize.grid import Formats, bits_per_value, lay_out, put, put_nearest, refuse_packed, rounded
from core.quantize.scaling_places import Place, places, unchanged
from core.registry import Settings, method
from core.saving.description import refuse_mixture
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Documents, Metric, Progress, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy, Block

GRID = IntegerScheme(8, None, symmetric=True)
HALF_STEPS = 127.5
"""Static scales are max|X| / 127.5, as compressed-tensors computes them."""
SMALLEST = 1e-5
VIEW = View(
    "heatmap", x="layer", y="projection", color="outlier_after", frame="inputs", midpoint=1.0, log=True,
    title="Largest input over the mean size of inputs, after smoothing",
    tooltip=("module", "outlier_before", "scale"),
)  # fmt: skip


class SmoothquantSettings(Settings):
    """How far activations are smoothed, how they are rounded, and on which text."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the activations' range that moves into the weights; 0.8 to 0.85 is usual for Llama",
    )
    activations: Literal["dynamic", "static", "none"] = Field(
        default="dynamic",
        description="Scales of 8-bit inputs: dynamic, one per token as it passes; static, one per layer from the text; "
        "none: inputs stay as they are",
    )
    places: Literal["norms", "all"] = Field(
        default="norms",
        description="Where scales are folded: into norms, or also into values and up projections where that is exact",
    )
    embedding_bits: Literal[8, 16] = Field(
        default=16, description="Bits per value of embedding and head: 8 for float8 (e4m3), 16 for bfloat16"
    )
    samples: int = Field(default=64, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice of windows")

    @property
    def table(self) -> FloatScheme:
        """What embedding and head are stored as."""
        return FloatScheme("float8_e4m3fn" if self.embedding_bits == 8 else "bfloat16")

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """Component → bits per value in the file."""
        grid = bits_per_value(GRID, anatomy.d_model)
        tables = dict.fromkeys(("embedding", "head"), float(self.embedding_bits))
        return {**dict.fromkeys(("attention", "mlp", "experts", "shared_expert"), grid), **tables}


@method(
    "compress",
    title="SmoothQuant",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2211.10438",
    cost=cost_of_walk("max_abs", "mean_abs"),
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: SmoothquantSettings,
) -> Result:
    """Weights and activations in 8 bits: what a few channels have too much of is moved from activations into weights.

    s_j = max|X_j|^α / max|W_j|^(1 - α) per input channel; X / s is folded into the norm before and W · s into the
    matrices, which changes nothing until both are rounded. Weights get one symmetric scale per output; inputs of every
    linear layer one per token (dynamic) or one per layer from calibration text (static). Files say so in
    compressed-tensors' words, and plain transformers rounds inputs likewise, in floats: the loss is real, the speed of
    8-bit kernels is not there. Inputs of embedding, head, routers and fused experts are not rounded.
    """
    started = time.monotonic()
    refuse_packed(loaded)
    schemes = lay_out(loaded, Formats(GRID, GRID, settings.table, settings.table))
    if settings.activations != "none":
        _refuse_conv1d(loaded)
        refuse_mixture(loaded, schemes, dict.fromkeys(_layers(loaded), ActivationScheme()))
    text = read_calibration(loaded, calibration, settings)

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        return _smooth_and_round(loaded, block, collected, schemes, settings)

    with loaded.lock, torch.inference_mode():
        reports = walk(
            loaded,
            text.windows_BP,
            change,
            collect=["max_abs", "mean_abs"],
            progress=progress,
            scratch=scratch,
        )
        rows = [row for report in reports for row in report["rows"]]
        rows += [put_nearest(loaded, t, schemes.get(t.name)) for t in targets(loaded) if t.layer is None]
    inputs = pd.DataFrame([line for report in reports for line in report["inputs"]]).astype(
        {"expert": "Int64"}
    )
    if settings.activations != "none":
        scales = dict(zip(inputs["module"], inputs["scale"], strict=True))
        for module in _layers(loaded):
            scale = scales[module] if settings.activations == "static" else None
            loaded.round_inputs(module, ActivationScheme(scale))
    frame = table(rows)
    notes = (
        text.shortage,
        "A tensor's error is that of rounding: against the weight after scales were folded into it.",
        _experts_note(loaded, settings),
        ""
        if any(report["folded"] for report in reports)
        else "No scale was folded: this model's norms feed the residual stream too, so this is plain 8-bit rounding.",
        untouched_note(frame),
    )
    return Result(
        {"main": frame, "inputs": inputs},
        (VIEW, *VIEWS),
        (
            Metric("largest_outlier_before", float(inputs["outlier_before"].max()), "×", "neither", n=len(inputs)),
            Metric("largest_outlier_after", float(inputs["outlier_after"].max()), "×", "lower", n=len(inputs)),
            *headline(frame),
        ),
        Provenance(
            "smoothquant", settings.model_dump(), loaded.fingerprint, inputs=text.inputs, conditions=text.conditions,
            dtype=loaded.dtype, device=loaded.device, seconds=time.monotonic() - started,
            exactness_gap=max(report["gap"] for report in reports),
            exactness_check="output of each block after folding scales, before rounding, relative",
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


def smoothing_scales(max_abs_S: Tensor, max_weight_S: Tensor, alpha: float) -> Tensor:
    """s = max|X|^α / max|W|^(1 - α) per channel; 1 where a channel is never active or not read."""
    scale_S = max_abs_S.clamp(min=SMALLEST).pow(alpha) / max_weight_S.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((max_abs_S > 0) & (max_weight_S > 0), scale_S.clamp(min=SMALLEST), 1.0)


def _layers(loaded: LoadedModel) -> tuple[str, ...]:
    """The linear layers whose inputs are rounded."""
    every = (matrix for block in loaded.anatomy.blocks for matrix in matrices(loaded, block))
    return tuple(matrix.module for matrix in every if matrix.expert is None)


def _refuse_conv1d(loaded: LoadedModel) -> None:
    conv = next((t.module for t in targets(loaded) if t.layout == "conv1d"), None)
    if conv is not None:
        raise CannotCompress(
            f"{conv} is a Conv1D, and files have words for the rounded inputs of nn.Linear alone; choose activations=none"
        )


def _smooth_and_round(
    loaded: LoadedModel,
    block: Block,
    collected: Collected,
    schemes: Mapping[str, Scheme],
    settings: SmoothquantSettings,
) -> dict[str, Any]:
    """One block: scales folded, then every matrix to nearest; how inputs' outliers shrank."""
    model = loaded.model
    mine = [target for target in targets(loaded) if target.layer == block.index]
    found = {target.name: model.get_parameter(target.name).data.clone() for target in mine}
    seen = {name: inputs for name, inputs in collected.inputs.items() if inputs.n}
    largest = {name: inputs.max_abs_I for name, inputs in seen.items()}
    mean = {name: inputs.mean_abs_I for name, inputs in seen.items()}
    before = {name: float(largest[name].max() / mean[name].mean()) for name in seen}
    folded = 0
    with unchanged(loaded, block, collected) as gaps:
        for place in places(loaded, block):
            names = list(dict.fromkeys(m.inputs for m in place.readers if m.inputs in seen))
            if names and (settings.places == "all" or place.divided is None):
                scale_S = _scales_at(place, [largest[name] for name in names], settings.alpha)
                place.apply(scale_S)
                folded += 1
                for name in names:
                    largest[name] = largest[name] / place.spread(scale_S)
                    mean[name] = mean[name] / place.spread(scale_S)
    rows = []
    for target in mine:
        scheme, now = schemes.get(target.name), model.get_parameter(target.name).data
        packed = None if scheme is None else rounded(target, now, scheme)
        rows.append(put(loaded, target, packed, found[target.name] if packed is None else now.clone()))
    lines = [
        {
            "module": matrix.module,
            "layer": matrix.layer,
            "projection": matrix.projection,
            "expert": matrix.expert,
            "scale": float(largest[matrix.inputs].max() / HALF_STEPS),
            "outlier_before": before[matrix.inputs],
            "outlier_after": float(largest[matrix.inputs].max() / mean[matrix.inputs].mean()),
        }
        for matrix in matrices(loaded, block)
        if matrix.inputs in seen
    ]
    return {"rows": rows, "inputs": lines, "gap": gaps[0], "folded": folded}


def _scales_at(place: Place, largest: Iterable[Tensor], alpha: float) -> Tensor:
    """Scales of one place, from the largest inputs and weights over all of its readers."""
    max_abs_I = torch.stack(list(largest)).amax(0)
    max_weight_I = torch.stack([matrix.read().abs().amax(0) for matrix in place.readers]).amax(0)
    return smoothing_scales(place.pool(max_abs_I), place.pool(max_weight_I), alpha)


def _experts_note(loaded: LoadedModel, settings: SmoothquantSettings) -> str:
    if not loaded.anatomy.n_experts or settings.activations == "none":
        return ""
    return "Experts are stored in 8 bits, but what they read is not rounded: files have no words for fused experts' inputs."
