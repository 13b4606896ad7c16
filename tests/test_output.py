"""Records as JSON: what is missing or not finite is null, never a word or a wrong number."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from core.output import plain


def test_missing_and_non_finite_values_are_null() -> None:
    frame = pd.DataFrame({"layer": pd.array([0, None], dtype="Int64"), "at": [pd.Timestamp(0), pd.NaT]})
    assert [row["layer"] for row in plain(frame)] == [0, None]
    assert plain(frame)[1]["at"] is None
    assert plain({"a": float("nan"), "b": np.float32("inf"), "c": (np.int64(3), True)}) == {
        "a": None,
        "b": None,
        "c": [3, True],
    }
    json.dumps(plain(frame), allow_nan=False)
