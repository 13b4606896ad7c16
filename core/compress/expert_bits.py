"""Expert bits: used experts stored finer than idle ones, each layer's choice weighed against all others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.integer import quantize
from core.numerics.packed import PackedExperts, PackedTensor, narrow_rows
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.registry import Settings, method
from core.routing.aggregate import Aggregates, aggregate
from core.routing.surgery import experts_of
from core.saving.report import VIEWS, Error, headline, row, table, untouched_note
from core.types import Documents, Metric, Progress, Provenance, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy

Floats = NDArray[np.float64]
COARSE, FINE = 0, 1
SCALE_BITS = 32
"""A scale is kept in the dtype that the model is held in."""


class ExpertBitsSettings(Settings):
    """Which two forms, how many experts get the finer one, and by what."""

    format: Literal["int4", "int3", "int2", "float8"] = Field(
        default="int4",
        description="intN: all experts at N bits, coarse ones with one scale per row, fine ones with one per group; "
        "float8: coarse ones float8 with a scale per row, fine ones bfloat16",
    )
    share: float = Field(default=0.25, ge=0, le=1, description="Share of all experts that get the finer form")
    group_size: Literal["16", "32", "64", "128"] = Field(
        default="32", description="intN: consecutive weights of a row that share a scale in the finer form"
    )
    importance: Literal["weight", "load", "none"] = Field(
        default="weight",
        description="An expert's error counts by its summed routing weights, by the tokens it gets, or as everybody's",
    )
    calibration_tokens: int = Field(
        default=32_768, ge=64, le=4_194_304, description="Tokens that the routing is counted over"
    )

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """Bits per value of an expert, on average over both forms; rows are taken to be d_model long."""
        if self.format == "float8":
            coarse, fine = 8 + 16 / anatomy.d_model, 16.0
        else:
            bits = int(self.format.removeprefix("int"))
            coarse, fine = (bits + SCALE_BITS / length for length in (anatomy.d_model, int(self.group_size)))
        return {"experts": (1 - self.share) * coarse + self.share * fine}


@method(
    "compress",
    title="Bits by expert",
    needs=["moe", "text", "calibration"],
    paper="https://arxiv.org/abs/2410.06270",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: ExpertBitsSettings
) -> Result:
    """Quantize every routed expert, those that much routing depends on finer than the others.

    Each expert is stored in one of two forms. With s the importance of an expert (its summed routing weights on the
    calibration text) and ε a form's squared relative error on its weights, the forms are chosen to minimise Σ s · ε over
    all layers for the bytes allowed. All experts are of one size, so the best choice is exact: the finer form goes
    to those with the largest s · (ε_coarse − ε_fine). Routers, attention, norms and embeddings stay as they are.

    Plain transformers reads one integer width for all experts of a file, so widths cannot be mixed below 8 bits; what it
    does read expert by expert are scales per row or per group, and float8 beside bfloat16. These are the two forms.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    started = time.monotonic()
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    fused = [target for target in targets(loaded) if target.layout == "experts"]
    parameters = dict(loaded.model.named_parameters())
    _refuse_unreadable(loaded, fused, parameters, settings)
    counts = aggregate(
        loaded, calibration, part_of(progress, 0.0, 0.5), max_tokens=settings.calibration_tokens
    )
    importance_LE = _importance(counts, settings)
    packed: dict[str, list[PackedTensor]] = {}
    error_LE2 = np.zeros((*importance_LE.shape, 2))
    at = {layer.layer: index for index, layer in enumerate(layers)}
    for done, target in enumerate(fused):
        progress(0.5 + 0.4 * done / len(fused), 1.0, f"rounding {target.module}")
        weight = parameters[target.name].data
        packed[target.module] = _forms(weight, settings)
        assert target.layer is not None, "experts are inside blocks"
        error_LE2[at[target.layer]] += np.stack(
            [_squared_error(weight, p) for p in packed[target.module]], -1
        )
    fine_LE = finer(importance_LE * (error_LE2[..., COARSE] - error_LE2[..., FINE]), settings.share)
    rows = []
    for target in targets(loaded):
        parameter = parameters[target.name]
        forms = packed.get(target.module)
        choice_E = () if forms is None else tuple(fine_LE[at[target.layer or 0]].astype(int).tolist())
        rows.append(_apply(loaded, target, parameter, forms, choice_E))
    frame = table(rows)
    experts = _expert_frame(counts, importance_LE, error_LE2, fine_LE)
    return Result(
        {"main": frame, "experts": experts},
        (*_VIEWS, *VIEWS),
        (*_metrics(loaded, packed, fine_LE, importance_LE, error_LE2), *headline(frame)),
        Provenance(
            "expert_bits", settings.model_dump(mode="json"), loaded.fingerprint,
            inputs={"calibration": calibration.fingerprint}, dtype=loaded.dtype, device=loaded.device,
            conditions={"calibration": calibration.name, "calibration_tokens": counts.n_tokens},
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in _notes(loaded, frame, counts, settings) if note),
    )  # fmt: skip


