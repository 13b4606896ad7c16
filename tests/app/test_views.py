from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from app import views
from app.components._quantize import to_levels
from core.types import Provenance, View

FRAME = pd.DataFrame(
    {
        "layer": [1, 0, 0],
        "position": [0, 0, 1],
        "value": [3.0, 1.0, 2.0],
        "token": ["<img>", "<img>", "\n"],
        "top1": ["x", "y", ""],
    }
)
VIEW = View("heatmap", x="position", y="layer", color="value", text="top1", unit="nats", tooltip=("token",))


def test_a_grid_is_sorted_and_keeps_missing_cells_empty():
    grid = views.to_grid(FRAME, VIEW)
    np.testing.assert_array_equal(grid.values_RC, [[1.0, 2.0], [3.0, np.nan]])
    assert grid.words == (("y", "∅"), ("x", ""))
    assert grid.cols == ("0 <img>", "1 ⏎")
    assert grid.hover[0][0].splitlines()[-1] == "Token: <img>"


def test_a_cell_is_found_by_the_text_of_its_keys():
    grid = views.to_grid(FRAME, VIEW)
    assert grid.index("1", "0") == (1, 0)
    assert grid.keys(1, 0) == (1, 0)
    assert grid.index("7", "0") is None
    assert grid.index("'; drop", "0") is None


def test_axis_names_need_one_token_per_key():
    varied = FRAME.assign(token=["a", "b", "c"])
    assert views.axis_names(varied, VIEW, "position", [0, 1]) == ("0", "1")
    both = pd.DataFrame({"query": [0, 1], "key": [0, 0], "w": [1.0, 2.0], "query_token": ["a", "b"]})
    view = View("heatmap", x="key", y="query", color="w")
    assert views.axis_names(both, view, "query", [0, 1]) == ("0 a", "1 b")


def test_maps_over_the_same_axes_are_one_group_and_their_table_is_a_detail():
    other = View("heatmap", x="position", y="layer", color="token")
    table = View("table", x="position", y="layer", frame="topk")
    groups = views.map_groups([VIEW, table, other, View("heatmap", x="head", y="layer", color="value")])
    assert [len(group) for group in groups] == [2, 1]
    assert views.is_detail(table, groups[0])
    assert not views.is_detail(table, groups[1])
    assert not views.is_detail(View("table", x="position", y="layer"), groups[0])


def test_thinning_keeps_both_ends_and_small_frames():
    frame = pd.DataFrame({"x": range(1000)})
    thin = views.thinned(frame, 10)
    assert (len(thin), thin.x.iloc[0], thin.x.iloc[-1]) == (10, 0, 999)
    assert views.thinned(frame, 1000) is frame


def test_provenance_says_how_exact_and_how_long():
    line = views.provenance_line(Provenance(dtype="float32", device="cpu", exactness_gap=0.0, seconds=0.25))
    assert line == "float32 · cpu · exactness gap 0 · 250 ms"
    assert "1.5e-06" in views.provenance_line(Provenance(exactness_gap=1.5e-6))


@pytest.mark.parametrize(
    ("options", "low", "high", "levels"),
    [
        ({}, 1, 100, [0, 23, 255]),
        ({"log": True}, 1, 100, [0, 128, 255]),
        ({"midpoint": 100}, 1, 199, [0, 12, 128]),
    ],
)
def test_levels_span_the_scale(options, low, high, levels):
    import base64

    quantized = to_levels(np.array([1.0, 10.0, 100.0]), **options)
    assert (quantized.low, quantized.high) == pytest.approx((low, high))
    assert list(base64.b64decode(quantized.encoded)) == levels


def test_a_constant_map_is_drawable():
    assert to_levels(np.zeros((2, 2))).low == 0.0
    assert to_levels(np.full(3, np.nan)).high == 0.0
