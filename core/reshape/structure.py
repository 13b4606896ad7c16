"""What a change of structure did to every tensor: which values are still there, which are gone, which are new.

Such a step removes, replaces or adds whole tensors or single experts, so there is no error to measure; what counts is
how many of the values before are still there as they were. A tensor of experts, or a router's rows, is compared expert
by expert, wherever an expert went; any other tensor as a whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.registry import Settings
from core.saving.fresh_load import digest
from core.saving.report import headline, place, table
from core.types import Metric, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

VIEWS = (
    View(
        "table", x="module", text="format", title="Every tensor",
        tooltip=("parameters_before", "parameters", "parameters_touched", "bytes_before", "bytes_after"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class _Held:
    """One tensor before the change."""

    target: Target
    parameters: int
    nbytes: int
    pieces: Counter[str]
    """Digest of each piece → how often."""
    piece_parameters: int


@dataclass(frozen=True)
class Inventory:
    """Everything a model holds, before a step changes its structure."""

    held: Mapping[str, _Held]
    started: float

    @classmethod
    def of(cls, loaded: LoadedModel) -> Inventory:
        """Take stock; call it before anything is changed."""
        started = time.monotonic()
        parameters = dict(loaded.model.named_parameters())
        return cls({t.module: _held(t, parameters[t.name].data) for t in targets(loaded)}, started)

    def moved(self, new_name: Callable[[str], str]) -> Inventory:
        """The same where tensors will have other names: ``new_name`` of each is no other's, also of those that go."""
        found = {
            new_name(module): replace(held, target=replace(held.target, name=new_name(held.target.name)))
            for module, held in self.held.items()
        }
        assert len(found) == len(self.held), "two tensors would share a name"
        return Inventory(found, self.started)


def structural_result(
    before: Inventory,
    loaded: LoadedModel,
    settings: Settings,
    *,
    method: str,
    frames: Mapping[str, pd.DataFrame] | None = None,
    views: Sequence[View] = (),
    metrics: Sequence[Metric] = (),
    notes: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
    conditions: Mapping[str, Any] | None = None,
    exactness_gap: float | None = None,
    exactness_check: str = "",
) -> Result:
    """The result of a step that changed the structure: what happened to every tensor, and what the method adds."""
    frame = changes(before, loaded)
    return Result(
        {"main": frame, **(frames or {})},
        (*views, *VIEWS),
        (*metrics, *headline(frame)),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint, inputs=inputs or {}, dtype=loaded.dtype,
            device=loaded.device, conditions=conditions or {}, seconds=time.monotonic() - before.started,
            exactness_gap=exactness_gap, exactness_check=exactness_check,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


def changes(before: Inventory, loaded: LoadedModel) -> pd.DataFrame:
    """Every tensor of the model as it is now, then those that are gone, as a compress step's table."""
    parameters = dict(loaded.model.named_parameters())
    now = {target.module: target for target in targets(loaded)}
    rows = [_row(before.held.get(m), target, parameters[target.name].data) for m, target in now.items()]
    rows += [_row(held, held.target, None) for m, held in before.held.items() if m not in now]
    return table(rows)


def _held(target: Target, tensor: Tensor) -> _Held:
    by_expert = target.component in ("experts", "router") and tensor.ndim > 1
    pieces = list(tensor) if by_expert else [tensor]
    return _Held(target, tensor.numel(), tensor.nbytes, Counter(map(digest, pieces)), pieces[0].numel())


def _row(held: _Held | None, target: Target, tensor: Tensor | None) -> dict[str, Any]:
    found = None if tensor is None else _held(target, tensor)
    kept = (held.pieces & found.pieces).total() * held.piece_parameters if held and found else 0
    gone = held.parameters - kept if held else 0
    touched = held is None or gone > 0 or (found is not None and found.parameters != held.parameters)
    dtype = "removed" if tensor is None else str(tensor.dtype).removeprefix("torch.")
    return {
        **place(target),
        "format": dtype,
        "bits": None if tensor is None else 8 * tensor.element_size(),
        "group_size": "none",
        "parameters_before": held.parameters if held else 0,
        "parameters": found.parameters if found else 0,
        "parameters_touched": gone,
        "bytes_before": held.nbytes if held else 0,
        "bytes_after": found.nbytes if found else 0,
        "relative_error": None if touched else 0.0,
        "sqnr_db": None,
        "touched": touched,
        "reason": "" if touched else "not part of this change",
    }
