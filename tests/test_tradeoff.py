from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import BadInput
from core.tradeoff import (
    OBJECTIVES,
    available,
    headlines,
    objective,
    pareto_front,
    probability_on_front,
    quality_column,
    surely_dominated,
    usable,
)
from tests.references.naive_front import naive_front, naive_surely_dominated

# Small integers make ties and duplicates common; NaN is a missing measurement.
value = st.one_of(st.integers(0, 6).map(float), st.just(float("nan")))
points = st.lists(st.tuples(value, value), max_size=40)


def frame_of(rows: list[tuple[float, float]], x: str = "bytes", y: str = "kl") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[x, y], dtype=float)


@given(points)
def test_front_equals_its_definition(rows):
    front = pareto_front(frame_of(rows), "bytes", "kl")
    assert front.on_front.tolist() == naive_front(rows)
    assert front.excluded == sum(bool(np.isnan(row).any()) for row in rows)


@given(points)
def test_front_of_a_higher_is_better_axis_is_the_front_of_its_negative(rows):
    mirrored = [(-x, y) for x, y in rows]
    higher = pareto_front(frame_of(mirrored, "decode_tokens_per_s"), "decode_tokens_per_s", "kl")
    assert higher.on_front.tolist() == naive_front(rows)


@given(points, st.lists(st.booleans(), min_size=40, max_size=40))
def test_ineligible_rows_neither_join_nor_beat(rows, flags):
    frame, eligible = frame_of(rows), pd.Series(flags[: len(rows)], dtype=bool)
    front = pareto_front(frame, "bytes", "kl", eligible=eligible)
    alone = naive_front([row for row, keep in zip(rows, eligible, strict=True) if keep])
    assert front.on_front[eligible.to_numpy()].tolist() == alone
    assert not front.on_front[~eligible.to_numpy()].any()


spread = st.one_of(st.integers(0, 3).map(float), st.just(float("nan")))
box = st.tuples(st.integers(0, 8).map(float), spread)


@given(st.lists(st.tuples(box, box), max_size=25), st.sampled_from([0.0, 0.25]))
def test_sure_dominance_equals_its_definition(rows, delta):
    frame = pd.DataFrame(
        {
            name: [row[axis][0] + sign * row[axis][1] for row in rows] if sign else [r[axis][0] for r in rows]
            for axis, column in enumerate(("kl", "flips"))
            for name, sign in ((column, 0), (f"{column}_low", -1), (f"{column}_high", 1))
        },
        dtype=float,
    )

    def ends(middle: float, half: float) -> tuple[float, float, float]:
        return (middle, -np.inf, np.inf) if np.isnan(half) else (middle, middle - half, middle + half)

    boxes = [(ends(*a), ends(*b)) for a, b in rows]
    found = surely_dominated(frame, "kl", "flips", delta=delta)
    assert found.tolist() == naive_surely_dominated(boxes, delta)


def test_overlapping_intervals_dominate_by_value_but_not_surely():
    frame = pd.DataFrame(
        {"bytes": [100.0, 100.0], "kl": [0.010, 0.012], "kl_low": [0.008, 0.009], "kl_high": [0.013, 0.014]}
    )
    assert pareto_front(frame, "bytes", "kl").on_front.tolist() == [True, False]
    assert not surely_dominated(frame, "bytes", "kl").any()
    frame["kl_low"], frame["kl_high"] = [0.0095, 0.0115], [0.0105, 0.0125]
    assert surely_dominated(frame, "bytes", "kl").tolist() == [False, True]


def test_probability_of_two_equal_noisy_rivals_is_half_each():
    frame = pd.DataFrame({"bytes": [1.0, 1.0], "kl": [0.5, 0.5], "kl_low": [0.4, 0.4], "kl_high": [0.6, 0.6]})
    share = probability_on_front(frame, "bytes", "kl", draws=4000)
    assert share.sum() == pytest.approx(1, abs=1e-9), "exactly one of the two is on the front in every draw"
    assert share[0] == pytest.approx(0.5, abs=0.03)


def test_probability_follows_the_normal_law_of_the_difference():
    # Difference of two independent normals: mean 0.1, sd √2·0.1/1.96 → P(first is lower) = Φ(1.386) = 0.917.
    frame = pd.DataFrame({"bytes": [1.0, 1.0], "kl": [0.5, 0.6], "kl_low": [0.4, 0.5], "kl_high": [0.6, 0.7]})
    share = probability_on_front(frame, "bytes", "kl", draws=4000, seed=1)
    assert share[0] == pytest.approx(0.917, abs=0.02)


def test_probability_without_intervals_is_the_front_itself_and_is_repeatable():
    rows = [(1.0, 3.0), (2.0, 2.0), (3.0, 3.0), (float("nan"), 0.0)]
    frame = frame_of(rows)
    share = probability_on_front(frame, "bytes", "kl")
    assert share.tolist()[:3] == [1.0, 1.0, 0.0]
    assert np.isnan(share[3])
    noisy = frame.assign(kl_low=frame.kl - 1, kl_high=frame.kl + 1)
    first, again = (probability_on_front(noisy, "bytes", "kl", seed=7) for _ in range(2))
    pd.testing.assert_series_equal(first, again)
    assert not first.equals(probability_on_front(noisy, "bytes", "kl", seed=8))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30))
