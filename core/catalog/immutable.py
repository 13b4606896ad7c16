"""Triggers that make the database itself refuse to change or delete what was measured.

A migration calls ``freeze`` after it created a table, and again after a batch rebuild of it (SQLite drops a
table's triggers with the table).
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

_SQLITE = """CREATE TRIGGER immutable_{table}_{action} BEFORE {action} ON {table}
BEGIN SELECT RAISE(ABORT, '{table} rows are immutable: record a new run instead'); END"""

_POSTGRES_FUNCTION = """CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION '% rows are immutable: record a new run instead', TG_TABLE_NAME
USING ERRCODE = 'integrity_constraint_violation'; END $$"""
_POSTGRES = """CREATE TRIGGER immutable_{table}_{action} BEFORE {action} ON {table}
FOR EACH ROW EXECUTE FUNCTION refuse_change()"""


def freeze(connection: Connection, tables: Iterable[str]) -> None:
    """Refuse UPDATE and DELETE on these tables from now on."""
    sqlite = connection.dialect.name == "sqlite"
    if not sqlite:
        connection.exec_driver_sql(_POSTGRES_FUNCTION.replace("%", "%%"))
    for table in tables:
        for action in ("update", "delete"):
            connection.exec_driver_sql((_SQLITE if sqlite else _POSTGRES).format(table=table, action=action))
