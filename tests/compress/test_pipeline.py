"""A recipe of several steps: what its table says of each tensor."""

from __future__ import annotations

import pandas as pd

from core.compress._pipeline import _whole_recipe


def table(touched: list[bool], error: list[float], nbytes: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "module": ["norm", "linear", "router"],
            "touched": touched,
            "relative_error": error,
            "sqnr_db": pd.array([None if e == 0 else 10.0 for e in error], dtype="Float64"),
            "parameters_before": [10, 100, 1],
            "parameters": [10, 100, 1],
            "parameters_touched": [n if t else 0 for n, t in zip([10, 100, 1], touched, strict=True)],
            "bytes_before": nbytes,
            "reason": ["" if t else "kept" for t in touched],
        }
    )


def test_an_error_is_that_of_the_last_step_that_touched_the_tensor() -> None:
    cast = table([True, True, False], [0.001, 0.002, 0.0], [40, 400, 4])
    rounded = table([False, True, False], [0.0, 0.1, 0.0], [20, 200, 4])
    whole = _whole_recipe([cast, rounded]).set_index("module")
    assert whole["relative_error"].to_dict() == {"norm": 0.001, "linear": 0.1, "router": 0.0}
    assert whole["touched"].to_dict() == {"norm": True, "linear": True, "router": False}
    assert whole["bytes_before"].to_dict() == {"norm": 40, "linear": 400, "router": 4}
    assert whole["reason"].to_dict() == {"norm": "", "linear": "", "router": "kept"}


def test_a_tensor_touched_twice_counts_once_and_a_removed_one_is_remembered() -> None:
    pruned = table([False, True, True], [0.0, 0.0, 0.0], [40, 400, 4])
    pruned["parameters"] = [10, 75, 0]  # the router is gone
    pruned["parameters_touched"] = [0, 25, 1]
    rounded = table([False, True, False], [0.0, 0.1, 0.0], [40, 300, 0])
    rounded = rounded[rounded["module"] != "router"]
    rounded["parameters_before"] = rounded["parameters"] = [10, 75]
    rounded["parameters_touched"] = [0, 75]
    whole = _whole_recipe([pruned, rounded]).set_index("module")
    assert whole["parameters_touched"].to_dict() == {"norm": 0, "linear": 100, "router": 1}
    assert whole["parameters_before"].to_dict() == {"norm": 10, "linear": 100, "router": 1}
    assert whole["parameters"].to_dict() == {"norm": 10, "linear": 75, "router": 0}
    assert whole["bytes_before"].to_dict() == {"norm": 40, "linear": 400, "router": 4}
