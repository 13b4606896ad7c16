"""Badges: what two numbers have in common decides how far they may be compared."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from core.profile.comparability import MEANINGS, tier_of
from core.types import Run

HOST = {"cpu": "Fast Processor 9", "physical_cores": 4}


def run(protocol="fixed-ids/2 quick abc", environment="e1", host=HOST, **conditions) -> Run:
    now = datetime.now(UTC)
    kept = {"protocol_hash": "p1", "device": "cpu", "environment": {"host": host}, **conditions}
    return Run("r", "profile", "v", "valid", (), protocol, kept, environment, now, now)


@pytest.mark.parametrize(
    ("a", "b", "letter", "why"),
    [
        ({"session": "s1", "protocol": "x"}, {"session": "s1", "protocol": "x"}, "A", "in turn"),
        (run(), run(), "B", "slimscope ab"),
        (run(), run(protocol_hash="p2"), "C", "workload or protocol differ"),
        (run(), run(environment="e2"), "C", "machine or software differ"),
        (run(), run(environment="e2", host={**HOST, "cpu": "Slow Processor 1"}), "D", "different devices"),
        (run(), run(protocol="imported llama-bench"), "D", "measured elsewhere"),
        (run(), {**run().conditions, "protocol": "predicted/1"}, "E", "prediction"),
        (run(host={}), run(host={}), "D", "different devices"),  # what is not known is not the same
        (run(session="s1"), run(session="s2"), "B", "another session"),
    ],
)  # fmt: skip
def test_letters(a, b, letter, why):
    for one, other in ((a, b), (b, a)):
        badge = tier_of(one, other)
        assert badge.letter == letter
        assert why in badge.why
        assert badge.gives_verdicts == (letter == "A")


def test_an_imported_number_stays_d_whatever_else_is_the_same():
    assert tier_of(run(protocol="imported x", session="s"), run(session="s")).letter == "D"


def test_the_same_gpu_in_two_machines_is_the_same_model_of_device():
    gpu = {"gpu": "Big GPU"}
    a = run(device="cuda", host={**HOST, **gpu})
    b = run(device="cuda", environment="e2", host={"cpu": "Other", "physical_cores": 4, **gpu})
    assert tier_of(a, b).letter == "C"


def test_every_letter_is_explained():
    assert list(MEANINGS) == list("ABCDE")
