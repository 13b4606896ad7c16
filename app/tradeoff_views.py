"""Frames for the Trade-offs page: which marks are drawn and how, the table, the facts of one variant.

Plain functions, frame in and frame out; nothing here draws or reads the catalog.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app import format as fmt
from core.constraints import Verdict
from core.registry import methods
from core.tradeoff import Objective, available, objective, pareto_front, probability_on_front, usable
from core.types import Measurement, Run, Variant

MARKS = 1_500
"""Dominated points drawn at most; the rest is counted and said. Streamlit draws SVG, whose points can be told apart
by assistive technology, up to 2 000."""
TABLE_ROWS = 200
"""Rows sent to the table at most: it shows eight at a time, and its decoding is what a click waits for."""
WHISKERS = 40
"""Front points whose intervals are drawn at most: more would hide the points."""
BASE = "base"

FRONT_SCRIPT = """from core.catalog.queries import tradeoff_frame
from core.catalog.store import Catalog
from core.tradeoff import pareto_front, usable

frame = tradeoff_frame(Catalog(read_only=True), "BASE")
front = pareto_front(frame, "bytes", "kl", eligible=usable(frame))
print(frame[front.on_front])"""
"""The points of the page's dashed line, without the page."""


def method_domain(frame: pd.DataFrame) -> list[str]:
    """The methods of a base's variants in one fixed order, so that each keeps its colour whatever is filtered.

    Methods that made none are left out: a legend of all would take the room of the points, and colours are few.
    """
    found = set(frame["method"].dropna().unique()) - {"", BASE}
    known = [id_ for id_ in methods("compress") if id_ in found]
    return known + sorted(found - set(known))


@dataclass(frozen=True)
class Scene:
    """Everything the scatter shows, in display units, drawn in row order (the front last, on top)."""

    marks: pd.DataFrame
    x: Objective
    y: Objective
    n_front: int
    n_judged: int
    hidden: int
    """Dominated points left out to keep the chart light."""
    unmeasured: int
    """Rows without a value on one of the axes."""
    at_edge: int
    """Marks whose value is 0 on a log axis, drawn on its edge."""
    domain: list[str]

    @property
    def front(self) -> pd.DataFrame:
        """The front's marks from left to right."""
        return self.marks[self.marks["on_front"]].sort_values("x")

    def mark(self, variant: str) -> pd.Series | None:
        """The mark of a variant, or None where it is not drawn."""
        rows = self.marks[self.marks["variant"] == variant]
        return None if rows.empty else rows.iloc[0]


def scene(frame: pd.DataFrame, x: str, y: str, verdict: Verdict, *, marks: int = MARKS) -> Scene:
    """Place and dress the marks of a trade-off frame under the constraints' verdict.

    The front is taken among the rows that keep every limit; rows that break one stay visible, faint.
    """
    aims = objective(x), objective(y)
    front = pareto_front(frame, x, y, eligible=verdict.feasible)
    probability = probability_on_front(frame, x, y, eligible=verdict.feasible)
    placed = frame[[x, y]].notna().all(axis=1) if {x, y} <= set(frame) else pd.Series(False, frame.index)
    rows = frame[placed]
    drawn = pd.DataFrame(
        {
            "variant": rows["variant"],
            "name": rows["name"],
            "method": rows["method"].where(rows["recipe"].notna(), BASE),
            "state": _states(rows),
            "on_front": front.on_front[placed],
            "probability": probability[placed].fillna(0.0),
            "feasible": verdict.feasible[placed],
        }
    )
    at_edge = np.zeros(len(rows), dtype=bool)
    for axis, aim in zip("xy", aims, strict=True):
        at_edge |= _place(drawn, rows, axis, aim)
    kept, hidden = _thin(drawn, marks)
    order = kept.sort_values(["on_front", "probability"], kind="stable")
    return Scene(
        order.reset_index(drop=True),
        *aims,
        n_front=int(front.on_front.sum()),
        n_judged=int(front.judged.sum()),
        hidden=hidden,
        unmeasured=len(frame) - len(rows),
        at_edge=int(at_edge[drawn.index.isin(kept.index)].sum()),
        domain=method_domain(frame),
    )


def _states(rows: pd.DataFrame) -> pd.Series[str]:
    """``base``, ``unproven``, ``flagged`` or ``proven``, the first that holds."""
    kinds = [rows["recipe"].isna(), ~usable(rows), rows["flagged"].astype(bool)]
    state = np.select(kinds, [BASE, "unproven", "flagged"], default="proven")
    return pd.Series(state, index=rows.index)


def _place(drawn: pd.DataFrame, rows: pd.DataFrame, axis: str, aim: Objective) -> np.ndarray:
    """Write ``axis`` and its interval in display units; on a log axis what is not positive goes to the edge."""
    for suffix in ("", "_low", "_high"):
        column = f"{aim.column}{suffix}"
        drawn[axis + suffix] = rows[column] / aim.scale if column in rows else np.nan
    drawn[f"{axis}_value"] = drawn[axis]
    if not aim.log:
        return np.zeros(len(rows), dtype=bool)
    floor = _floor(drawn[axis])
    below = (drawn[axis] < floor).to_numpy()
    for suffix in ("", "_low", "_high"):
        drawn[axis + suffix] = drawn[axis + suffix].clip(lower=floor)
    return below


def _floor(values: pd.Series[float]) -> float:
    positive = values[values > 0]
    return float(positive.min()) / 2 if len(positive) else 1.0


