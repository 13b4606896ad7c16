"""Creates the catalog's schema and brings an old one up to date, in one transaction, after a backup.

Reads the version with plain SQL, so that opening a current catalog does not import Alembic.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import URL, Engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from core.catalog.engine import open_engine, parse_url, sqlite_file
from core.errors import CatalogError

MIGRATIONS = Path(__file__).parent / "migrations"


def versions(migrations: Path = MIGRATIONS) -> tuple[str, ...]:
    """Every schema version this code knows, oldest first: the numbers in front of the migration files."""
    return tuple(sorted(path.name[:4] for path in (migrations / "versions").glob("[0-9]*.py")))


def current_version(engine: Engine) -> str | None:
    """The schema version of the database; None for an empty one."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def bring_up_to_date(url: URL, engine: Engine, *, migrations: Path = MIGRATIONS) -> Path | None:
    """Create or upgrade the schema if needed; returns the backup's path when one was made.

    Raises ``CatalogError`` when the catalog was written by a newer Slimscope.
    """
    known = versions(migrations)
    current = current_version(engine)
    if current == known[-1]:
        return None
    _refuse_newer(current, known)
    backup = None if current is None else _back_up(url, engine, current)
    _upgrade(url, migrations)
    return backup


def prepare_apart(url: str) -> None:
    """Create or upgrade a catalog that needs it in a process of its own, which ends.

    For a process that lives long and must stay small: Alembic would stay in it for life, at 12 MB. What goes wrong is
    left for whoever opens the catalog next to tell.
    """
    if _is_current(url):
        return
    subprocess.run(
        [sys.executable, "-c", "from core.catalog.store import Catalog; Catalog()"],
        env={**os.environ, "SLIMSCOPE_CATALOG": url},
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _is_current(url: str) -> bool:
    parsed = parse_url(url)
    file = sqlite_file(parsed)
    if file is not None and not file.is_file():
        return False
    engine = open_engine(parsed, read_only=True)
    try:
        return current_version(engine) == versions()[-1]
    except SQLAlchemyError:
        return False
    finally:
        engine.dispose()


def refuse_stale(engine: Engine, *, migrations: Path = MIGRATIONS) -> None:
    """For readers, who may not upgrade: raises ``CatalogError`` unless the schema is exactly this code's."""
    known = versions(migrations)
    current = current_version(engine)
    _refuse_newer(current, known)
    if current != known[-1]:
        raise CatalogError(
            f"the catalog's schema is {current or 'missing'}, this code needs {known[-1]}; open it once for writing "
            "(any slimscope command that writes does) to bring it up to date"
        )


def _refuse_newer(current: str | None, known: tuple[str, ...]) -> None:
    if current is not None and current not in known:
        raise CatalogError(
            f"the catalog's schema is {current}, newer than this Slimscope knows ({known[-1]}); update Slimscope, or "
            "point SLIMSCOPE_CATALOG at another catalog"
        )


def _back_up(url: URL, engine: Engine, current: str) -> Path | None:
    file = sqlite_file(url)
    if file is None:
        return None  # a server's backups are its administrator's
    target = file.with_name(f"{file.stem}.schema-{current}.{datetime.now(UTC):%Y%m%dT%H%M%S}.backup.sqlite")
    connection = engine.raw_connection()  # not through SQLAlchemy, which would begin a transaction
    try:
        connection.cursor().execute("VACUUM INTO ?", (str(target),))
    finally:
        connection.close()
    return target


def _upgrade(url: URL, migrations: Path) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    engine = open_engine(url, rebuilding=True)
    try:
        # Two processes may come here at once: the write lock lets the second see the first's version table.
        with engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7546)")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()
