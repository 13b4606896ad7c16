"""Says in one line whether this run tests catalog and queue on PostgreSQL too."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine

from tests.databases import SERVER


@pytest.mark.postgres
def test_postgres_is_tested_where_there_is_one() -> None:
    if SERVER is None:
        pytest.skip("SLIMSCOPE_TEST_POSTGRES names no server: catalog and queue are tested on SQLite only")
    with create_engine(SERVER).connect() as connection:
        assert connection.dialect.name == "postgresql"
