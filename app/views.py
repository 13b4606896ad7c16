"""Frames on their way to the screen: plain functions from frame to frame or record, tested without a browser."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_float_dtype

from app import format
from app.charts import MARK_LIMIT, titled
from app.text import visible
from core.models.anatomy import Anatomy
from core.models.sizes import kv_cache_bytes, kv_cache_bytes_per_token
from core.types import Job, Provenance, View


@dataclass(frozen=True)
class Grid:
    """A heat map as a matrix: R row keys, C column keys, their values, and what each cell says."""

    row_keys: tuple[object, ...]
    col_keys: tuple[object, ...]
    rows: tuple[str, ...]
    cols: tuple[str, ...]
    values_RC: NDArray[np.float64]
    words: tuple[tuple[str, ...], ...]
    hover: tuple[tuple[str, ...], ...]

    def keys(self, row: int, col: int) -> tuple[object, object]:
        """The frame's own values of a cell."""
        return self.row_keys[row], self.col_keys[col]

    def index(self, row_key: str, col_key: str) -> tuple[int, int] | None:
        """A cell by the text of its keys, as an address carries them; None if there is no such cell."""
        rows, cols = list(map(str, self.row_keys)), list(map(str, self.col_keys))
        return (rows.index(row_key), cols.index(col_key)) if row_key in rows and col_key in cols else None


def to_grid(frame: pd.DataFrame, view: View) -> Grid:
    """Pivot a heat-map frame; a cell the frame does not have is NaN and empty. Each cell may appear once."""
    assert view.y
    assert view.color
    wide = frame.pivot(index=view.y, columns=view.x, values=view.color)
    text = frame.assign(_hover=hover_lines(frame, view))
    hover = text.pivot(index=view.y, columns=view.x, values="_hover").fillna("")
    if view.text:
        shown = frame.assign(_word=frame[view.text].astype(str).map(visible))
        words = shown.pivot(index=view.y, columns=view.x, values="_word").fillna("")
    else:
        words = hover.map(lambda _: "")
    return Grid(
        row_keys=tuple(wide.index.tolist()),
        col_keys=tuple(wide.columns.tolist()),
        rows=axis_names(frame, view, view.y, wide.index.tolist()),
        cols=axis_names(frame, view, view.x, wide.columns.tolist()),
        values_RC=wide.to_numpy(dtype=np.float64),
        words=tuple(map(tuple, words.to_numpy().tolist())),
        hover=tuple(map(tuple, hover.to_numpy().tolist())),
    )


def axis_names(frame: pd.DataFrame, view: View, axis: str, keys: Sequence[object]) -> tuple[str, ...]:
    """Each key of an axis, followed by the token it stands for where the frame has one token per key.

    Such a column is called ``{axis}_token``, or ``token`` for the x axis.
    """
    candidates = [f"{axis}_token", *(["token"] if axis == view.x else [])]
    column = next((name for name in candidates if name in frame and name != view.text), None)
    if column is None:
        return tuple(map(str, keys))
    pairs = frame[[axis, column]].drop_duplicates()
    if pairs[axis].duplicated().any():
        return tuple(map(str, keys))
    token: dict[object, object] = dict(pairs.itertuples(index=False))
    return tuple(f"{key} {visible(str(token[key]))}" for key in keys)


def hover_lines(frame: pd.DataFrame, view: View) -> list[str]:
    """One tooltip per row: every column of the view as ``Name: value``."""
    columns = [
        (titled(column, view), frame[column].tolist(), is_float_dtype(frame[column]))
        for column in view.columns
    ]
    return [
        "\n".join(f"{name}: {_cell(values[i], floating)}" for name, values, floating in columns)
        for i in range(len(frame))
    ]


def _cell(value: object, floating: bool) -> str:
    if floating:
        return format.number(float(value))  # type: ignore[arg-type]
    return visible(str(value))


Box = tuple[float, float, float, float]
"""Left, top, width and height, as shares of a picture."""


def boxes(frame: pd.DataFrame, view: View, picture: bytes) -> list[Box]:
    """Where the patches of an image view lie on its picture; x and y are a patch's upper left corner in pixels.

    Without columns ``width`` and ``height`` a patch reaches to the next one.
    """
    assert view.y
    across, down = png_size(picture)
    widths = frame["width"] if "width" in frame else _step(frame[view.x], across)
    heights = frame["height"] if "height" in frame else _step(frame[view.y], down)
    sides = pd.DataFrame({"x": frame[view.x], "y": frame[view.y], "w": widths, "h": heights}).to_numpy(float)
    shares = sides / [across, down, across, down]
    return [(x, y, w, h) for x, y, w, h in shares.tolist()]


def _step(corners: pd.Series, whole: int) -> float:
    """The smallest distance between two patches; the whole picture where there is but one."""
    distances = np.diff(np.unique(corners.to_numpy(dtype=float)))
    return float(distances.min()) if len(distances) else float(whole)


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n", "images of results are PNG"
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def cell_rows(frame: pd.DataFrame, view: View, row_key: object, col_key: object) -> pd.DataFrame:
    """The rows of a frame that belong to one cell of a map with the same axes."""
    assert view.y
    return frame[(frame[view.y] == row_key) & (frame[view.x] == col_key)]


def trajectory(frame: pd.DataFrame, view: View, col_key: object) -> pd.DataFrame:
    """One column of a map from top to bottom: how its value changes along the rows."""
    assert view.y
    return frame[frame[view.x] == col_key].sort_values(view.y)


