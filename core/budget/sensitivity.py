"""What each group of weights costs in each format: measured one group at a time, or scored by one backward pass.

* measured: the group is put in the format, all else is as it was; the loss is KL(before ‖ after) of the next token in
  nats per token (an encoder: 1 - cosine of the sentence vector), mean over windows of different documents.
* Fisher: KL is ½ ΔWᵀ F ΔW to second order. With labels drawn from the model's own distribution, E[g²] is the diagonal of
  F, so that ½ Σ g² ΔW² is an estimate in the same nats, for all groups and formats from one backward pass per window
  (Kunstner et al., arXiv:1905.12558, on why the labels must be the model's). Rounding errors are near independent, which
  is what the diagonal needs.
* first order: Σ g · ΔW with g of the surprisal of the true next token: which way that number moves, in nats.

An encoder has no labels; its sentence vector e is derived along random directions instead, which gives ‖Δe‖² the same way.

Legend: W windows, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.budget.formats import Format
from core.budget.groups import FileSizes, WeightGroup, fits, in_format
from core.budget.reruns import Reruns, output_of
from core.lazy import torch
from core.models.gradients import differentiable, leave_inference_mode, trainable
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

SEED = 0
_NOT_MEASURED = {"loss": np.nan, "loss_low": np.nan, "loss_high": np.nan}


@dataclass(frozen=True)
class Gradients:
    """Of every weight in a group, by parameter name: summed over windows."""

    squared: Mapping[str, Tensor]
    """Σ_windows g², labels drawn from the model: its mean per token is the diagonal of the Fisher information."""
    first: Mapping[str, Tensor]
    """Σ_windows g of the surprisal of the true next tokens, nats; empty for an encoder."""
    n: int
    """Predicted tokens; an encoder's windows."""


def table(
    loaded: LoadedModel,
    groups: Sequence[WeightGroup],
    formats_of: Callable[[WeightGroup], Mapping[str, Format]],
    *,
    reruns: Reruns | None,
    gradients: Gradients | None,
    progress: Progress,
) -> pd.DataFrame:
    """One row per group and format it can take: bytes in the file, loss, its interval, and the scores.

    Columns: group, layer, part, kind, format, parameters, bytes, bits (stored, per value), loss, loss_low, loss_high,
    fisher, first_order. ``loss`` is NaN without ``reruns``, the scores without ``gradients``. The weights are put back.
    """
    sizes = FileSizes(loaded, groups)
    parameters = {
        target.name: loaded.model.get_parameter(target.name) for g in groups for target in g.targets
    }
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    rows = []
    for done, group in enumerate(groups):
        n_values = sum(parameters[target.name].numel() for target in group.targets)
        for name, format_ in formats_of(group).items():
            if not fits(group, format_, shapes):
                continue
            progress(done, len(groups), f"{group.name} as {name}")
            with changed(loaded, group, format_) as change:
                nbytes = sum(sizes.of(target, change.packed[target.name]) for target in group.targets)
                rows.append(
                    {
                        "group": group.name, "layer": group.layer, "part": group.part, "kind": group.kind,
                        "format": name, "parameters": n_values, "bytes": nbytes, "bits": 8 * nbytes / n_values,
                        **_measured(loaded, group, format_, reruns), **_scored(change, gradients),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows).astype({"layer": "Int64"})


@dataclass(frozen=True)
class Change:
    """A group as it is now, and what it was."""

    packed: Mapping[str, Any]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


@contextmanager
def changed(loaded: LoadedModel, group: WeightGroup, format_: Format) -> Iterator[Change]:
    """The group's weights in a format while the block runs; then as they were."""
    parameters = {target.name: loaded.model.get_parameter(target.name) for target in group.targets}
    before = {name: p.data for name, p in parameters.items()}
    packed = {target.name: in_format(target, before[target.name], format_) for target in group.targets}
    try:
        for name, form in packed.items():
            if form is not None:
                parameters[name].data = form.dequantize().to(before[name].dtype)
        yield Change(packed, before, {name: p.data for name, p in parameters.items()})
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def together(
    loaded: LoadedModel, groups: Sequence[WeightGroup], formats: Mapping[str, Format], reruns: Reruns, measured: pd.DataFrame
) -> pd.DataFrame:  # fmt: skip
    """Whether losses add up: every group in one format at once, against the sum of one at a time (or of the scores).

    Columns: format, groups, summed, loss, loss_low, loss_high. Groups that cannot take the format are left as they are in both.
    """
    column = "fisher" if measured["loss"].isna().all() else "loss"
    rows = []
    for name, format_ in formats.items():
        of_format = measured[measured["format"] == name]
        able = [group for group in groups if group.name in set(of_format["group"])]
        if format_ is None or not able:
            continue
        with _all_changed(loaded, able, format_):
            found = reruns.summed_up(reruns.loss_W(0))
        rows.append({"format": name, "groups": len(able), "summed": float(of_format[column].sum()), **found})
    columns = ["format", "groups", "summed", "loss", "loss_low", "loss_high"]
    return pd.DataFrame(rows, columns=columns)


@contextmanager
def _all_changed(loaded: LoadedModel, groups: Sequence[WeightGroup], format_: Format) -> Iterator[None]:
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(changed(loaded, group, format_))
        yield


def drops(loaded: LoadedModel, reruns: Reruns, progress: Progress) -> pd.DataFrame:
    """What leaving out each block alone costs: layer, parameters, loss, loss_low, loss_high."""
    rows = []
    for block in loaded.anatomy.blocks:
        progress(block.index, loaded.anatomy.n_layers, f"without layer {block.index}")
        found = reruns.summed_up(reruns.loss_without_W(block.index))
        n_values = sum(p.numel() for p in loaded.model.get_submodule(block.path).parameters())
        rows.append({"layer": block.index, "parameters": n_values, **found})
    return pd.DataFrame(rows)


def gradients_of(
    loaded: LoadedModel, groups: Sequence[WeightGroup], ids_WP: Tensor, progress: Progress
) -> Gradients:
    """One forward and two backward passes per window (an encoder: one). Holds the groups' weights twice more in memory."""
    names = [target.name for group in groups for target in group.targets]
    generator = torch.Generator(device=ids_WP.device).manual_seed(SEED)
    with torch.inference_mode(False):
        leave_inference_mode(loaded)
        parameters = {name: loaded.model.get_parameter(name) for name in names}
        squared = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        first = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        ids_WP = ids_WP.clone()  # a tensor of inference mode cannot be saved for backward
        with trainable(parameters), differentiable():
            for done, ids_P in enumerate(ids_WP):
                progress(done, len(ids_WP), f"backward pass {done + 1} of {len(ids_WP)}")
                drawn, true = _scalars(loaded, ids_P, generator)
                for name, gradient in _gradients(drawn, parameters, again=true is not None):
                    squared[name].addcmul_(gradient, gradient)
                if true is not None:
                    for name, gradient in _gradients(true, parameters, again=False):
                        first[name].add_(gradient)
    decoder = loaded.family == "decoder"
    return Gradients(squared, first if decoder else {}, len(ids_WP) * (ids_WP.shape[1] - 1 if decoder else 1))


def _scalars(loaded: LoadedModel, ids_P: Tensor, generator: Any) -> tuple[Tensor, Tensor | None]:
    """What is derived: surprisal of drawn and of true tokens, summed; an encoder's vector along a random direction.

    With v normal, E[(∇(v · e) · ΔW)²] = ‖Δe‖², and half of that is 1 - cosine of unit vectors.
    """
    output = output_of(loaded, ids_P[None])[0].float()
    if loaded.family != "decoder":
        return output @ torch.randn(output.shape, generator=generator, device=output.device), None
    logits_PV = output[:-1]
    drawn_P = torch.multinomial(logits_PV.detach().softmax(-1), 1, generator=generator)[:, 0]
    surprisal = torch.nn.functional.cross_entropy
    return surprisal(logits_PV, drawn_P, reduction="sum"), surprisal(logits_PV, ids_P[1:], reduction="sum")


def _gradients(scalar: Tensor, parameters: Mapping[str, Any], *, again: bool) -> Iterator[tuple[str, Tensor]]:
    """The gradient by every parameter that had a part in it."""
    found = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=again, allow_unused=True)
    return ((name, g.float()) for name, g in zip(parameters, found, strict=True) if g is not None)


