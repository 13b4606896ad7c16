"""Variants held against each other example by example, from what their evaluations kept: no model runs again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING

import pandas as pd

from core.errors import BadInput
from core.evaluate._paired import compare
from core.types import Run

if TYPE_CHECKING:
    from core.catalog.store import Catalog

EXAMPLES = "examples"
"""The frame of a run that has one row per example: ``example`` (its hash) and ``right``."""
DRAWS = 2000


def pairwise(catalog: Catalog, variants: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Each pair of variants on the examples that the newest evaluation of each measured.

    Columns: a, b (names), a_id, b_id, n, accuracy_a, accuracy_b, only_a, only_b, difference, low, high (95 %, bootstrap
    over examples, paired), p_value (exact McNemar, for this pair alone: with many pairs some are small by chance).
    Raises ``BadInput`` where a variant has no such evaluation, or two measured no example in common.
    """
    if len(set(variants)) < 2:
        raise BadInput("name at least two variants to compare; `slimscope compare` lists them")
    answers = {id_: _answers(catalog, id_) for id_ in dict.fromkeys(variants)}
    rows = []
    for a, b in combinations(answers, 2):
        both = answers[a].add_suffix("_a").join(answers[b].add_suffix("_b"), how="inner")
        names = catalog.variant(a).name, catalog.variant(b).name
        if both.empty:
            raise BadInput(
                f"{names[0]} ({a}) and {names[1]} ({b}) were measured on no example in common; evaluate both on the same rows"
            )
        found = compare(both["right_a"].to_numpy(), both["right_b"].to_numpy(), draws=DRAWS, seed=seed)
        rows.append({"a": names[0], "b": names[1], "a_id": a, "b_id": b, **asdict(found)})
    return pd.DataFrame(rows)


def _answers(catalog: Catalog, variant_id: str) -> pd.DataFrame:
    """``right`` by example, of the newest evaluation that kept examples; an example that is there twice counts once."""
    run = next((run for run in catalog.runs(variant_id) if _keeps_examples(run)), None)
    if run is None:
        raise BadInput(
            f"{catalog.variant(variant_id).name} ({variant_id}) has no evaluation that kept its answers; run "
            f"`slimscope evaluate variant:{variant_id} --documents FILE` with labelled texts"
        )
    frame = catalog.frame(run.id, EXAMPLES)[["example", "right"]]
    return frame.drop_duplicates("example").set_index("example")


def _keeps_examples(run: Run) -> bool:
    return run.kind == "evaluate" and run.conditions.get("method") == "text_classification"
