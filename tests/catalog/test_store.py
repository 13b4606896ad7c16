from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from core.catalog.purge import purge
from core.catalog.store import Catalog
from core.catalog.tables import RecipeRow
from core.errors import BadInput, CatalogError
from core.types import Measurement, Variant
from tests.catalog.samples import LAYERS, base_of, folder_of, kl, run_of, variant_of


def headline(catalog: Catalog, variant: Variant, name: str = "kl") -> float:
    from core.catalog.queries import tradeoff_frame

    frame = tradeoff_frame(catalog, variant.base_id).set_index("variant")
    return float(frame.loc[variant.id, name])


def test_what_goes_in_comes_out(catalog: Catalog, base: Variant) -> None:
    variant = catalog.add_variant(variant_of(base, "v1"))
    assert catalog.variant("v1") == variant
    assert variant.parents == (base.id,)
    assert variant.created_at is not None
    assert variant.created_at.tzinfo is not None
    run = catalog.record_run(run_of(variant, kl(0.1), Measurement("flips", 3.0, "", "lower")))
    assert catalog.runs("v1") == [run]
    assert catalog.variants() == [base, variant]
    assert catalog.variants(base.id) == [base, variant]


def test_the_same_base_is_entered_once(catalog: Catalog, base: Variant) -> None:
    assert base_of(catalog) == base
    assert catalog.variants() == [base]


def test_recipe_is_kept_under_the_hash_of_its_canonical_json(catalog: Catalog, base: Variant) -> None:
    variant = catalog.add_variant(variant_of(base, "v1"))
    assert variant.recipe is not None
    with catalog.read() as session:
        row = session.get(RecipeRow, hashlib.sha256(variant.recipe.encode()).hexdigest())
        assert row is not None
        assert (row.canonical, row.method) == (variant.recipe, "rtn")


def test_an_unproven_variant_is_renewed_and_a_proven_one_is_not(
    catalog: Catalog, base: Variant, tmp_path: Path
) -> None:
    first = catalog.put_artifact(folder_of(tmp_path, "a", w=b"1"))
    second = catalog.put_artifact(folder_of(tmp_path, "b", w=b"2"))
    catalog.add_variant(variant_of(base, "v1", artifact=first, proven=False))
    assert catalog.add_variant(variant_of(base, "v1", artifact=second)).artifact == second
    assert catalog.add_variant(variant_of(base, "v1", artifact=first)).artifact == second


def test_unknown_variant_lists_close_ids(catalog: Catalog, base: Variant) -> None:
    catalog.add_variant(variant_of(base, "abcdef123456"))
    with pytest.raises(BadInput, match="abcdef123456"):
        catalog.variant("abcdef")
    with pytest.raises(BadInput, match="slimscope compare"):
        catalog.variant("zzz")


def test_a_number_that_is_none_is_refused_and_nothing_is_stored(catalog: Catalog, base: Variant) -> None:
    with pytest.raises(BadInput, match="kl is nan"):
        catalog.record_run(run_of(base, kl(0.1), kl(float("nan"))))
    assert catalog.runs(base.id) == []


def test_a_failing_write_leaves_nothing_behind(catalog: Catalog, base: Variant) -> None:
    run = catalog.record_run(run_of(base, kl(0.1)))
    before = catalog.revision()
    with pytest.raises(CatalogError):
        catalog.record_run(run)  # the same id again
    assert catalog.revision() == before
    assert headline(catalog, base) == 0.1


def test_headline_is_the_latest_valid_run_else_the_latest_flagged(catalog: Catalog, base: Variant) -> None:
    catalog.record_run(run_of(base, kl(0.5), minute=5, status="flagged"))
    assert headline(catalog, base) == 0.5
    catalog.record_run(run_of(base, kl(0.1), minute=1))
    assert headline(catalog, base) == 0.1, "a valid run, though older, stands before a flagged one"
    catalog.record_run(run_of(base, kl(0.6), minute=9, status="flagged"))
    assert headline(catalog, base) == 0.1
    catalog.record_run(run_of(base, kl(0.2), minute=3))
    assert headline(catalog, base) == 0.2, "the later valid run stands, although its number is worse"
    catalog.record_run(run_of(base, kl(0.3), minute=2))
    assert headline(catalog, base) == 0.2, "a run recorded late but measured earlier does not"


def test_the_first_measurement_of_a_name_is_the_headline(catalog: Catalog, base: Variant) -> None:
    catalog.record_run(run_of(base, kl(0.1), kl(0.9)))
    assert headline(catalog, base) == 0.1
    assert [m.value for m in catalog.runs(base.id)[0].measurements] == [0.1, 0.9]


def test_revision_moves_with_every_write_and_with_nothing_else(catalog: Catalog, base: Variant) -> None:
    start, jobs = catalog.revision(), catalog.jobs_revision()
    catalog.runs(base.id)
    assert catalog.revision() == start
    catalog.record_run(run_of(base, kl(0.1)))
    assert catalog.revision() == start + 1
    assert catalog.jobs_revision() == jobs


def test_layer_statistics_come_from_the_latest_run_that_has_them(catalog: Catalog, base: Variant) -> None:
    assert catalog.layer_errors(base.id).empty
    catalog.record_run(run_of(base, minute=1), layer_stats=LAYERS.assign(relative_error=0.5))
    catalog.record_run(run_of(base, minute=2), layer_stats=LAYERS)
    catalog.record_run(run_of(base, kl(0.1), minute=3))
    found = catalog.layer_errors(base.id)
    pd.testing.assert_frame_equal(found, LAYERS, check_dtype=False)
    with pytest.raises(BadInput, match="lack \\['bits'\\]"):
        catalog.record_run(run_of(base, minute=4), layer_stats=LAYERS.drop(columns="bits"))


def test_frames_are_kept_as_files(catalog: Catalog, base: Variant) -> None:
    run = catalog.record_run(run_of(base, kl(0.1)))
    frame = pd.DataFrame({"document": ["a", "b"], "nats": [1.5, 2.5]})
    catalog.put_frame(run.id, "documents", frame)
    pd.testing.assert_frame_equal(catalog.frame(run.id, "documents"), frame)
    with pytest.raises(BadInput, match="documents"):
        catalog.frame(run.id, "positions")


def test_hidden_variants_leave_the_lists_and_only_purge_deletes(
    catalog: Catalog, base: Variant, tmp_path: Path
) -> None:
    shared = catalog.put_artifact(folder_of(tmp_path, "a", w=b"shared"))
    own = catalog.put_artifact(folder_of(tmp_path, "b", w=b"own"))
    for id_, artifact in (("v1", shared), ("v2", shared), ("v3", own)):
        catalog.add_variant(variant_of(base, id_, artifact=artifact))
    run = catalog.record_run(run_of(catalog.variant("v3"), kl(0.1)))
    catalog.hide_variant("v2")
    catalog.hide_variant("v3")
    assert [v.id for v in catalog.variants()] == [base.id, "v1"]
    assert {v.id for v in catalog.variants(hidden=True)} == {base.id, "v1", "v2", "v3"}

    plan = purge(catalog, dry_run=True)
    assert (plan.artifacts, plan.bytes) == ((own,), 3)
    assert catalog.variant_folder("v3").is_dir()
    assert purge(catalog, dry_run=False).artifacts == (own,)
    with pytest.raises(BadInput, match="has no files"):
        catalog.variant_folder("v3")
    assert catalog.variant_folder("v1").is_dir(), "its files are shared with a visible variant"
    assert catalog.runs("v3") == [run]
    assert not (catalog.folder / "artifacts" / own).exists()
