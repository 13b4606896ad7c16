"""Connections to the catalog's database: pragmas, who may write, and one transaction discipline for both kinds.

SQLite gets ``BEGIN IMMEDIATE`` for writers, because its default (a lock taken only at the first write) loses
updates in read-then-write transactions. Knows no table. SQLite's WAL does not work on network file systems.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from core import paths
from core.errors import CatalogError
from core.types import canonical_json, content_hash

BUSY_TIMEOUT_MS = 15_000
_PRAGMAS = (
    f"busy_timeout={BUSY_TIMEOUT_MS}",  # first: the next ones may already have to wait for another process
    "journal_mode=WAL",
    "synchronous=NORMAL",
    "foreign_keys=ON",
    "cache_size=-16384",  # 16 MB per connection, and no mmap: mapped pages would count as the dashboard's memory
)

_NEXT_MOVES = {
    "not a database": "give the path of a catalog, or of a file that does not exist yet",
    "already exists": "it is a database of something else: give the path of a catalog, or of a file that does not "
    "exist yet",
    "disk is full": "what was finished is kept: free some space and try again",
    "readonly": "give a path that may be written to",
    "database is locked": "another process is writing to it: try again",
}
"""What to do, by words of the driver's message."""
_LAST_MOVE = "check that it is reachable and not damaged"


def parse_url(url: str) -> URL:
    """Read a catalog URL, a SQLite file's path made absolute; raises ``CatalogError`` when it is no such URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise CatalogError(
            f"{url!r} is no catalog URL; give one like sqlite:////path/catalog.sqlite"
        ) from None
    if parsed.get_backend_name() != "sqlite":
        return parsed
    if parsed.database in (None, "", ":memory:"):
        raise CatalogError(
            "a catalog in memory cannot be shared with the workers; give sqlite:////path/to/file"
        )
    assert parsed.database is not None
    return parsed.set(database=str(Path(parsed.database).expanduser().absolute()))


def open_engine(url: URL, *, read_only: bool = False, rebuilding: bool = False) -> Engine:
    """An engine with this catalog's rules; ``rebuilding`` leaves foreign keys off, for Alembic's batch mode."""
    sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any] = {}
    if not sqlite and read_only:
        arguments["options"] = "-c default_transaction_read_only=on"
    try:
        engine = create_engine(
            url, connect_args=arguments, json_serializer=canonical_json, pool_pre_ping=not sqlite
        )
    except NoSuchModuleError:
        raise CatalogError(
            f"catalogs of {url.drivername} are not supported; give the path of a SQLite file, or a sqlite:/// or "
            "postgresql+psycopg:// URL"
        ) from None
    except ModuleNotFoundError as error:
        raise CatalogError(
            f"catalogs of {url.drivername} need the Python package {error.name}; install slimscope[postgres]"
        ) from None
    if sqlite:
        _configure_sqlite(engine, read_only=read_only, rebuilding=rebuilding)
    return engine


def _configure_sqlite(engine: Engine, *, read_only: bool, rebuilding: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if rebuilding:
            connection.execute("PRAGMA foreign_keys=OFF")
        if read_only:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """Turn the driver's errors into one ``CatalogError`` that names the catalog (its password hidden)."""
    try:
        yield
    except DBAPIError as error:
        where = url.render_as_string(hide_password=True)
        said = str(error.orig).splitlines()[0]
        move = next((move for words, move in _NEXT_MOVES.items() if words in said), _LAST_MOVE)
        raise CatalogError(f"catalog {where}: {said}; {move}") from error


def sqlite_file(url: URL) -> Path | None:
    """The database file of a SQLite URL; None for any other database."""
    if url.get_backend_name() != "sqlite":
        return None
    assert url.database is not None
    return Path(url.database)


def home(url: URL) -> tuple[Path, str]:
    """The folder of a catalog's artifacts, logs and scratch, and a name for the catalog among others there."""
    file = sqlite_file(url)
    if file is not None:
        return file.parent, file.stem
    return paths.data_dir(), f"catalog-{content_hash(url.render_as_string(hide_password=True))[:8]}"