def fisher_score(squared: Tensor, delta: Tensor, n: int) -> float:
    """½ Σ g² ΔW² per token (an encoder: per window): the loss to second order."""
    return float((squared * delta.float().square()).sum(dtype=torch.float64)) / (2 * n)


def rank_correlation(frame: pd.DataFrame, left: str, right: str) -> float | None:
    """Spearman's rank correlation of two columns over the cells where something was changed; None below 3 cells."""
    cells = frame[frame["loss"] > 0].dropna(subset=[left, right])
    if len(cells) < 3:
        return None
    ranks = cells[[left, right]].rank()
    return float(np.corrcoef(ranks[left], ranks[right])[0, 1])


def _measured(
    loaded: LoadedModel, group: WeightGroup, format_: Format, reruns: Reruns | None
) -> Mapping[str, float | None]:
    """Loss and interval of the model as it is now; a group that is kept costs nothing, exactly."""
    if reruns is None:
        return _NOT_MEASURED
    if format_ is None:
        return dict.fromkeys(_NOT_MEASURED, 0.0)
    outside = 0 if group.part == "embedding" else loaded.anatomy.n_layers
    return reruns.summed_up(reruns.loss_W(outside if group.layer is None else group.layer))


def _scored(change: Change, gradients: Gradients | None) -> dict[str, float]:
    if gradients is None:
        return {"fisher": np.nan, "first_order": np.nan}
    fisher = first = 0.0
    for name, before in change.before.items():
        delta = (change.after[name] - before).float()
        fisher += fisher_score(gradients.squared[name], delta, gradients.n)
        if gradients.first:
            first += float((gradients.first[name] * delta).sum(dtype=torch.float64)) / gradients.n
    return {"fisher": fisher, "first_order": first if gradients.first else np.nan}
