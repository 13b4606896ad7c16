"""Assignments as text, budgets, tolerances, and which formats one file can hold."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from core.budget.allocation import OverBudget
from core.budget.assignment import (
    allocate_readable,
    least_losses,
    read_assignment,
    read_budget,
    read_tolerance,
    written,
)
from core.budget.formats import read_format, read_formats
from core.errors import BadInput
from core.numerics.schemes import FloatScheme, IntegerScheme


def cells(kinds: dict[str, str], formats: dict[str, tuple[int, float]]) -> pd.DataFrame:
    """Every group in every format, at the same bytes and loss."""
    return pd.DataFrame(
        [
            {"group": group, "kind": kind, "format": name, "bytes": nbytes, "loss": loss, "fisher": loss}
            for group, kind in kinds.items()
            for name, (nbytes, loss) in formats.items()
        ]
    )


def best(table: pd.DataFrame, budget: int, **pins: str) -> dict[str, str]:
    return dict(
        allocate_readable(
            table,
            budget,
            fixed_bytes=0,
            score="exact",
            pins={k.replace("_", "."): v for k, v in pins.items()},
        ).choice_of
    )


def test_formats_by_name() -> None:
    assert read_format("int4g32") == IntegerScheme(4, 32, True)
    assert read_format("INT3G64a") == IntegerScheme(3, 64, False)
    assert read_format("int8") == IntegerScheme(8, None, True)
    assert read_format("float8row") == FloatScheme("float8_e4m3fn", "row")
    assert read_format("keep") is None
    assert list(read_formats("int8 float8,  bfloat16")) == ["int8", "float8", "bfloat16"]
    for wrong in ("int9", "int4g48", "fp4", ""):
        with pytest.raises(BadInput, match=r"write e\.g\. int2g32"):
            read_formats(wrong)


def test_an_assignment_is_read_as_it_is_written() -> None:
    choice = {"embedding": "float8", "0.qkv": "int4g32", "0.o": "int8"}
    assert read_assignment(written(choice)) == choice
    assert read_assignment("3.down:8") == {"3.down": "int8g32"}
    for wrong, said in (
        ("3.down", "write layer.part:format"),
        ("a:int4,a:int8", "named twice"),
        ("a:int1", "not known"),
    ):
        with pytest.raises(BadInput, match=said):
            read_assignment(wrong)


def test_budgets_and_tolerances() -> None:
    assert read_budget("60MB", 1) == read_budget("60", 1) == 60_000_000
    assert read_budget("1.2 GB", 1) == 1_200_000_000
    assert read_budget("4.5bpw", 16) == 9
    for wrong in ("-3MB", "lots", "0", "5 TB"):
        with pytest.raises(BadInput, match=r"write e\.g\. 60MB"):
            read_budget(wrong, 1)
    assert read_tolerance("0.1", "nats", 4.0) == 0.1
    assert read_tolerance("0.05bpb", "nats", 4.0) == pytest.approx(0.05 * math.log(2) * 4)
    with pytest.raises(BadInput, match="an encoder has no bits per byte"):
        read_tolerance("0.05bpb", "1 - cosine", None)


def test_linear_layers_mix_without_zero_points_and_tables_stay_plain() -> None:
    formats = {"int4": (4, 0.1), "int8": (8, 0.05), "keep": (32, 0.0)}
    assert sorted(best(cells({"0.o": "linear", "1.o": "linear"}, formats), 12).values()) == ["int4", "int8"]
    table = cells({"0.o": "linear", "1.o": "linear", "embedding": "table"}, formats)
    assert set(best(table, 20).values()) == {"int4"}, (
        "one format may hold a table too; a mixture would take 44 bytes"
    )
    with pytest.raises(BadInput, match="cannot stand in one file"):
        best(table, 1000, **{"0_o": "int4", "1_o": "int8", "embedding": "int8"})


def test_matrices_that_are_no_linear_share_one_format() -> None:
    table = cells({"0.o": "matrix", "1.o": "matrix"}, {"int4": (4, 0.1), "int8": (8, 0.01)})
    assert best(table, 12) == {"0.o": "int4", "1.o": "int4"}
    assert best(table, 16) == {"0.o": "int8", "1.o": "int8"}


def test_experts_share_one_format_among_themselves() -> None:
    table = cells(
        {"0.experts": "experts", "1.experts": "experts", "0.o": "linear"},
        {"int4": (4, 0.1), "int8": (8, 0.01)},
    )
    assert best(table, 16) == {"0.experts": "int4", "1.experts": "int4", "0.o": "int8"}
    least = least_losses(table, [11, 12, 16, 20, 24], fixed_bytes=0, score="exact")
    assert least == pytest.approx([math.inf, 0.3, 0.21, 0.12, 0.03]), (
        "one hull for each format of the experts"
    )


def test_zero_points_stand_alone_and_win_where_they_are_better() -> None:
    table = cells(
        {"0.o": "linear", "1.o": "linear"}, {"int4g32a": (5, 0.01), "int4g32": (4, 0.1), "int8": (8, 0.05)}
    )
    assert best(table, 12) == {"0.o": "int4g32a", "1.o": "int4g32a"}
    assert set(best(table, 8).values()) == {"int4g32"}


def test_the_minimum_is_over_all_kinds_of_file() -> None:
    table = cells({"0.o": "linear", "embedding": "table"}, {"int4": (4, 0.1), "keep": (32, 0.0)})
    with pytest.raises(OverBudget) as caught:
        best(table, 7)
    assert caught.value.minimum == 8