def thinned(frame: pd.DataFrame, limit: int = MARK_LIMIT) -> pd.DataFrame:
    """At most ``limit`` rows, evenly spaced and both ends kept; the frame itself when it fits."""
    if len(frame) <= limit:
        return frame
    return frame.iloc[np.linspace(0, len(frame) - 1, limit).round().astype(int)]


def map_groups(views: Sequence[View]) -> list[tuple[View, ...]]:
    """Heat maps that share frame and axes: each group is one picture whose colour can be chosen."""
    groups: dict[tuple[str, str, str | None], list[View]] = {}
    for view in views:
        if view.kind == "heatmap":
            groups.setdefault((view.frame, view.x, view.y), []).append(view)
    return [tuple(group) for group in groups.values()]


def is_detail(view: View, group: Sequence[View]) -> bool:
    """Whether a view shows one cell of a group of maps: a table with the same axes in another frame."""
    axes = group[0]
    return view.kind == "table" and view.frame != axes.frame and (view.x, view.y) == (axes.x, axes.y)


def reading_order(view: View) -> list[str]:
    """A table's columns: where it is, what it says, then the numbers."""
    return list(dict.fromkeys([view.x, *([view.text] if view.text else []), *view.columns]))


def measures(frame: pd.DataFrame, view: View) -> list[str]:
    """The columns a scatter can be drawn over: its own two, then every other measured number of the frame."""
    others = [
        column for column in frame.columns if is_float_dtype(frame[column]) and frame[column].notna().any()
    ]
    return list(dict.fromkeys([view.x, *([view.y] if view.y else []), *others]))


def display_names(columns: Sequence[str], view: View) -> dict[str, str]:
    """Column headers: words with units instead of identifiers."""
    return {column: titled(column, view) for column in columns}


def provenance_line(provenance: Provenance) -> str:
    """How a result came to be, in one line of plain text."""
    parts = [provenance.dtype, provenance.device]
    if provenance.attention_kernel:
        parts.append(f"{provenance.attention_kernel} attention")
    if provenance.conditions.get("fp32_path"):
        parts.append(f"fp32 path {provenance.conditions['fp32_path']}")
    if provenance.conditions.get("threads"):
        parts.append(f"{provenance.conditions['threads']} threads")
    if provenance.exactness_gap is not None:
        gap = "0" if provenance.exactness_gap == 0 else f"{provenance.exactness_gap:.1e}"
        parts.append(f"exactness gap {gap}")
    parts.append(format.seconds(provenance.seconds))
    return " · ".join(part for part in parts if part)


def recent_variants(newest: pd.DataFrame, said: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Models as the start page lists them, from ``core.catalog.queries.newest``, with what must be said of each."""
    return pd.DataFrame(
        {
            "variant": newest["id"],
            "name": newest["name"],
            "size": newest["bytes"].map(format.size),
            "bits_per_weight": newest["bits_per_weight"],
            "proven": newest["proven"],
            "made": newest["created_at"].map(format.ago),
            "to_know": [" ".join(said.get(id_, ())) for id_ in newest["id"]],
        }
    )


def recent_jobs(jobs: Sequence[Job]) -> pd.DataFrame:
    """Jobs as the start page lists them; progress is 0–1."""
    rows = [(j.kind, j.state, j.done / j.total if j.total else 0.0, format.ago(j.created_at)) for j in jobs]
    return pd.DataFrame(rows, columns=["kind", "state", "progress", "when"])


def component_totals(components: pd.DataFrame) -> pd.DataFrame:
    """Parameters, megabytes and share of each component, the largest first."""
    totals = components.groupby("component", as_index=False)[["parameters", "bytes", "share"]].sum()
    totals["megabytes"] = totals.pop("bytes") / 1e6
    totals["component"] = totals["component"].map(format.label)
    return totals.sort_values("megabytes", ascending=False, ignore_index=True)


def heads_line(anatomy: Anatomy) -> str:
    """Heads in words: how keys are shared and how wide a head is."""
    if anatomy.n_kv_heads == anatomy.n_heads:
        return f"each its own keys, head dim {anatomy.head_dim}"
    return f"on {anatomy.n_kv_heads} key/value heads, head dim {anatomy.head_dim}"


def moe_line(anatomy: Anatomy) -> str:
    """Experts in words."""
    if not anatomy.n_experts:
        return "dense, no experts"
    return f"{anatomy.n_experts} experts, {anatomy.experts_per_token} per token"


def windows_line(anatomy: Anatomy) -> str:
    """Sliding windows in words."""
    windows = [window for window in anatomy.windows if window is not None]
    if not windows:
        return "full attention"
    sizes = " and ".join(f"{size:,}" for size in sorted(set(windows)))
    return f"sliding window of {sizes} tokens in {len(windows)} of {anatomy.n_layers} layers"


@dataclass(frozen=True)
class CacheAt:
    """The KV cache at one context, and along all of them (columns context, megabytes)."""

    per_token: int
    total: int
    curve: pd.DataFrame


def kv_at(anatomy: Anatomy, *, dtype_bytes: int, context: int) -> CacheAt:
    """What a cache costs, batch 1."""
    contexts = np.unique(np.linspace(1, anatomy.context_length, 65).round().astype(int))
    sizes = [kv_cache_bytes(anatomy, dtype_bytes=dtype_bytes, context=int(c)) / 1e6 for c in contexts]
    return CacheAt(
        kv_cache_bytes_per_token(anatomy, dtype_bytes=dtype_bytes, context=context),
        kv_cache_bytes(anatomy, dtype_bytes=dtype_bytes, context=context),
        pd.DataFrame({"context": contexts, "megabytes": sizes}),
    )
