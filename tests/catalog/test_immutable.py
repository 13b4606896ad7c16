from __future__ import annotations

import pytest
from sqlalchemy import text

from core.catalog.store import Catalog
from core.errors import CatalogError
from core.types import Variant
from tests.catalog.samples import LAYERS, kl, run_of

FROZEN = {"run": "status = 'flagged'", "measurement": "value = 0", "layer_stat": "relative_error = 0"}


@pytest.fixture
def measured(catalog: Catalog, base: Variant) -> Catalog:
    catalog.record_run(run_of(base, kl(0.1)), layer_stats=LAYERS)
    return catalog


@pytest.mark.parametrize("table", FROZEN)
def test_the_database_refuses_to_change_what_was_measured(measured: Catalog, table: str) -> None:
    for statement in (f"UPDATE {table} SET {FROZEN[table]}", f"DELETE FROM {table}"):
        with (
            pytest.raises(CatalogError, match=f"{table} rows are immutable"),
            measured.write() as session,
        ):
            session.execute(text(statement))


def test_other_tables_may_be_changed(measured: Catalog) -> None:
    with measured.write() as session:
        session.execute(text("UPDATE variant SET name = 'renamed'"))
    assert measured.variants()[0].name == "renamed"
