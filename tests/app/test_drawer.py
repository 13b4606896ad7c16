"""A click anywhere means a cell of a map, by the map's own keys."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pydantic import Field

from app.arrangement import arrange
from app.components.result_drawer import Cells
from core.registry import Settings
from core.types import Provenance, Result, View

MAP = View("heatmap", x="head", y="layer", color="score")
LENS = View("heatmap", x="position", y="layer", color="score", frame="lens")
RANKED = View("table", x="name", color="score", frame="ranked")
FLOATS = pd.DataFrame(
    {"name": ["L1H2", "MLP 1"], "layer": [1.0, 1.0], "head": [2.0, np.nan], "score": [1.0, 0.5]}
)
HEADS = pd.DataFrame({"layer": [0, 1], "head": [2, 2], "score": [0.0, 1.0]})
POSITIONS = pd.DataFrame({"layer": [0, 1, 1], "position": [0, 0, 3], "score": [0.0, 1.0, 2.0]})


class Chosen(Settings):
    layer: int = Field(0, description="Layer")
    head: int = Field(0, description="Head")


@pytest.fixture
def address(monkeypatch):
    import streamlit as st

    query: dict[str, str] = {}
    state: dict[str, object] = {}
    monkeypatch.setattr(st, "query_params", query)
    monkeypatch.setattr(st, "session_state", state)
    return query, state


def cells(*views: View, settings: Settings | None = None, ranked: pd.DataFrame = FLOATS) -> Cells:
    frames = {"main": HEADS, "lens": POSITIONS, "ranked": ranked}
    result = Result(frames, views, provenance=Provenance("probe"))
    return Cells(result, arrange(result, settings))


def test_a_row_picks_its_cell_by_the_maps_keys(address):
    here = cells(RANKED, MAP)
    pick = here.on_row(RANKED)
    assert pick.columns == ("layer", "head")
    pick(FLOATS.iloc[0])
    assert address[0]["cell"] == "1~2", "1.0 in a ranking with gaps is layer 1 of the map"
    assert here.picked((MAP,)) == (1, 2)


def test_a_row_that_is_no_cell_picks_nothing(address):
    cells(RANKED, MAP).on_row(RANKED)(FLOATS.iloc[1])
    assert address[0] == {}


def test_a_row_sets_the_form_where_the_axes_are_settings(address):
    cells(RANKED, MAP, settings=Chosen()).on_row(RANKED)(FLOATS.iloc[0])
    assert address[1] == {"probe_layer": 1, "probe_head": 2}
    assert {type(value) for value in address[1].values()} == {int}


def test_a_row_with_one_axis_picks_a_column(address):
    tokens = pd.DataFrame({"name": ["a"], "position": [3], "score": [1.0]})
    here = cells(RANKED, LENS, ranked=tokens)
    here.on_row(RANKED)(tokens.iloc[0])
    assert address[0]["cell"] == "1~3", "in the last row, while none is picked"


def test_maps_over_other_axes_are_told_apart(address):
    here = cells(MAP, LENS)
    here.pick((LENS,), 0, 0)
    assert address[0]["cell"] == "0~0~layer.position"
    assert here.picked((LENS,)) == (0, 0)
    assert here.picked((MAP,)) is None
    assert here.chosen() == ((LENS,), (0, 0))


@pytest.mark.parametrize("cell", ["", "9~9", "1~2~3~4", "'; drop~0", "1~2~other.axes"])
def test_an_address_that_names_no_cell_picks_none(address, cell):
    address[0]["cell"] = cell
    assert cells(MAP, LENS).chosen() is None
