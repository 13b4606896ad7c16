from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from core.catalog.queries import MEASURES, bases, lineage, relatives, tradeoff_frame, variant_detail
from core.catalog.store import Catalog
from core.errors import BadInput
from core.types import Measurement, Variant
from tests.catalog.samples import LAYERS, base_of, kl, run_of, variant_of


def test_one_row_per_variant_with_every_measure(catalog: Catalog, base: Variant) -> None:
    other = base_of(catalog, "other")
    for id_ in ("v1", "v2", "v3"):
        catalog.add_variant(variant_of(base, id_, proven=id_ != "v3"))
    catalog.hide_variant("v2")
    catalog.add_variant(variant_of(other, "w1"))
    catalog.record_run(
        run_of(
            catalog.variant("v1"),
            kl(0.1),
            Measurement("ttft_ms", 12.0, "ms", "lower"),
            Measurement("zeal", 7.0, "", "higher"),
        )
    )
    catalog.record_run(run_of(catalog.variant("v3"), kl(0.2), status="flagged"))
    catalog.record_run(run_of(catalog.variant("v2"), kl(0.3)))

    frame = tradeoff_frame(catalog, base.id)
    assert frame["variant"].tolist() == [base.id, "v1", "v3"]
    assert frame["method"].tolist() == ["base", "rtn", "rtn"]
    assert frame["recipe"].isna().tolist() == [True, False, False]
    assert frame["proven"].tolist() == [True, True, False]
    assert frame["flagged"].tolist() == [False, False, True]
    row = frame.iloc[1]
    assert (row["kl"], row["kl_low"], row["kl_high"]) == pytest.approx((0.1, 0.09, 0.11))
    assert row["ttft_ms"] == 12.0
    assert math.isnan(row["ttft_ms_low"])
    assert row["zeal"] == 7.0
    for name in MEASURES:
        for column in (name, f"{name}_low", f"{name}_high"):
            assert frame[column].dtype == "float64"
    assert str(frame["created_at"].dtype).endswith("UTC]")


def test_an_unmeasured_base_gives_one_row_and_an_unknown_one_none(catalog: Catalog, base: Variant) -> None:
    assert len(tradeoff_frame(catalog, base.id)) == 1
    empty = tradeoff_frame(catalog, "nobody")
    assert empty.empty
    assert set(MEASURES) <= set(empty.columns)


def test_the_frame_says_what_the_runs_say(catalog: Catalog, base: Variant) -> None:
    """Against the slow, obvious way: walk every run of every variant."""
    for i in range(12):
        variant = catalog.add_variant(variant_of(base, f"v{i:02}"))
        for j in range(4):
            status = "flagged" if (i + j) % 3 == 0 else "valid"
            catalog.record_run(run_of(variant, kl(i + j / 10), minute=(7 * j + i) % 5, status=status))
    expected: dict[str, float] = {}
    for variant in catalog.variants(base.id):
        runs = [run for run in catalog.runs(variant.id) if run.measurements]
        valid = [run for run in runs if run.status == "valid"] or runs
        if valid:
            latest = max(run.ended_at for run in valid)
            expected[variant.id] = {  # several of one minute: any may stand
                run.measurements[0].value for run in valid if run.ended_at == latest
            }
    found = tradeoff_frame(catalog, base.id).set_index("variant")["kl"].dropna()
    assert found.index.tolist() == list(expected)
    assert all(found[id_] in values for id_, values in expected.items())


def test_lineage_of_a_distilled_variant_names_each_ancestor_once(catalog: Catalog, base: Variant) -> None:
    pruned = catalog.add_variant(variant_of(base, "pruned"))
    student = catalog.add_variant(replace(variant_of(base, "student"), parents=(pruned.id, base.id)))
    assert student.parents == ("pruned", base.id)
    assert [v.id for v in lineage(catalog, "student")] == ["pruned", base.id]


def test_relatives_are_the_visible_variants_of_one_base_the_base_first(
    catalog: Catalog, base: Variant
) -> None:
    stranger = base_of(catalog, "other")
    kept = catalog.add_variant(variant_of(base, "c" * 12))
    hidden = catalog.add_variant(variant_of(base, "d" * 12))
    catalog.hide_variant(hidden.id)
    assert list(relatives(catalog, base.id).items()) == [(base.source, base.name), (kept.source, kept.name)]
    assert list(relatives(catalog, stranger.id)) == [stranger.source]


def test_detail_holds_runs_layers_and_frames(catalog: Catalog, base: Variant) -> None:
    variant = catalog.add_variant(variant_of(base, "v1"))
    first = catalog.record_run(run_of(variant, minute=1), layer_stats=LAYERS)
    second = catalog.record_run(run_of(variant, kl(0.1), minute=2))
    catalog.put_frame(second.id, "documents", pd.DataFrame({"nats": [1.0]}))
    detail = variant_detail(catalog, "v1")
    assert detail.variant == variant
    assert detail.lineage == (base,)
    assert detail.runs == (second, first)
    assert detail.frames == ((second.id, "documents"),)
    assert len(detail.layer_errors) == len(LAYERS)
    with pytest.raises(BadInput):
        variant_detail(catalog, "nobody")


def test_bases_are_listed_by_their_newest_work(catalog: Catalog, base: Variant) -> None:
    base_of(catalog, "other")
    catalog.add_variant(variant_of(base, "v1"))
    catalog.add_variant(variant_of(base, "v2"))
    catalog.hide_variant("v2")
    found = bases(catalog)
    assert found["name"].tolist() == ["tiny", "other"]
    assert found["variants"].tolist() == [1, 0]
