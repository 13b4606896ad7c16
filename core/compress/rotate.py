"""Rotate: turn the residual stream and every head's values so that no channel stands out; the model stays the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field, model_validator

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.quantize.folding import (
    Fed,
    exactness_gap,
    fed_by_norms,
    linear,
    logits_on_probe,
    norm_weight,
    set_norm,
    value_rows,
    writers,
)
from core.quantize.rotations import hadamard_plan, rotation, rotation_around_ones
from core.registry import Settings, method
from core.reshape.structure import Inventory, structural_result
from core.types import Documents, Metric, Progress, Result, View

if TYPE_CHECKING:
    from torch import Tensor

SPREAD_VIEW = View(
    "table", x="module", text="incoherence", frame="spread", title="How far the largest weight stands out",
    tooltip=("incoherence_before", "layer", "component"),
)  # fmt: skip


class RotateSettings(Settings):
    """What is turned."""

    residual: bool = Field(
        default=True,
        description="Turn the residual stream; a head tied to the embedding must become a tensor of its own for it",
    )
    values: bool = Field(
        default=True, description="Turn every head's values, between its value and output matrices"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the random signs or directions")

    @model_validator(mode="after")
    def _something_turns(self) -> RotateSettings:
        if not (self.residual or self.values):
            raise ValueError("residual and values are both off, so nothing would be turned; set one of them")
        return self


def _left(anatomy: Anatomy, settings: Any) -> dict[str, float]:
    """A tied head becomes a second table beside the embedding (position embeddings count with the token table)."""
    if not (anatomy.tied and settings.residual):
        return {}
    positions = anatomy.context_length if anatomy.position_embedding else 0
    return {"embedding": 1 + anatomy.vocab_size / (anatomy.vocab_size + positions)}


@method(
    "compress", title="Rotate", needs=["decoder"], paper="https://arxiv.org/abs/2404.00456", left=_left,
    group="transform",
)  # fmt: skip
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: RotateSettings
) -> Result:
    """Turn the model's channels into each other before it is quantized: same function, no outlier channels.

    Norm weights are folded into the matrices that read them; then the stream x becomes x · Q with Q orthogonal: a norm
    gives the same length, readers become W · Q, writers Qᵀ · W, embedding rows e · Q. Q is a Hadamard matrix with random
    signs where one of that size is known (QuaRot), else drawn uniformly. Every head's values are turned likewise. It
    saves no byte by itself, and turns off nothing: a grid fits the turned weights better where few channels were large.
    QuaRot's rotations of queries, keys and MLP neurons happen while the model runs, so plain files cannot hold them.

    With LayerNorm, what is written is centred first and Q leaves the ones in place, so the mean stays 0. The final norm's
    weight goes into the head but not into the embedding: a tied head becomes a tensor of its own, which costs its bytes.
    The outputs are compared before and after, and anything but rounding is refused.
    """
    loaded.refuse_if_packed()
    _refuse_layout(loaded, settings)
    before = Inventory.of(loaded)
    spread = _incoherence(loaded)
    reference = logits_on_probe(loaded.model, loaded.anatomy)
    notes = []
    with torch.inference_mode(False), torch.no_grad():
        if settings.residual:
            if loaded.anatomy.tied:
                notes.append(_untie(loaded))
            notes.append(_turn_residual(loaded, progress, seed=settings.seed))
        if settings.values:
            notes.append(_turn_values(loaded, seed=settings.seed + 1))
        progress(0.9, 1.0, "comparing with the model before")
        gap = exactness_gap(
            reference, logits_on_probe(loaded.model, loaded.anatomy), dtype=loaded.dtype, what="a rotation"
        )
        loaded.become(loaded.model)
    frame = _spread(spread, _incoherence(loaded))
    return structural_result(
        before, loaded, settings, method="rotate", frames={"spread": frame}, views=(SPREAD_VIEW,),
        metrics=(
            Metric("relative_output_change", gap, "", "lower"),
            Metric("incoherence_before", float(frame["incoherence_before"].mean()), "×", "neither", n=len(frame)),
            Metric("incoherence", float(frame["incoherence"].mean()), "×", "lower", n=len(frame)),
        ),
        notes=notes, exactness_gap=gap, exactness_check="logits on fixed tokens against the model before, relative",
    )  # fmt: skip


def _refuse_layout(loaded: LoadedModel, settings: RotateSettings) -> None:
    """What cannot be turned exactly, by name, before anything is changed."""
    anatomy = loaded.anatomy
    if not all(block.has_pattern for block in anatomy.blocks):
        raise CannotCompress(
            f"{anatomy.architecture} has layers without plain attention heads (latent attention or Mamba), whose readers "
            "of the stream are not known here; leave this step out"
        )
    if not settings.residual:
        return
    why = ""
    if anatomy.norm_place == "sandwich":
        why = (
            "norms what is written with weights of its own before it is added, so a rotation cannot pass them"
        )
    elif anatomy.norm_place == "post" or anatomy.embedding_norm is not None:
        why = "norms the residual stream itself, so a rotation cannot pass the norm's weights"
    elif anatomy.final_norm is None or anatomy.unembedding is None or anatomy.head_transform is not None:
        why = "has no plain head on a final norm"
    elif any(getattr(loaded.model.get_submodule(norm), "weight", None) is None for norm in _norms(anatomy)):
        why = "has norms without weights of their own"
    elif loaded.model.get_submodule(anatomy.embedding).weight.shape[1] != anatomy.d_model:
        why = "projects its embedding before the first layer"
    if why:
        raise CannotCompress(
            f"{anatomy.architecture} {why}; choose residual=false to turn only the heads' values"
        )
    for norm in _norms(anatomy):
        module = loaded.model.get_submodule(norm)
        bias = getattr(module, "bias", None)
        if bias is not None and bool(((module.weight == 0) & (bias != 0)).any()):
            raise CannotCompress(
                f"{norm} has channels with weight 0 and a bias, which cannot be folded into what reads it; choose "
                "residual=false"
            )


def _norms(anatomy: Anatomy) -> Iterator[str]:
    for block in anatomy.blocks:
        yield block.attention_norm
        yield block.mlp_norm
    if anatomy.final_norm is not None:
        yield anatomy.final_norm


def _untie(loaded: LoadedModel) -> str:
    """Give the head a tensor of its own; what that costs, as a note."""
    model = loaded.model
    head = model.get_submodule(loaded.anatomy.unembedding)
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return (
        f"The head was tied to the embedding and is a tensor of its own now: {head.weight.numel() / 1e6:.1f} M more "
        f"parameters, {head.weight.nbytes / 1e6:.1f} MB more as {loaded.dtype}. The final norm's weights belong to the "
        "head alone, so no rotation but one that leaves every channel in place keeps the tie."
    )


def _turn_residual(loaded: LoadedModel, progress: Progress, *, seed: int) -> str:
    """Fold every norm, centre what is written where norms subtract the mean, and turn everything by one matrix."""
    model, anatomy = loaded.model, loaded.anatomy
    centred = isinstance(model.get_submodule(str(anatomy.final_norm)), torch.nn.LayerNorm)
    turn = rotation_around_ones if centred else rotation
    turn_DD = turn(anatomy.d_model, seed=seed).to(model.device)
    for path in filter(None, (anatomy.embedding, anatomy.position_embedding)):
        table = model.get_submodule(path).weight
        table.data = (_centred(table.data.double(), centred) @ turn_DD).to(table.dtype)
    fed = fed_by_norms(model, anatomy)
    for done, norm in enumerate(fed):
        progress(0.1 + 0.7 * done / len(fed), 1.0, f"turning what reads {norm.norm}")
        _fold_and_turn(model, anatomy, norm, turn_DD)
    for block in anatomy.blocks:
        for writer in writers(model, block):
            weight_ID = _centred(writer.read(model).transpose(-1, -2), centred) @ turn_DD
            writer.write(model, weight_ID.transpose(-1, -2))
            if writer.bias is not None:
                bias = model.get_parameter(writer.bias)
                bias.data = (_centred(bias.data.double(), centred) @ turn_DD).to(bias.dtype)
    if centred:
        return (
            "What is written to the stream was centred and turned uniformly at random around the direction of ones, "
            "because these norms subtract the mean."
        )
    kind = (
        "a Hadamard matrix with random signs"
        if hadamard_plan(anatomy.d_model)
        else "a uniform random rotation"
    )
    return f"The residual stream of {anatomy.d_model} channels was turned by {kind}."


def _centred(rows_D: Tensor, centred: bool) -> Tensor:
    return rows_D - rows_D.mean(-1, keepdim=True) if centred else rows_D


def _fold_and_turn(model: Any, anatomy: Anatomy, fed: Fed, turn_DD: Tensor) -> None:
    """Norm to weight 1, its weight and the rotation into its readers; a bias into theirs where all of them have one."""
    module = model.get_submodule(fed.norm)
    weight_D = norm_weight(model, anatomy, fed.norm)
    bias = getattr(module, "bias", None)
    bias_D = None if bias is None else bias.data.double()
    into_readers = all(reader.bias is not None for reader in fed.readers)
    for reader in fed.readers:
        weight_OD = reader.read(model)
        if bias_D is not None and into_readers:
            added = model.get_parameter(str(reader.bias))
            added.data = (added.data.double() + weight_OD @ bias_D).to(added.dtype)
        reader.write(model, (weight_OD * weight_D) @ turn_DD)
    left_D = bias_D
    if bias_D is not None:
        # 0 / 0 adds nothing; a weight of 0 with a bias was refused.
        per_unit_D = torch.where(bias_D == 0, bias_D, bias_D / weight_D)
        left_D = torch.zeros_like(bias_D) if into_readers else per_unit_D @ turn_DD
    set_norm(model, anatomy, fed.norm, torch.ones_like(weight_D), left_D)


def _turn_values(loaded: LoadedModel, *, seed: int) -> str:
    """Turn every head's values by one matrix [K, K] and undo it in the output matrix."""
    model, anatomy = loaded.model, loaded.anatomy
    turn_KK = rotation(anatomy.head_dim, seed=seed).to(model.device)
    for block in anatomy.blocks:
        values, rows_GK = value_rows(model, anatomy, block)
        weight_OI = values.read(model).clone()
        weight_OI[rows_GK] = turn_KK.T @ weight_OI[rows_GK]
        values.write(model, weight_OI)
        if values.bias is not None:
            bias = model.get_parameter(values.bias)
            turned = bias.data.double().clone()
            turned[rows_GK] = turned[rows_GK] @ turn_KK
            bias.data = turned.to(bias.dtype)
        out = linear(model, block.o)
        weight_DHK = torch.unflatten(out.read(model), -1, (anatomy.n_heads, anatomy.head_dim))
        out.write(model, (weight_DHK @ turn_KK).flatten(-2))
    kind = (
        "a Hadamard matrix with random signs"
        if hadamard_plan(anatomy.head_dim)
        else "a uniform random rotation"
    )
    return f"Every head's {anatomy.head_dim} value channels were turned by {kind}."


def _incoherence(loaded: LoadedModel) -> pd.DataFrame:
    """Per matrix: max|W| over its root mean square; 1 is perfectly even, a Gaussian of 10⁵ values about 4.4."""
    rows = []
    for target in targets(loaded):
        if target.layout == "none":
            continue
        weight = loaded.model.get_parameter(target.name).data.float()
        size = float(weight.norm()) / math.sqrt(weight.numel())
        rows.append(
            {
                "module": target.module,
                "layer": target.layer,
                "component": target.component,
                "incoherence": float(weight.abs().max()) / size if size else 1.0,
            }
        )
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _spread(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    earlier = before.set_index("module")["incoherence"]
    return after.assign(incoherence_before=after["module"].map(earlier).fillna(after["incoherence"]))
