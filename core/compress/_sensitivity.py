"""What each group of weights costs in each format: measured one group at a time, or scored by one backward pass.

* measured: the group is put in the format, all else is as it was; the loss is KL(before ‖ after) of the next token in
  nats per token (an encoder: 1 - cosine of the sentence vector), mean over windows of different documents.
* Fisher: KL is ½ ΔWᵀ F ΔW to second order. With labels drawn from the model's own distribution, E[g²] is the diagonal of
  F, so that ½ Σ g² ΔW² is an estimate in the same nats, for all groups and formats from one backward pass per window
  (Kunstner et al., arXiv:1905.12558, on why the labels must be the model's). Rounding errors are near independent, which
  is what the diagonal needs.
* first order: Σ g · ΔW with g of the surprisal of the true next token: which way that number moves, in nats.

Only decoders have the scores: an encoder has no distribution to draw labels from.

Legend: W windows, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.compress._groups import FileSizes, Format, WeightGroup, fits, in_format
from core.compress._rerun import Floats, Reruns
from core.errors import CannotMeasure
from core.evaluate._intervals import Bootstrap
from core.lazy import torch
from core.probes._gradients import differentiable
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

DRAWS = 1000
SEED = 0


@dataclass(frozen=True)
class Gradients:
    """Of every weight in a group, by parameter name: summed over windows."""

    squared: Mapping[str, Tensor]
    """Σ_windows g², labels drawn from the model: its mean per token is the diagonal of the Fisher information."""
    first: Mapping[str, Tensor]
    """Σ_windows g of the surprisal of the true next tokens, nats."""
    n_tokens: int
    """Predicted tokens."""


def table(
    loaded: LoadedModel,
    groups: Sequence[WeightGroup],
    formats: Mapping[str, Format],
    *,
    reruns: Reruns | None,
    gradients: Gradients | None,
    progress: Progress,
) -> pd.DataFrame:
    """One row per group and format it can take: bytes in the file, loss, its interval, and the scores.

    Columns: group, layer, part, kind, format, parameters, bytes, bits (stored, per value), loss, loss_low, loss_high,
    fisher, first_order. ``loss`` is NaN without ``reruns``, the scores without ``gradients``. The weights are put back.
    """
    sizes, bootstrap = FileSizes(loaded, groups), _bootstrap(reruns)
    parameters = {target.name: loaded.model.get_parameter(target.name) for g in groups for target in g.targets}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    rows = []
    for done, group in enumerate(groups):
        n_values = sum(parameters[target.name].numel() for target in group.targets)
        for name, format_ in formats.items():
            if not fits(group, format_, shapes):
                continue
            progress(done, len(groups), f"{group.name} as {name}")
            with changed(loaded, group, format_) as change:
                nbytes = sum(sizes.of(target, change.packed[target.name]) for target in group.targets)
                rows.append(
                    {
                        "group": group.name, "layer": group.layer, "part": group.part, "kind": group.kind,
                        "format": name, "parameters": n_values, "bytes": nbytes, "bits": 8 * nbytes / n_values,
                        **_measured(loaded, group, format_, reruns, bootstrap), **_scored(change, gradients),
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
    """Whether losses add up: every group in one format at once, against the sum of one at a time.

    Columns: format, groups, summed, together, low, high. Groups that cannot take the format are left as they are in both.
    """
    bootstrap, rows = _bootstrap(reruns), []
    for name, format_ in formats.items():
        of_format = measured[measured["format"] == name]
        able = [group for group in groups if group.name in set(of_format["group"])]
        if format_ is None or not able:
            continue
        with _all_changed(loaded, able, format_):
            loss_W = reruns.loss_W(0)
        interval = _interval(bootstrap, loss_W)
        rows.append(
            {
                "format": name, "groups": len(able), "summed": float(of_format["loss"].sum()),
                "together": float(loss_W.mean()), "low": interval[0], "high": interval[1],
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["format", "groups", "summed", "together", "low", "high"])


@contextmanager
def _all_changed(loaded: LoadedModel, groups: Sequence[WeightGroup], format_: Format) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(changed(loaded, group, format_))
        yield


def drops(loaded: LoadedModel, reruns: Reruns, progress: Progress) -> pd.DataFrame:
    """What leaving out each block alone costs: layer, loss, loss_low, loss_high, parameters."""
    bootstrap, rows = _bootstrap(reruns), []
    for block in loaded.anatomy.blocks:
        progress(block.index, loaded.anatomy.n_layers, f"without layer {block.index}")
        loss_W = reruns.loss_without_W(block.index)
        low, high = _interval(bootstrap, loss_W)
        n_values = sum(p.numel() for p in loaded.model.get_submodule(block.path).parameters())
        rows.append(
            {"layer": block.index, "loss": float(loss_W.mean()), "loss_low": low, "loss_high": high,
             "parameters": n_values}
        )  # fmt: skip
    return pd.DataFrame(rows)


def gradients_of(
    loaded: LoadedModel, groups: Sequence[WeightGroup], ids_WP: Tensor, progress: Progress
) -> Gradients:
    """One forward and two backward passes per window. Holds two copies of the groups' weights in memory.

    Raises ``CannotMeasure`` for a model without next-token distribution.
    """
    if loaded.family != "decoder":
        raise CannotMeasure(f"{loaded.ref} is no decoder: it has no next-token distribution to take a Fisher score of")
    names = [target.name for group in groups for target in group.targets]
    generator = torch.Generator(device=ids_WP.device).manual_seed(SEED)
    with torch.inference_mode(False):
        _leave_inference_mode(loaded)
        parameters = {name: loaded.model.get_parameter(name) for name in names}
        squared = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        first = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        ids_WP = ids_WP.clone()  # a tensor of inference mode cannot be saved for backward
        with _wanting_gradients(parameters.values()), differentiable():
            for done, ids_P in enumerate(ids_WP):
                progress(done, len(ids_WP), f"backward pass {done + 1} of {len(ids_WP)}")
                logits_PV = loaded.model(input_ids=ids_P[None], use_cache=False).logits[0, :-1].float()
                drawn_P = torch.multinomial(logits_PV.detach().softmax(-1), 1, generator=generator)[:, 0]
                cross = torch.nn.functional.cross_entropy
                for label_P, keep in ((drawn_P, True), (ids_P[1:], False)):
                    loss = cross(logits_PV, label_P, reduction="sum")
                    found = torch.autograd.grad(
                        loss, list(parameters.values()), retain_graph=keep, allow_unused=True
                    )
                    for name, gradient in zip(parameters, found, strict=True):
                        if gradient is None:
                            continue  # an expert no token was routed to, in a family that keeps experts apart
                        if keep:
                            squared[name].addcmul_(gradient.float(), gradient.float())
                        else:
                            first[name].add_(gradient.float())
    return Gradients(squared, first, ids_WP.shape[0] * (ids_WP.shape[1] - 1))


def fisher_score(squared: Tensor, delta: Tensor, n_tokens: int) -> float:
    """½ Σ g² ΔW² per token: nats to second order."""
    return float((squared * delta.float().square()).sum(dtype=torch.float64)) / (2 * n_tokens)


def rank_correlation(frame: pd.DataFrame, left: str, right: str) -> float:
    """Spearman's rank correlation of two columns over the cells where something was changed; NaN for fewer than 3."""
    cells = frame[frame["loss"] > 0].dropna(subset=[left, right])
    if len(cells) < 3:
        return float("nan")
    ranks = cells[[left, right]].rank()
    return float(np.corrcoef(ranks[left], ranks[right])[0, 1])


