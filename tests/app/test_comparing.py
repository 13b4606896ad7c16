"""Two results side by side: the scale they share, and what may be subtracted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from app.comparing import difference, metric_table, shared_limits
from core.types import Metric, Result, View

HEAT = View("heatmap", x="position", y="layer", color="kl", frame="main", title="KL", text="top1")
STRIP = View("tokens", x="position", color="bits", text="token", frame="tokens", title="Surprisal")


def result(values: list[float], *, tokens: list[str] | None = None, layers: int = 2) -> Result:
    n = len(values) // layers
    tokens = tokens or [f"t{i}" for i in range(n)]
    main = pd.DataFrame(
        {
            "layer": np.repeat(range(layers), n),
            "position": list(range(n)) * layers,
            "token": tokens * layers,
            "kl": values,
            "top1": ["x"] * len(values),
        }
    )
    strip = pd.DataFrame({"position": range(n), "token": tokens, "bits": values[:n]})
    metrics = (Metric("kl", float(np.mean(values)), "nats"),)
    return Result({"main": main, "tokens": strip}, (HEAT, STRIP), metrics)


def test_the_difference_is_second_minus_first_cell_by_cell():
    made = difference(result([1.0, 2.0, 3.0, 4.0]), result([1.5, 2.0, 2.0, 4.0]))
    heat, strip = made.result.views
    assert (heat.kind, heat.midpoint, heat.text) == ("heatmap", 0.0, None)
    assert made.result.frames[heat.frame]["kl"].tolist() == [0.5, 0.0, -1.0, 0.0]
    assert made.result.frames[heat.frame]["first_kl"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert made.result.frames[strip.frame]["bits"].tolist() == [0.5, 0.0]
    assert made.words == ()


def test_cells_are_matched_by_key_not_by_row():
    second = result([1.0, 2.0, 3.0, 4.0])
    shuffled = second.frames["main"].sample(frac=1, random_state=3)
    moved = Result({**second.frames, "main": shuffled}, second.views)
    made = difference(result([1.0, 2.0, 3.0, 4.0]), moved)
    assert made.result.frames["main_layer_position"]["kl"].abs().max() == 0


def test_different_tokens_are_not_subtracted_but_said():
    made = difference(result([1.0, 2.0, 3.0, 4.0]), result([1.0, 2.0, 3.0, 4.0], tokens=["a", "b"]))
    assert made.result.views == ()
    assert len(made.words) == 1
    assert "different tokens (2 and 2)" in made.words[0]


def test_only_matching_cells_are_compared_and_that_is_said():
    made = difference(result([1.0] * 4), result([2.0] * 6, layers=3))
    assert len(made.result.frames["main_layer_position"]) == 4
    assert any("Only the 4 cells" in words for words in made.words)


def test_a_result_without_the_frame_has_no_difference():
    other = Result({"else": pd.DataFrame({"a": [1]})}, (View("table", "a", frame="else"),))
    assert difference(result([1.0, 2.0]), other).result.views == ()


def test_both_share_the_ends_of_every_scale():
    limits = shared_limits(result([1.0, 2.0, 3.0, 9.0]), result([0.5, 2.0, 3.0, 4.0]))
    assert limits["main", "kl"] == (0.5, 9.0)
    assert limits["tokens", "bits"] == (0.5, 2.0)


def test_metrics_of_both_stand_in_one_row():
    (row,) = metric_table(result([1.0, 1.0]), result([3.0, 3.0])).to_dict("records")
    assert row == {"metric": "kl", "unit": "nats", "first": 1.0, "second": 3.0, "difference": 2.0}


@pytest.mark.parametrize("log", [False, True])
def test_shared_levels_mean_equal_numbers(log):
    from base64 import b64decode

    from app.components._quantize import to_levels

    one = to_levels(np.array([1.0, 4.0]), limits=(1.0, 16.0), log=log)
    other = to_levels(np.array([4.0, 16.0]), limits=(1.0, 16.0), log=log)
    assert (one.low, one.high) == pytest.approx((1.0, 16.0)) == (other.low, other.high)
    assert len(b64decode(one.encoded)) == 2
    assert b64decode(one.encoded)[1] == b64decode(other.encoded)[0]
