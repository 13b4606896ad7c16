"""Fresh catalogs for tests: SQLite always, PostgreSQL when ``SLIMSCOPE_TEST_POSTGRES`` names a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, make_url

SERVER = os.environ.get("SLIMSCOPE_TEST_POSTGRES")
KINDS = ["sqlite", *([pytest.param("postgres", marks=pytest.mark.postgres)] if SERVER else [])]
"""PostgreSQL only where there is one; ``test_postgres_is_tested_where_there_is_one`` says when there is none."""


@contextmanager
def fresh_url(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database of that kind; a PostgreSQL one is dropped afterwards."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'catalog.sqlite'}"
        return
    assert SERVER, "a PostgreSQL test without a server"
    name = f"slimscope_test_{uuid4().hex[:12]}"
    admin = create_engine(SERVER, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        admin.dispose()
