from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.constraints import Constraint, check, parse_constraints
from core.errors import BadInput
from core.tradeoff import usable


@pytest.mark.parametrize(
    ("text", "column", "comparison", "limit"),
    [
        ("≤ 120 MB", "bytes", "<=", 120e6),
        ("size < 0.5 GB", "bytes", "<", 0.5e9),
        ("<= 128 MiB", "bytes", "<=", 128 * 2**20),
        ("≥40tok/s", "decode_tokens_per_s", ">=", 40),
        ("prefill at least 300 tokens/s", "prefill_tokens_per_s", ">=", 300),
        ("KL ≤ 0.05", "kl", "<=", 0.05),
        ("kl under 5e-3 nats", "kl", "<", 0.005),
        ("top-1 ≥ 98 %", "top1_agreement", ">=", 0.98),
        ("top1_agreement >= 0.98", "top1_agreement", ">=", 0.98),
        ("ttft at most 0.2 s", "ttft_ms", "<=", 200),
        ("peak memory ≤ 2 GB", "peak_memory_bytes", "<=", 2e9),
        ("≤ 4.5 bits", "bits_per_weight", "<=", 4.5),
    ],
)
def test_a_limit_is_read_with_its_unit(text, column, comparison, limit):
    (found,) = parse_constraints(text)
    assert (found.column, found.comparison) == (column, comparison)
    assert found.limit == pytest.approx(limit)


def test_limits_are_joined_by_and_or_comma():
    both = parse_constraints("≤ 120 MB and ≥ 40 tok/s, KL < 0.1")
    assert [c.column for c in both] == ["bytes", "decode_tokens_per_s", "kl"]
    assert parse_constraints("  ") == ()


@given(
    st.sampled_from(["bytes", "kl", "decode_tokens_per_s", "ttft_ms", "top1_agreement", "bits_per_weight"]),
    st.sampled_from(["<=", "<", ">=", ">"]),
    st.integers(1, 999),
)
def test_the_written_form_reads_back(column, comparison, amount):
    limit = Constraint(column, comparison, amount * Constraint(column, comparison, 1.0).objective.scale)
    (again,) = parse_constraints(str(limit))
    assert (again.column, again.comparison) == (column, comparison)
    assert again.limit == pytest.approx(limit.limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("small please", "constraint 'small please' cannot be read; write a comparison, a number and a unit"),
        ("≤ 120", "constraint '≤ 120': the number has no unit; write e.g."),
        ("≤ 20 ms", "the unit 'ms' alone does not say what is limited; write e.g. 'TTFT ≤ 200 ms'"),
        ("kl ≤ 3 MB", "constraint 'kl ≤ 3 mb': unit 'mb' does not fit kl to base; use nats"),
        ("size ≤ 120", "no unit does not fit size; use b, kb, mb, gb"),
        ("beauty ≥ 3 nats", "'beauty' is not known; choose one of size, bits per weight"),
    ],
)
def test_an_unreadable_limit_says_what_to_write(text, message):
    with pytest.raises(BadInput) as error:
        parse_constraints(f"≤ 1 GB and {text}")
    assert message in str(error.value)


def test_a_structured_limit_is_checked_too():
    with pytest.raises(BadInput, match="'speed' is not an objective"):
        Constraint("speed", "<=", 1)
    with pytest.raises(BadInput, match="comparison '==' is not one of <=, <, >=, >"):
        Constraint("kl", "==", 1)
    with pytest.raises(BadInput, match="give a finite number"):
        Constraint("kl", "<=", float("nan"))


@pytest.fixture
def variants() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": ["base", "a", "b", "c"],
            "name": ["SmolLM2", "int8", "int4", "int2"],
            "recipe": [None, "{}", "{}", "{}"],
            "proven": [True, True, True, False],
            "bytes": [538e6, 140e6, 90e6, 50e6],
            "decode_tokens_per_s": [20.0, 41.0, np.nan, 90.0],
            "decode_tokens_per_s_low": [19.0, 39.0, np.nan, 88.0],
            "decode_tokens_per_s_high": [21.0, 43.0, np.nan, 92.0],
        }
    )


def test_check_keeps_only_usable_rows_and_marks_the_close_calls(variants):
    verdict = check(variants, parse_constraints("≤ 150 MB and ≥ 40 tok/s"), eligible=usable(variants))
    assert verdict.feasible.tolist() == [False, True, False, False]
    assert verdict.uncertain.tolist() == [False, True, False, False], "its interval reaches below 40 tok/s"
    assert (verdict.unmeasured, verdict.closest) == (1, None)
    assert verdict.sentence() == "1 of 4 keep every limit."


def test_an_infeasible_filter_names_the_closest_and_its_miss(variants):
    verdict = check(variants, parse_constraints("≤ 120 MB and ≥ 45 tok/s"), eligible=usable(variants))
    assert not verdict.feasible.any()
    assert verdict.closest == "a", "unproven c would keep both, but may not be chosen"
    assert verdict.sentence() == (
        "No variant keeps every limit. Closest is int8: Size is 140 MB, 20 MB (17%) over 120 MB; "
        "Decode is 41 tok/s, 4 tok/s (9%) short of 45 tok/s"
    )


def test_a_limit_nobody_was_measured_on_says_so(variants):
    verdict = check(variants, parse_constraints("KL ≤ 0.1"), eligible=usable(variants))
    assert verdict.unmeasured == 4
    assert verdict.sentence().startswith("Nothing can be judged")


def test_no_limit_keeps_every_usable_row(variants):
    assert check(variants, (), eligible=usable(variants)).feasible.tolist() == [True, True, True, False]
