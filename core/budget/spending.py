"""Storing the parts of a model as an assignment says, and holding the predicted loss against the measured one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.budget.assignment import LOSS_OF, Score
from core.budget.formats import KEEP, read_format
from core.budget.groups import WeightGroup, in_format
from core.budget.reruns import Reruns
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.numerics.schemes import Scheme
from core.quantize.blocks import quantize_blocks
from core.quantize.grid import put
from core.quantize.stacks import GptqOptions
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor


def schemes_of(groups: Sequence[WeightGroup], chosen: pd.DataFrame) -> dict[str, Scheme]:
    """Parameter → scheme, of those that are not kept."""
    format_of = {row["group"]: read_format(row["format"]) for row in chosen.to_dict("records")}
    schemes = {target.name: format_of[group.name] for group in groups for target in group.targets}
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def store_in_stages(
    loaded: LoadedModel, groups: Sequence[WeightGroup], chosen: pd.DataFrame, score: Score, reruns: Reruns, *,
    stages: int, progress: Progress,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:  # fmt: skip
    """Store the parts one after the other, least loss first; the report's lines, and predicted against measured loss."""
    column = LOSS_OF[score]
    order = chosen.sort_values(column, kind="stable")
    by_name = {group.name: group for group in groups}
    stops = set(np.linspace(0, len(order), stages + 1).round().astype(int)[1:].tolist())
    lines: dict[str, dict[str, Any]] = {}
    points = []
    for done, row in enumerate(order.to_dict("records"), start=1):
        progress(done, len(order), f"storing {row['group']} as {row['format']}")
        for target in by_name[row["group"]].targets:
            before = loaded.model.get_parameter(target.name).data
            packed = in_format(target, before, read_format(row["format"]))
            lines[target.name] = put(loaded, target, packed, before)
        if done in stops:
            predicted = float(order[column].iloc[:done].sum())
            points.append(_point(done, predicted, reruns))
    todo = targets(loaded)
    for target in todo:
        if target.name not in lines:
            weight = loaded.model.get_parameter(target.name).data
            lines[target.name] = put(loaded, target, None, weight)
    return _explained([lines[target.name] for target in todo], groups, chosen), pd.DataFrame(points)


def store_by_gptq(
    loaded: LoadedModel, groups: Sequence[WeightGroup], chosen: pd.DataFrame, score: Score, reruns: Reruns,
    windows_BP: Tensor, *, scratch: Path | None, progress: Progress,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:  # fmt: skip
    """Store all parts by GPTQ, block by block; the same, with one point at the end."""
    options = GptqOptions(damping=0.01, act_order=True, fit_grid=False)
    with loaded.lock, torch.inference_mode():
        rows, _ = quantize_blocks(
            loaded, windows_BP, schemes_of(groups, chosen), options, progress=progress, scratch=scratch
        )
    rows = _explained(rows, groups, chosen)
    return rows, pd.DataFrame([_point(len(chosen), float(chosen[LOSS_OF[score]].sum()), reruns)])


def _explained(
    rows: list[dict[str, Any]], groups: Sequence[WeightGroup], chosen: pd.DataFrame
) -> list[dict[str, Any]]:
    """The report's lines, with the reason of what the assignment keeps."""
    kept = set(chosen.loc[chosen["format"] == KEEP, "group"])
    modules = {target.module for group in groups if group.name in kept for target in group.targets}
    return [{**row, "reason": "kept by the assignment"} if row["module"] in modules else row for row in rows]


def _point(parts: int, predicted: float, reruns: Reruns) -> dict[str, float | None]:
    """Predicted against measured loss of the model as it is now."""
    return {"parts": parts, "predicted": predicted, **reruns.summed_up(reruns.loss_W(0))}
