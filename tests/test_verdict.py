from __future__ import annotations

import math

import pandas as pd
import pytest

from core.verdict import sentences, verdicts

BASE = {
    "bytes": 538e6,
    "decode_tokens_per_s": 18.0,
    "decode_tokens_per_s_low": 17.5,
    "decode_tokens_per_s_high": 18.5,
}
NATS = math.log(19.0)  # per token, of the base
PER_BYTE = 1 / 4.2  # tokens


def variant(perplexity: float = 19.0, spread: float = 0.01, **others: float) -> dict[str, float]:
    """A variant of BASE with these numbers, its evaluation on text of 4.2 bytes per token."""
    bits = math.log(perplexity) * PER_BYTE / math.log(2)
    delta = bits - NATS * PER_BYTE / math.log(2)
    measured = {"perplexity": perplexity, "bits_per_byte": bits, "delta_bits_per_byte": delta}
    return {
        **BASE, **measured, "delta_bits_per_byte_low": delta - spread, "delta_bits_per_byte_high": delta + spread,
        **others,
    }  # fmt: skip


def decode(value: float, half: float) -> dict[str, float]:
    return {
        "decode_tokens_per_s": value,
        "decode_tokens_per_s_low": value - half,
        "decode_tokens_per_s_high": value + half,
    }


def test_the_base_against_itself_has_nothing_to_be_said():
    assert sentences(BASE, variant()) == ()


def test_a_variant_that_is_smaller_as_fast_and_as_good_is_left_in_peace():
    assert sentences(BASE, variant(bytes=76e6)) == ()


def test_smaller_but_slower():
    (said,) = sentences(BASE, variant(bytes=76e6, **decode(12.0, 0.3)))
    assert said == "Smaller but slower: decode 12 tok/s (11.7 … 12.3) against 18 tok/s (17.5 … 18.5)."


def test_intervals_that_touch_say_nothing():
    assert sentences(BASE, variant(bytes=76e6, **decode(17.3, 0.2))) == ()


def test_a_speed_without_interval_says_nothing():
    assert sentences(BASE, variant(bytes=76e6, **decode(9.0, math.nan))) == ()


@pytest.mark.parametrize("whose", ["base", "variant"])
def test_a_flagged_run_is_not_judged_by_speed(whose):
    made = variant(bytes=76e6, **decode(12.0, 0.3))
    rows = {"base": BASE, "variant": made}
    rows[whose] = {**rows[whose], "flagged": True}
    assert sentences(rows["base"], rows["variant"]) == ()


def test_faster_but_broken_as_per_tensor_dynamic_int8_is():
    (said,) = sentences(BASE, variant(perplexity=63.0, bytes=162e6, **decode(31.0, 1.0)))
    assert said.startswith(
        "Smaller and faster but broken: perplexity 63 against 19 on the same text, +0.412 "
    )


def test_worse_is_not_broken():
    (said,) = sentences(BASE, variant(perplexity=21.0, bytes=76e6))
    assert said.startswith("Smaller but worse: perplexity 21 against 19")


def test_a_loss_within_the_tolerance_is_not_held_against_it():
    made = variant(perplexity=21.0, bytes=76e6)
    for low, said in ((0.025, 0), (0.045, 0), (0.06, 1)):
        assert len(sentences(BASE, {**made, "kl": low + 0.01, "kl_low": low, "kl_high": low + 0.02})) == said


def test_broken_needs_the_kinder_end_to_be_ruin_too():
    """Twice the perplexity, but the interval allows less."""
    (said,) = sentences(BASE, variant(perplexity=38.5, spread=0.02, bytes=76e6))
    assert "but worse" in said


def test_a_difference_whose_interval_holds_zero_is_none():
    assert sentences(BASE, variant(perplexity=21.0, spread=0.2, bytes=76e6)) == ()


def test_larger_than_its_base():
    (said,) = sentences({**BASE, "bytes": 269e6}, variant(bytes=538e6))
    assert said == "Larger than its base: 538 MB against 269 MB."


def test_masks_do_not_shrink_the_file():
    (said,) = sentences(BASE, variant(bytes=538e6 + 900, zero_share_of_matrices=0.5))
    assert (
        said
        == "No smaller than its base: 50% of the values in its matrices are zero, and zeros take the room of any number."
    )


def test_an_accuracy_that_fell_by_more_than_half_is_broken():
    fell = {"accuracy": 0.3, "delta_accuracy": -0.65, "delta_accuracy_low": -0.7, "delta_accuracy_high": -0.6}
    (said,) = sentences(BASE, {**BASE, "bytes": 76e6, **fell})
    assert said == "Smaller but broken: accuracy 0.3 against 0.95 on the same data, -0.65 (-0.7 … -0.6)."


def test_a_frame_is_judged_row_by_row_against_its_base():
    frame = pd.DataFrame(
        [
            {"variant": "base", "recipe": None, **BASE},
            {"variant": "slow", "recipe": "{}", **variant(bytes=76e6, **decode(12.0, 0.3))},
            {"variant": "fine", "recipe": "{}", **variant(bytes=76e6)},
        ]
    )
    assert list(verdicts(frame)) == ["slow"]
    assert verdicts(frame.iloc[1:]) == {}
