"""Between a table of sensitivities, an allocation, and its text: what a page's slider, a recipe and a step share.

Torch-free. A table has one row per group and format (``core.budget.sensitivity.table``); an assignment is written
``0.qkv:int4g32, 0.o:int8, …``, so that what was seen on a slider is made again exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.budget.allocation import Allocation, Menu, allocate, frontier
from core.budget.formats import is_plain, is_symmetric, read_format
from core.errors import BadInput

Score = Literal["exact", "fisher"]
LOSS_OF: dict[Score, str] = {"exact": "loss", "fisher": "fisher"}
"""Score → its column of the table."""
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>kb|mb|gb|bpw|bits?)?", re.IGNORECASE)
_UNIT_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


def menu_of(cells: pd.DataFrame, *, fixed_bytes: int, score: Score) -> Menu:
    """The menu of a table: its groups and formats in order, a cell that is not in it not allowed.

    A Fisher score is an estimate of the loss; a measured one below 0 would be noise, and there is none.
    """
    column = LOSS_OF[score]
    groups, formats = list(dict.fromkeys(cells["group"])), list(dict.fromkeys(cells["format"]))
    loss = cells.pivot(index="group", columns="format", values=column).reindex(index=groups, columns=formats)
    nbytes = cells.pivot(index="group", columns="format", values="bytes").reindex(
        index=groups, columns=formats
    )
    return Menu(
        tuple(groups),
        tuple(formats),
        nbytes.fillna(0).to_numpy(np.int64),
        loss.to_numpy(np.float64),
        fixed_bytes,
    )


def readable(menu: Menu, kind_of: Mapping[str, str]) -> list[NDArray[np.bool_]]:
    """The kinds of file that plain transformers reads (``core.saving.description``), as masks [G, C].

    Read layer by layer: each linear layer its own symmetric format, tables plain. Read while loading: one format for all
    matrices and tables, which may have zero points. Experts share one format either way; what is plain fits anywhere.
    """
    kinds = np.array([kind_of[group] for group in menu.groups])[:, None]
    formats = [read_format(name) for name in menu.choices]
    plain_C = np.array([is_plain(format_) for format_ in formats])
    symmetric_C = np.array([is_symmetric(format_) for format_ in formats])
    one_each = [np.arange(len(formats)) == index for index in np.nonzero(~plain_C)[0]]
    dense = [(symmetric_C & (kinds == "linear")), *((one_C & (kinds != "experts")) for one_C in one_each)]
    experts = [one_C & (kinds == "experts") for one_C in one_each] if (kinds == "experts").any() else [False]
    return [plain_C | of_dense | of_experts for of_dense in dense for of_experts in experts or [False]]


def allocate_readable(
    cells: pd.DataFrame, budget: int, *, fixed_bytes: int, score: Score, pins: Mapping[str, str] | None = None
) -> Allocation:
    """The allocation of least loss in ``budget`` bytes among those a file can hold.

    Raises ``OverBudget`` saying the minimum, ``BadInput`` for a pin that cannot be.
    """
    files = _files(cells, fixed_bytes, score, pins or {})
    by_bound = sorted(
        ((frontier(held, pins=pins).bound(budget), held) for held in files), key=lambda one: one[0]
    )
    best: Allocation | None = None
    for bound, held in by_bound:
        # What the hull already rules out need not be searched.
        if bound == float("inf") or (best is not None and bound >= best.loss):
            break
        found = allocate(held, budget, pins=pins)
        if best is None or (found.loss, found.bytes) < (best.loss, best.bytes):
            best = found
    if best is not None:
        return best
    if files:  # each is too large: the smallest says by how much
        return allocate(min(files, key=lambda held: held.pinned(pins or {}).minimum), budget, pins=pins)
    raise BadInput(
        "these pins cannot stand in one file: transformers reads several formats side by side only in linear layers, "
        "without zero points, with embeddings as plain floats (float8, bfloat16, keep), and one format for all experts"
    )


def least_losses(
    cells: pd.DataFrame,
    sizes_N: Sequence[int],
    *,
    fixed_bytes: int,
    score: Score,
    pins: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """What no allocation that a file can hold goes below, for each size in bytes; infinite where none is so small."""
    bounds = [frontier(held, pins=pins) for held in _files(cells, fixed_bytes, score, pins or {})]
    return np.array([min((one.bound(size) for one in bounds), default=np.inf) for size in sizes_N])


def _files(cells: pd.DataFrame, fixed_bytes: int, score: Score, pins: Mapping[str, str]) -> list[Menu]:
    """The menu as each kind of readable file restricts it. Raises ``BadInput`` for a pin that cannot be."""
    menu = menu_of(cells, fixed_bytes=fixed_bytes, score=score)
    menu.pinned(pins)  # refused with every choice of the group named
    kind_of = dict(zip(cells["group"], cells["kind"], strict=True))
    return [held for mask_GC in readable(menu, kind_of) if (held := menu.only(mask_GC, pins)) is not None]


def written(choice_of: Mapping[str, str]) -> str:
    """An assignment as text."""
    return ", ".join(f"{group}:{choice}" for group, choice in choice_of.items())


def read_assignment(text: str, what: str = "assignment") -> dict[str, str]:
    """Group → format from ``3.qkv:int4g32, embedding:float8``; a bare number of bits N means ``intNg32``.

    Raises ``BadInput`` for an entry that cannot be read, and for a group named twice.
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        group, colon, choice = (part.strip() for part in entry.partition(":"))
        if not (group and colon and choice):
            raise BadInput(f"{what} {entry!r}: write layer.part:format, e.g. 3.down:int8 or embedding:float8")
        if group in found:
            raise BadInput(f"{what}: {group} is named twice, as {found[group]} and {choice}")
        choice = f"int{choice}g32" if choice.isdecimal() else choice.lower()
        read_format(choice)
        found[group] = choice
    return found


def read_budget(text: str, n_parameters: int) -> int:
    """Bytes of ``60MB``, ``1.2GB`` or ``4.5bpw`` (bits per weight, all parameters counted); a bare number is MB.

    Raises ``BadInput``.
    """
    found = _BUDGET.fullmatch(text.strip())
    if found is None or float(found["number"]) <= 0:
        raise BadInput(f"budget {text!r} cannot be read; write e.g. 60MB, 1.2GB or 4.5bpw (bits per weight)")
    number, unit = float(found["number"]), (found["unit"] or "mb").lower()
    if unit in _UNIT_BYTES:
        return int(number * _UNIT_BYTES[unit])
    return int(number * n_parameters / 8)


def read_tolerance(text: str, unit: str, bytes_per_token: float | None) -> float:
    """A loss per token in ``unit`` of ``0.1``, or in nats of ``0.05bpb``: that many bits per byte more. Raises ``BadInput``.

    Where text is as the model before predicts it, KL is what the surprisal rises by: nats per token are ln 2 · bits per
    byte · bytes per token.
    """
    number, of_bits = text.strip().lower().removesuffix("bpb").strip(), text.strip().lower().endswith("bpb")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadInput(
            f"tolerance {text!r} cannot be read; write e.g. 0.1 ({unit}) or 0.05bpb (bits per byte)"
        )
    if not of_bits:
        return value
    if bytes_per_token is None:
        raise BadInput(
            f"tolerance {text!r}: an encoder has no bits per byte; write a loss in {unit}, e.g. 0.01"
        )
    return value * float(np.log(2)) * bytes_per_token