def finer(gain_LE: Floats, share: float) -> NDArray[np.bool_]:
    """[L, E]: which experts get the finer form: those that gain most, so many of all layers together."""
    n = round(share * gain_LE.size)
    fine = np.zeros(gain_LE.size, dtype=bool)
    fine[np.argsort(-gain_LE.ravel(), kind="stable")[:n]] = True
    return fine.reshape(gain_LE.shape)


def _forms(weight: Tensor, settings: ExpertBitsSettings) -> list[PackedTensor]:
    """The whole fused weight in the coarse and in the fine form."""
    if settings.format == "float8":
        ones_ER1 = torch.ones_like(weight[..., :1], dtype=torch.bfloat16)
        halves = PackedTensor(weight.to(torch.bfloat16), ones_ER1, None, FloatScheme("bfloat16"))
        return [narrow_rows(weight, FloatScheme("float8_e4m3fn")), halves]
    bits = int(settings.format.removeprefix("int"))
    # An expert is read back in its scale's dtype, so that must be the model's own.
    return [
        quantize(weight, IntegerScheme(bits, group, True), scale_dtype=weight.dtype)
        for group in (None, int(settings.group_size))
    ]


def _squared_error(weight: Tensor, packed: PackedTensor) -> Floats:
    """[E]: ‖Ŵ − W‖² / ‖W‖² of each expert's part of a fused weight, as it will be read back."""
    after = packed.dequantize().to(weight.dtype).float()
    noise = (after - weight.float()).square().sum((1, 2))
    found: Floats = (noise / weight.float().square().sum((1, 2)).clamp(min=1e-30)).double().cpu().numpy()
    return found


def _importance(counts: Aggregates, settings: ExpertBitsSettings) -> Floats:
    """[L, E] with mean 1 in every layer."""
    if settings.importance == "none":
        return np.ones(counts.load_LE.shape)
    found = counts.load_LE.astype(np.float64) if settings.importance == "load" else counts.weight_LE
    return np.asarray(found / found.mean(1, keepdims=True))


def _apply(
    loaded: LoadedModel, target: Target, parameter: torch.nn.Parameter, forms: Sequence[PackedTensor] | None,
    choice_E: tuple[int, ...],
) -> dict[str, object]:  # fmt: skip
    """Round one tensor in place and record how it is stored; its line of the report."""
    before = parameter.data
    if forms is None:
        reason = target.reason if target.layout == "none" else "not a routed expert: this method leaves it"
        return row(
            target, parameter, format_=str(before.dtype).removeprefix("torch."), bits=8 * before.element_size(),
            group_size="none", bytes_before=before.nbytes, bytes_after=before.nbytes, error=Error(0.0, None),
            touched=False, reason=reason,
        )  # fmt: skip
    packed = PackedExperts(tuple(forms), choice_E)
    loaded.packed[target.module] = packed
    parameter.data = packed.dequantize().to(before.dtype)
    return row(
        target, parameter, format_=" / ".join(form.scheme.label for form in forms),
        bits=8 * packed.stored_bytes / before.numel(), group_size="by expert", bytes_before=before.nbytes,
        bytes_after=packed.stored_bytes, error=Error.between(before, parameter.data), touched=True, reason="",
    )  # fmt: skip