def _measured(
    loaded: LoadedModel, group: WeightGroup, format_: Format, reruns: Reruns | None, bootstrap: Bootstrap | None
) -> dict[str, float | None]:  # fmt: skip
    """Loss and interval of the model as it is now; a group that is kept costs nothing, exactly."""
    if reruns is None:
        return {"loss": np.nan, "loss_low": np.nan, "loss_high": np.nan}
    if format_ is None:
        return {"loss": 0.0, "loss_low": 0.0, "loss_high": 0.0}
    begin = group.layer if group.layer is not None else (0 if group.part == "embedding" else loaded.anatomy.n_layers)
    loss_W = reruns.loss_W(begin)
    low, high = _interval(bootstrap, loss_W)
    return {"loss": float(loss_W.mean()), "loss_low": low, "loss_high": high}


def _scored(change: Change, gradients: Gradients | None) -> dict[str, float]:
    if gradients is None:
        return {"fisher": np.nan, "first_order": np.nan}
    fisher = first = 0.0
    for name, before in change.before.items():
        delta = (change.after[name] - before).float()
        fisher += fisher_score(gradients.squared[name], delta, gradients.n_tokens)
        first += float((gradients.first[name] * delta).sum(dtype=torch.float64)) / gradients.n_tokens
    return {"fisher": fisher, "first_order": first}


def _bootstrap(reruns: Reruns | None) -> Bootstrap | None:
    return None if reruns is None else Bootstrap(reruns.n_windows, draws=DRAWS, seed=SEED)


def _interval(bootstrap: Bootstrap | None, loss_W: Floats) -> tuple[float | None, float | None]:
    """95 % over documents; none below eight."""
    assert bootstrap is not None
    found = bootstrap.ratio(loss_W, np.ones_like(loss_W))
    return found.low, found.high


def _leave_inference_mode(loaded: LoadedModel) -> None:
    """Copy weights that an earlier step made in inference mode: autograd refuses to pass through them."""
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        if tensor.is_inference():
            tensor.data = tensor.data.clone()


@contextmanager
def _wanting_gradients(parameters: Any) -> Iterator[None]:
    kept = list(parameters)
    for parameter in kept:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(False)
