from __future__ import annotations

import pandas as pd
import pytest

from app.charts import MARK_LIMIT, PICK, chart, titled
from core.types import View

FRAME = pd.DataFrame(
    {
        "layer": [0, 0, 1, 1],
        "position": [0, 1, 0, 1],
        "entropy_nats": [1.0, 2.0, 0.5, 0.25],
        "token": ["a", " b", "a", " b"],
    }
)
HEAT = View("heatmap", x="position", y="layer", color="entropy_nats", unit="nats", tooltip=("token",))


def test_a_heatmap_puts_the_unit_on_the_colour_and_the_roles_on_the_axes():
    encoding = chart(FRAME, HEAT).to_dict()["encoding"]
    assert (encoding["x"]["field"], encoding["y"]["field"]) == ("position", "layer")
    assert (encoding["x"]["type"], encoding["color"]["type"]) == ("ordinal", "quantitative")
    assert encoding["color"]["title"] == "Entropy (nats)"
    assert [tip["field"] for tip in encoding["tooltip"]] == ["position", "layer", "entropy_nats", "token"]


def test_a_unit_already_in_the_name_is_not_said_twice():
    view = View("line", x="position", y="surprisal_bits", unit="bits")
    assert titled("surprisal_bits", view) == "Surprisal (bits)"
    assert titled("speed", View("line", x="position", y="speed", unit="tokens/s")) == "Speed (tok/s)"
    assert titled("position", view) == "Position"


@pytest.mark.parametrize("kind", ["line", "bar", "scatter", "tokens"])
def test_every_chart_kind_draws(kind):
    view = View(kind, x="position", y="entropy_nats", color="layer" if kind != "tokens" else "entropy_nats")
    assert chart(FRAME, view).to_dict()["mark"]


def test_bars_of_names_lie_beside_their_names():
    encoding = chart(FRAME, View("bar", x="token", y="entropy_nats")).to_dict()["encoding"]
    assert encoding["y"]["field"] == "token"
    assert encoding["x"]["field"] == "entropy_nats"


def test_a_click_sends_the_named_columns():
    (parameter,) = chart(FRAME, HEAT, pick=("layer", "position")).to_dict()["params"]
    assert parameter["name"] == PICK
    assert parameter["select"]["fields"] == ["layer", "position"]


def test_too_many_marks_are_refused():
    frame = pd.DataFrame({"x": range(MARK_LIMIT + 1), "y": range(MARK_LIMIT + 1)})
    with pytest.raises(ValueError, match="thin the frame"):
        chart(frame, View("scatter", x="x", y="y"))


def test_a_table_is_no_chart():
    with pytest.raises(ValueError, match="no chart"):
        chart(FRAME, View("table", x="position"))


def test_a_midpoint_centres_the_scale():
    view = View("heatmap", x="position", y="layer", color="entropy_nats", midpoint=0.5)
    assert chart(FRAME, view).to_dict()["encoding"]["color"]["scale"] == {"domainMid": 0.5}
