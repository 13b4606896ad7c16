from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from app import format


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (538_060_032, "538 MB"),
        (999_600_000, "1.00 GB"),
        (1e12, "1.00 TB"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_sizes_are_decimal(n_bytes, text):
    assert format.size(n_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123456, "0.00123"),
        (1234.5, "1,234"),
        (1e-9, "1.00e-09"),
        (math.inf, "∞"),
        (-2.5, "-2.50"),
    ],
)
def test_three_significant_digits(value, text):
    assert format.significant(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.0, "tokens", "12 tokens"),
        (27.5, "layers", "27.5 layers"),
        (41.26, "tokens/s", "41.3 tok/s"),
        (2e6, "bytes", "2.00 MB"),
        (0.5, "nats", "0.500 nats"),
        (None, "ms", "–"),
    ],
)
def test_a_number_keeps_its_unit(value, unit, text):
    assert format.number(value, unit) == text


def test_an_interval_needs_both_ends():
    assert format.interval(0.1, 0.2, "nats") == "0.100 … 0.200 nats"
    assert format.interval(0.1, None) == format.NONE


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0.0123, "12 ms"), (3.44, "3.4 s"), (27, "27 s"), (125, "2 min 05 s"), (4320, "1 h 12 min")],
)
def test_durations(duration, text):
    assert format.seconds(duration) == text


def test_ago_takes_times_without_a_zone_as_utc():
    now = datetime(2026, 1, 2, 12, tzinfo=UTC)
    assert format.ago(datetime(2026, 1, 2, 9), now) == "3 h ago"
    assert format.ago(now - timedelta(seconds=50), now) == "1 min ago"
    assert format.ago(None, now) == format.NONE


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("top_k", "Top k"),
        ("kl_to_final_nats", "KL to final (nats)"),
        ("ttft_ms", "Ttft (ms)"),
        ("bytes", "Bytes"),
    ],
)
def test_labels_end_in_their_unit(column, text):
    assert format.label(column) == text


@pytest.mark.parametrize(
    ("n", "text"), [(9999, "9,999"), (134_515_008, "134.5 M"), (2.5e9, "2.5 B"), (None, "–")]
)
def test_counts(n, text):
    assert format.count(n) == text
