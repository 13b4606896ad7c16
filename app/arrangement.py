"""Where the views of a result go on the page, and what a click on any of them means; plain functions, no drawing.

Top to bottom: the ranked tables that answer the question, the tokens, pictures, maps, and beside them one drawer for
the cell that was clicked, on whichever of them; the remaining charts come below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.views import is_detail, map_groups
from core.registry import Settings
from core.types import Result, View

Group = tuple[View, ...]
"""Heat maps (or one picture) that share frame and axes."""
Axes = tuple[str, str]
"""Columns of rows and columns of a map: (y, x)."""
Limits = Mapping[tuple[str, str], tuple[float, float]]
"""(frame, column) → the ends of its colour scale or axis, where two results are drawn on the same one."""


@dataclass(frozen=True)
class Look:
    """How a panel differs from one that stands alone: half as wide, scales shared, a leader whose choices it follows."""

    narrow: bool = False
    limits: Limits = field(default_factory=dict)
    leader: str = ""
    """Name of the panel beside it, whose colour is chosen for both."""
    metrics: bool = True

    def of(self, view: View, column: str | None) -> tuple[float, float] | None:
        """The shared ends of a column's scale, if there are any."""
        return self.limits.get((view.frame, column or ""))


@dataclass(frozen=True)
class Arrangement:
    """The views of one result, sorted by what is done with them."""

    lead: tuple[View, ...]
    """Ranked tables that come before the maps."""
    tokens: tuple[View, ...]
    pictures: tuple[Group, ...]
    choosing: tuple[Group, ...]
    """Maps whose two axes are settings: a click sets the form and runs again."""
    maps: tuple[Group, ...]
    """Maps whose cells open the drawer, and those that show what was chosen."""
    details: tuple[View, ...]
    """Tables of one cell, drawn in the drawer."""
    rest: tuple[View, ...]

    @property
    def cells(self) -> tuple[Group, ...]:
        """Everything whose cells open the drawer."""
        return self.pictures + (() if self.choosing else self.maps)

    def target(self, columns: set[str]) -> Group | None:
        """The map that a row with these columns is a cell of; maps that choose come first."""
        groups = self.choosing + self.cells
        return next((group for group in groups if set(axes_of(group)) <= columns), None)


def axes_of(group: Group) -> Axes:
    """The columns of rows and columns of a group of maps."""
    assert group[0].y
    return group[0].y, group[0].x


def chooses(group: Group, settings: Settings) -> bool:
    """Whether the axes of a group of maps are settings of the method, so that a click can set them."""
    return set(axes_of(group)) <= set(type(settings).model_fields)


def arrange(result: Result, settings: Settings | None) -> Arrangement:
    """Sort the views of a result; every view is drawn exactly once. Without settings no map chooses any."""
    groups = map_groups(result.views)
    pictures = tuple((view,) for view in result.views if view.kind == "image")
    choosing = tuple(group for group in groups if settings is not None and chooses(group, settings))
    maps = tuple(group for group in groups if group not in choosing)
    details = tuple(v for v in result.views if any(is_detail(v, group) for group in (*pictures, *groups)))
    tables = [v for v in result.views if v.kind == "table" and v not in details]
    first_map = next((i for i, v in enumerate(result.views) if v.kind in ("heatmap", "image")), 0)
    lead = tuple(v for v in tables if result.views.index(v) < first_map or v is result.views[0])
    mapped = {"heatmap", "image", "tokens"}
    rest = tuple(v for v in result.views if v.kind not in mapped and v not in lead and v not in details)
    tokens = tuple(v for v in result.views if v.kind == "tokens")
    return Arrangement(lead, tokens, pictures, choosing, maps, details, rest)
