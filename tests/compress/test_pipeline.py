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