def _refuse_unreadable(
    loaded: LoadedModel,
    fused: Sequence[Target],
    parameters: Mapping[str, torch.nn.Parameter],
    settings: ExpertBitsSettings,
) -> None:
    """Families whose files hold all experts as one tensor, and groups that do not divide a row."""
    from transformers.core_model_loading import revert_weight_conversion

    names = {target.name: torch.empty_like(parameters[target.name], device="meta") for target in fused}
    whole = [n for n, t in revert_weight_conversion(loaded.model, names).items() if t.ndim > 2]
    if whole or not fused:
        raise CannotCompress(
            f"{loaded.anatomy.architecture} stores all experts of a layer as one tensor"
            f"{f' ({whole[0]})' if whole else ''}, and plain transformers reads packed experts only one by one; "
            "use cast for this family"
        )
    if settings.format == "float8":
        return
    for target in fused:
        columns = parameters[target.name].shape[-1]
        if columns % int(settings.group_size):
            fitting = [
                g for g in (16, 32, 64, 128) if all(parameters[t.name].shape[-1] % g == 0 for t in fused)
            ]
            raise CannotCompress(
                f"group_size {settings.group_size} does not divide in_features {columns} of {target.module}; "
                f"choose {', '.join(map(str, fitting)) or 'format=float8'}"
            )


def _expert_frame(
    counts: Aggregates, importance_LE: Floats, error_LE2: Floats, fine_LE: NDArray[np.bool_]
) -> pd.DataFrame:
    n_layers, n_experts = fine_LE.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(counts.layers, n_experts),
            "expert": np.tile(np.arange(n_experts), n_layers),
            "form": np.where(fine_LE.ravel(), "fine", "coarse"),
            "load": counts.load_LE.ravel(),
            "importance": importance_LE.ravel(),
            "error_coarse": error_LE2[..., COARSE].ravel(),
            "error_fine": error_LE2[..., FINE].ravel(),
            "gain": (importance_LE * (error_LE2[..., COARSE] - error_LE2[..., FINE])).ravel(),
        }
    )


def _metrics(
    loaded: LoadedModel,
    packed: Mapping[str, Sequence[PackedTensor]],
    fine_LE: NDArray[np.bool_],
    importance_LE: Floats,
    error_LE2: Floats,
) -> tuple[Metric, ...]:
    stored = sum(loaded.packed[module].stored_bytes for module in packed)
    parameters = sum(forms[0].codes.numel() for forms in packed.values())
    error_LE = np.where(fine_LE, error_LE2[..., FINE], error_LE2[..., COARSE])
    return (
        Metric("bits_per_expert_weight", 8 * stored / parameters, "bit", "lower"),
        Metric("weighted_squared_error", float((importance_LE * error_LE).mean()), "", "lower"),
        Metric("experts_finer", int(fine_LE.sum()), "experts", n=fine_LE.size),
    )


def _notes(
    loaded: LoadedModel, frame: pd.DataFrame, counts: Aggregates, settings: ExpertBitsSettings
) -> tuple[str, ...]:
    routers = frame[frame["component"] == "router"]
    never = int((counts.load_LE == 0).sum())
    width = (
        f"All experts have {settings.format.removeprefix('int')}-bit codes: plain transformers reads one width for all "
        "experts of a file. What differs is how many weights share a scale."
        if settings.format != "float8"
        else "Experts are float8 with one scale per row, or bfloat16: below 8 bits plain transformers reads one width only."
    )
    unused = (
        f"{never} experts were never chosen on {counts.n_tokens:,} tokens of calibration text and count as unimportant; "
        "other text may choose them."
        if never and settings.importance != "none"
        else ""
    )
    return (width, f"Routers stay at {int(routers['bits'].min())} bits.", unused, untouched_note(frame))


_VIEWS = (
    View(
        "heatmap", x="expert", y="layer", color="importance", text="form", frame="experts", midpoint=1.0,
        title="Importance of every expert, and its form", tooltip=("load", "gain", "error_coarse", "error_fine"),
    ),
)  # fmt: skip
