from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from core.catalog.engine import open_engine, parse_url
from core.catalog.store import Catalog
from core.errors import CatalogError
from tests.catalog.samples import base_of

ADD_ONE = """
import sys
from sqlalchemy import select, update
from core.catalog.store import Catalog
from core.catalog.tables import Meta
catalog = Catalog(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with catalog.write("jobs_revision") as session:
        value = session.execute(select(Meta.value).where(Meta.key == "revision")).scalar_one()
        session.execute(update(Meta).where(Meta.key == "revision").values(value=value + 1))
"""


def test_concurrent_read_then_write_loses_nothing(url: str) -> None:
    Catalog(url).close()
    each, writers = 100, 3
    processes = [subprocess.Popen([sys.executable, "-c", ADD_ONE, url, str(each)]) for _ in range(writers)]
    assert [process.wait(timeout=120) for process in processes] == [0] * writers
    assert Catalog(url).revision() == each * writers


def test_a_read_only_catalog_reads_and_refuses_to_write(url: str) -> None:
    base = base_of(Catalog(url))
    reader = Catalog(url, read_only=True)
    assert reader.variants() == [base]
    with pytest.raises(CatalogError, match=r"read-?only"):
        base_of(reader, "another")
    assert Catalog(url).variants() == [base]


def test_sqlite_connections_follow_the_rules(tmp_path: Path) -> None:
    engine = open_engine(parse_url(f"sqlite:///{tmp_path / 'x.sqlite'}"))
    expected = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1, "busy_timeout": 15000}
    with engine.connect() as connection:
        found = {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in expected}
    assert found == expected


def test_a_relative_path_means_the_same_file_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = base_of(catalog := Catalog("sqlite:///here.sqlite"))
    monkeypatch.chdir("/")
    assert Catalog(catalog.url, read_only=True).variants() == [base]
    assert catalog.folder == tmp_path


def test_foreign_keys_hold(catalog: Catalog) -> None:
    with pytest.raises(CatalogError, match=r"(?i)foreign key"), catalog.write() as session:
        session.execute(text("INSERT INTO variant_edge VALUES ('no', 'body', 0, 'source')"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "no catalog URL"),
        ("sqlite://", "in memory"),
        ("sqlite:////proc/nowhere/catalog.sqlite", "cannot be created"),
    ],
)
def test_bad_urls_are_refused_in_one_sentence(url: str, said: str) -> None:
    with pytest.raises(CatalogError, match=said) as caught:
        Catalog(url)
    assert "\n" not in str(caught.value)


def test_a_reader_of_a_missing_catalog_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="there is no catalog"):
        Catalog(f"sqlite:///{tmp_path / 'none.sqlite'}", read_only=True)
    assert not (tmp_path / "none.sqlite").exists()


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.sqlite").write_bytes(b"this is no database, only text" * 100)
    with pytest.raises(CatalogError, match="not a database") as caught:
        Catalog(f"sqlite:///{tmp_path / 'bad.sqlite'}")
    assert "\n" not in str(caught.value)


def test_the_password_of_a_server_is_not_told() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(CatalogError) as caught:
        Catalog("postgresql+psycopg://someone:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
