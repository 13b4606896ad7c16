"""Paired comparison: exact p-values against SciPy, and what cannot be told apart is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from core.evaluate._intervals import wilson
from core.evaluate._paired import compare, mcnemar


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (0, 5), (5, 0), (3, 11), (20, 20), (41, 60), (0, 400)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_a_pair_is_counted_by_hand() -> None:
    a = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 1], dtype=bool)
    b = np.array([1, 1, 1, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    found = compare(a, b, draws=2000, seed=0)
    assert (found.n, found.only_a, found.only_b) == (10, 1, 2)
    assert (found.accuracy_a, found.accuracy_b) == (0.7, 0.8)
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == 1.0
    assert (found.low or 0) < 0.1 < (found.high or 0)
    same = compare(a, a, draws=500, seed=0)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_wilson_is_the_textbook_value() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 17, 1998, table I, method 3)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