def _thin(drawn: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, int]:
    """Keep every mark that may be on the front, the base, and of the rest always the same ``limit``.

    The choice hangs on the variant's id alone, so points do not blink in and out as the catalog grows.
    """
    matters = drawn["on_front"] | (drawn["probability"] > 0) | (drawn["state"] == BASE)
    rest = drawn[~matters]
    if len(rest) <= limit:
        return drawn, 0
    rank = pd.Series(pd.util.hash_array(rest["variant"].to_numpy(dtype=object)), index=rest.index)
    chosen = rank.nsmallest(limit).index
    return drawn[matters | drawn.index.isin(chosen)], len(rest) - limit


def brushed(frame: pd.DataFrame, x: str, y: str, box: Sequence[float] | None) -> pd.Series[bool]:
    """Rows inside the brushed box ``[x0, x1, y0, y1]`` (display units); every row without a box."""
    if box is None:
        return pd.Series(True, index=frame.index)
    inside_x = (frame[x] / objective(x).scale).between(box[0], box[1])
    return inside_x & (frame[y] / objective(y).scale).between(box[2], box[3])


# --- the table ----------------------------------------------------------------------------------------


def table(
    frame: pd.DataFrame,
    chosen: pd.Series[bool],
    front: pd.DataFrame,
    y: Objective,
    said: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """The chosen rows as the page's table shows them: display units, best ``y`` first, at most ``TABLE_ROWS``.

    ``said`` is what must be said of a variant; the column ``to_know`` is there where any of the rows has something.
    """
    rows = frame[chosen].sort_values(y.column, ascending=y.better != "higher", na_position="last")
    rows = rows.head(TABLE_ROWS)
    shown = pd.DataFrame(
        {
            "variant": rows["variant"],
            "name": rows["name"],
            "method": [[m] if isinstance(m, str) and m else [BASE] for m in rows["method"]],
            "state": [[state] for state in _states(rows)],
            "on_front": rows["variant"].map(front.set_index("variant")["probability"]) * 100,
        }
    )
    words = [" ".join(said.get(id_, ())) for id_ in rows["variant"]]
    if any(words):
        shown["to_know"] = words
    for aim in available(frame):
        shown[aim.column] = rows[aim.column] / aim.scale
    return shown.reset_index(drop=True)


def only(frame: pd.DataFrame, variants: Iterable[str]) -> pd.DataFrame:
    """These variants and the base."""
    return frame[frame["variant"].isin(set(variants)) | frame["recipe"].isna()].reset_index(drop=True)


def export_table(frame: pd.DataFrame, chosen: pd.Series[bool], on_front: Iterable[str]) -> pd.DataFrame:
    """Every chosen row with every stored column, unrounded and in stored units, for the CSV."""
    rows = frame[chosen].copy()
    rows.insert(2, "on_front", rows["variant"].isin(set(on_front)))
    return rows


# --- one variant --------------------------------------------------------------------------------------


def measurements(runs: Sequence[Run]) -> pd.DataFrame:
    """Every measurement of every run, repeats included, newest first."""
    rows = [
        {
            "measurement": fmt.label(m.name),
            "value": fmt.number(m.value, m.unit),
            "interval": fmt.interval(m.low, m.high, m.unit),
            "n": m.n,
            "kind": run.kind,
            "status": ", ".join(run.flags) or run.status,
            "conditions": conditions(run, m),
            "interval_method": m.interval,
            "protocol": run.protocol,
            "ended_at": run.ended_at,
            "run": run.id,
        }
        for run in sorted(runs, key=lambda run: run.ended_at, reverse=True)
        for m in run.measurements
    ]
    return pd.DataFrame(rows)


def conditions(run: Run, measurement: Measurement) -> str:
    """What a number depends on, as one line: the run's conditions, then the measurement's own."""
    together = {**run.conditions, **measurement.conditions}
    return " · ".join(f"{key} {value}" for key, value in together.items() if value not in (None, "", {}, []))


def proof(runs: Sequence[Run]) -> Run | None:
    """The newest reload proof."""
    return max((run for run in runs if run.kind == "proof"), key=lambda run: run.ended_at, default=None)


def error_by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """Relative error per layer: root of the parameter-weighted mean square over the layer's weights."""
    inside = layers[layers["layer"].notna() & layers["relative_error"].notna()]
    weight = inside["parameters"].astype(float)
    squares = (inside["relative_error"].astype(float) ** 2 * weight).groupby(inside["layer"]).sum()
    mean = squares / weight.groupby(inside["layer"]).sum()
    return pd.DataFrame({"layer": mean.index.astype(int), "relative_error": np.sqrt(mean.to_numpy())})


def reproduce_python(variant: Variant, base: Variant, folder: str | None) -> str:
    """A few lines on public libraries only that load the variant's files as anyone would."""
    auto = {
        "decoder": "AutoModelForCausalLM",
        "vision": "AutoModelForImageClassification",
        "classifier": "AutoModelForSequenceClassification",
    }.get(variant.family, "AutoModel")
    return "\n".join(
        [
            "import torch",
            f"from transformers import {auto}",
            "",
            f"folder = {folder or base.source!r}",
            f"model = {auto}.from_pretrained(folder, dtype=torch.float32).eval()",
            'print(sum(p.numel() for p in model.parameters()), "parameters")',
        ]
    )


def reproduce_cli(variant: Variant, base: Variant) -> str:
    """The command line that makes and measures the variant again; a base is only measured."""
    if variant.recipe is None:
        return f"slimscope evaluate {base.source} --json\nslimscope profile {base.source} --json"
    return (
        f"cat > recipe.json <<'JSON'\n{variant.recipe}\nJSON\n"
        f"slimscope run recipe.json --model {base.source} --json"
    )