def test_hopeless_rows_are_zero_exactly_when_drawing_would_say_so(rows):
    """The shortcut that skips drawing must not change an answer: nothing skipped could ever be drawn."""
    frame = frame_of([(float(x), float(y)) for x, y in rows])
    frame = frame.assign(kl_low=frame.kl - 0.5, kl_high=frame.kl + 0.5)
    share = probability_on_front(frame, "bytes", "kl", draws=50)
    hopeless = (share == 0).to_numpy()
    front = pareto_front(frame, "bytes", "kl").on_front.to_numpy()
    assert (share[front] > 0.02).all()
    assert not (hopeless & front).any()


@pytest.fixture
def variants() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": ["base", "a", "b", "c", "d"],
            "name": ["SmolLM2", "int8", "int4", "bf16", "int2"],
            "recipe": [None, "{}", "{}", "{}", "{}"],
            "proven": [True, True, True, True, False],
            "bytes": [538e6, 140e6, 90e6, 269e6, 50e6],
            "kl": [0.0, 0.001, 0.2, 0.0001, 0.01],
            "decode_tokens_per_s": [20.0, 30.0, 45.0, 25.0, np.nan],
        }
    )


def test_headlines_hold_the_tolerance_and_leave_unproven_out(variants):
    figures = headlines(variants)
    assert (figures.quality.column, figures.tolerance) == ("kl", 0.05)
    assert (figures.n_usable, figures.n_within) == (3, 2)
    assert (figures.smallest.variant, figures.fastest.variant, figures.closest.variant) == ("a", "a", "c")
    assert figures.smallest.change == pytest.approx(140 / 538 - 1)
    assert figures.fastest.change == pytest.approx(0.5)
    assert np.isnan(figures.closest.change), "the base's KL is 0: no ratio"
    loose = headlines(variants, tolerance=1.0)
    assert (loose.smallest.variant, loose.fastest.variant) == ("b", "b")
    strict = headlines(variants, tolerance=1e-9)
    assert strict.smallest is None
    assert strict.fastest is None


def test_usable_is_proven_or_base(variants):
    variants.loc[0, "proven"] = False
    assert usable(variants).tolist() == [True, True, True, True, False]


def test_encoders_are_judged_by_cosine_agreement(variants):
    encoders = variants.drop(columns="kl").assign(cosine_agreement=[1.0, 0.9999, 0.95, 1.0, 0.999])
    assert quality_column(encoders) == "cosine_agreement"
    figures = headlines(encoders)
    assert (figures.smallest.variant, figures.n_within) == ("a", 2)


def test_headlines_of_an_unmeasured_base_are_empty(variants):
    bare = variants.drop(columns=["kl", "decode_tokens_per_s"])
    figures = headlines(bare)
    assert figures.closest is None
    assert figures.smallest is None
    assert [o.column for o in available(bare)] == ["bytes"]


@pytest.mark.parametrize(
    ("column", "stored", "shown"),
    [
        ("bytes", 131_072_000, "131 MB"),
        ("bytes", 9_870_000, "9.87 MB"),
        ("bytes", 1_234_000_000, "1,234 MB"),
        ("kl", 0.000123456, "0.000123 nats"),
        ("kl", 3.61e-7, "3.6e-7 nats"),
        ("kl", 0.0, "0 nats"),
        ("top1_agreement", 0.981, "98.1 %"),
        ("decode_tokens_per_s", 41.26, "41.3 tok/s"),
        ("decode_tokens_per_s", float("nan"), "–"),
    ],
)
def test_a_value_is_shown_with_its_unit(column, stored, shown):
    assert objective(column).show(stored) == shown


def test_unknown_objective_lists_the_known():
    with pytest.raises(BadInput, match="'speed' is not an objective; choose one of bytes, bits_per_weight"):
        objective("speed")
    assert list(OBJECTIVES)[:3] == ["bytes", "bits_per_weight", "kl"]


def test_a_flagged_speed_is_a_headline_only_for_want_of_another_and_compared_with_nothing():
    frame = pd.DataFrame(
        {
            "variant": ["base", "calm", "busy"],
            "name": ["base", "calm", "busy"],
            "recipe": [None, "{}", "{}"],
            "proven": True,
            "bytes": [100.0, 50.0, 50.0],
            "kl": [0.0, 0.01, 0.01],
            "decode_tokens_per_s": [10.0, 12.0, 99.0],
            "flagged": [False, False, True],
        }
    )
    fastest = headlines(frame).fastest
    assert fastest is not None
    assert (fastest.variant, round(fastest.change, 6)) == ("calm", 0.2)
    against_flagged = headlines(frame.assign(flagged=[True, False, True])).fastest
    assert against_flagged is not None
    assert np.isnan(against_flagged.change)
    only_flagged = headlines(frame.assign(flagged=True)).fastest
    assert only_flagged is not None
    assert (only_flagged.variant, only_flagged.flagged) == ("busy", True)
    assert np.isnan(only_flagged.change)
