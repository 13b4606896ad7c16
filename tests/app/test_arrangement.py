"""Where views go, and what a click on them means."""

from __future__ import annotations

import struct
import zlib

import pandas as pd
import pytest
from pydantic import Field

from app.arrangement import arrange
from app.charts import FLOW_EDGES, chart
from app.questions import QUESTIONS, by_question, examples_for, misfits, usable
from app.views import boxes, measures, png_size
from core.registry import Example, Question, Settings, get, methods
from core.types import Prompt, Result, View

FRAME = pd.DataFrame(
    {"layer": [0, 1], "head": [0, 0], "position": [0, 1], "score": [0.1, 0.9], "x": [0, 4], "y": [0, 0]}
)
RANKED = View("table", x="layer", color="score", frame="ranked", tooltip=("head",))
MAP = View("heatmap", x="head", y="layer", color="score")
OTHER = View("heatmap", x="position", y="layer", color="score")


class Chosen(Settings):
    layer: int = Field(0, description="Layer")
    head: int = Field(0, description="Head")


class Plain(Settings):
    pass


def made(*views: View) -> Result:
    return Result({"main": FRAME, "ranked": FRAME, "detail": FRAME}, views)


def test_the_ranked_table_comes_first_and_its_rows_are_cells():
    arranged = arrange(made(RANKED, MAP, OTHER), Plain())
    assert arranged.lead == (RANKED,)
    assert arranged.maps == ((MAP,), (OTHER,))
    assert arranged.target(set(FRAME.columns)) == (MAP,)
    assert arranged.target({"score"}) is None


def test_a_table_after_the_maps_stays_below():
    assert arrange(made(MAP, RANKED), Plain()).rest == (RANKED,)


def test_a_map_over_settings_chooses_them():
    arranged = arrange(made(MAP, OTHER), Chosen())
    assert arranged.choosing == ((MAP,),)
    assert arranged.cells == (), "what was chosen is read, not picked"
    assert arrange(made(MAP, OTHER), None).choosing == ()


def test_a_table_of_one_cell_goes_into_the_drawer():
    detail = View("table", x="head", y="layer", color="score", frame="detail")
    arranged = arrange(made(MAP, detail), Plain())
    assert arranged.details == (detail,)
    assert arranged.rest == ()


def test_every_view_is_drawn_once():
    views = (
        *(RANKED, MAP, OTHER, View("table", x="head", y="layer", color="score", frame="detail")),
        *(View("scatter", x="layer", y="score"), View("tokens", x="position", color="score", text="head")),
        *(View("bar", x="head", y="score"), View("flow", x="layer", y="head", color="score")),
        View("image", x="x", y="y", color="score"),
    )
    arranged = arrange(made(*views), Plain())
    drawn = [*arranged.lead, *arranged.tokens, *arranged.details, *arranged.rest]
    drawn += [view for group in (*arranged.pictures, *arranged.choosing, *arranged.maps) for view in group]
    assert sorted(map(repr, drawn)) == sorted(map(repr, views))


# --- pictures -----------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x7f" * width for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_patches_lie_where_they_are_in_the_picture():
    view = View("image", x="x", y="y", color="score")
    assert png_size(png(8, 4)) == (8, 4)
    assert boxes(FRAME, view, png(8, 4)) == [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)]
    sized = FRAME.assign(width=2, height=1)
    assert boxes(sized, view, png(8, 4))[1] == (0.5, 0.0, 0.25, 0.25)


# --- charts of any result -----------------------------------------------------------------------------


def test_a_flow_draws_its_heaviest_edges():
    frame = pd.DataFrame({"source": [f"s{i}" for i in range(300)], "target": "t", "weight": range(300)})
    drawn = chart(frame, View("flow", x="source", y="target", color="weight")).to_dict()
    (data,) = drawn["datasets"].values()
    assert len(data) == 2 * FLOW_EDGES
    assert min(row["weight"] for row in data) == 100


def test_a_scatter_can_be_drawn_over_any_two_measures():
    frame = pd.DataFrame({"a": [1.0], "b": [2.0], "c": [3.0], "name": ["x"], "none": [float("nan")]})
    assert measures(frame, View("scatter", x="a", y="b")) == ["a", "b", "c"]


def test_shared_limits_reach_a_chart():
    drawn = chart(FRAME, View("bar", x="head", y="score"), limits={"score": (0.1, 5.0)}).to_dict()
    assert drawn["encoding"]["y"]["scale"]["domain"] == [0, 5.0]


# --- questions ----------------------------------------------------------------------------------------


def test_every_question_of_the_registry_is_offered():
    from typing import get_args

    assert set(QUESTIONS) == set(get_args(Question))


def test_every_probe_stands_under_one_question():
    grouped = by_question(methods("probe").values())
    assert sorted(p.id for group in grouped.values() for p in group) == sorted(methods("probe"))


def test_what_does_not_fit_says_what_it_needs():
    offers = frozenset({"encoder", "text"})
    table = misfits(methods("probe"), offers)
    assert set(table["probe"]) | {p.title for p in usable(methods("probe"), offers).values()} == {
        p.title for p in methods("probe").values()
    }
    assert table.set_index("probe").loc["Logit lens", "needs"] == "a decoder"


@pytest.mark.parametrize(
    ("family", "titles"), [("decoder", ["t"]), ("encoder", ["t", "p"]), ("vision", ["i"])]
)
def test_examples_fit_the_family(family, titles):
    from dataclasses import replace

    examples = (
        Example("t", Prompt("a")),
        Example("p", Prompt("a", "b")),
        Example("i", Prompt(image="digits:1")),
    )
    probe = replace(get("probe", "logit_lens"), examples=examples)
    assert [example.title for example in examples_for(probe, family)] == titles
