"""One opened catalog database: transactions, the two revision counters, and where its files are.

A write transaction moves its counter first: on PostgreSQL that row is the lock that ``BEGIN IMMEDIATE`` is on
SQLite, so read-then-write is safe on both. Knows no table but ``meta``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.catalog.engine import explained, home, open_engine, parse_url, sqlite_file
from core.catalog.migrate import bring_up_to_date, refuse_stale
from core.catalog.tables import Meta
from core.errors import CatalogError

Counter = Literal["revision", "jobs_revision"]


class Database:
    """The database of one catalog, created or brought up to date when opened for writing."""

    def __init__(self, url: str, *, read_only: bool) -> None:
        """Open it; raises ``CatalogError`` when it is missing (reader), newer than the code, or unreachable."""
        self._parsed = parse_url(url)
        self.url = self._parsed.render_as_string(hide_password=False)
        """Complete enough to be handed to another process, in another folder."""
        self.folder, self.name = home(self._parsed)
        """Where artifacts, job logs and scratch folders are, and the catalog's name among others there."""
        file = sqlite_file(self._parsed)
        if file is not None and file.is_dir():
            raise CatalogError(
                f"{file} is a folder; give the path of a SQLite file, e.g. {file / 'catalog.sqlite'}"
            )
        if read_only and file is not None and not file.exists():
            raise CatalogError(f"there is no catalog at {file}; any slimscope command that writes makes one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatalogError(
                f"{self.folder} cannot be created ({error.strerror}); choose another place by SLIMSCOPE_CATALOG"
            ) from None
        with explained(self._parsed):
            self._engine = open_engine(self._parsed, read_only=read_only)
            if read_only:
                refuse_stale(self._engine)
            else:
                bring_up_to_date(self._parsed, self._engine)
        self._writer = self._engine.execution_options(writes=True)
        sqlite = file is not None
        # PostgreSQL would show each statement of a read its own moment; SQLite shows a transaction one.
        self._reader = (
            self._engine if sqlite else self._engine.execution_options(isolation_level="REPEATABLE READ")
        )

    def close(self) -> None:
        """Give the connections back; the catalog opens new ones when used again."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view for reading."""
        with explained(self._parsed), Session(self._reader) as session:
            yield session

    @contextmanager
    def write(self, counter: Counter | None = "revision") -> Iterator[Session]:
        """One write transaction, committed at the end; ``counter`` is what it moves on."""
        with explained(self._parsed), Session(self._writer) as session, session.begin():
            if counter is not None:
                session.execute(update(Meta).where(Meta.key == counter).values(value=Meta.value + 1))
            yield session

    def revision(self) -> int:
        """Moves on with every change of variants, runs or artifacts: the key for caches of what was read."""
        return self._count("revision")

    def jobs_revision(self) -> int:
        """Moves on with every change of the queue (progress included, heartbeats not)."""
        return self._count("jobs_revision")

    def _count(self, counter: Counter) -> int:
        with self.read() as session:
            return session.execute(select(Meta.value).where(Meta.key == counter)).scalar_one()
