from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from core.catalog.engine import open_engine, parse_url
from core.catalog.migrate import MIGRATIONS, bring_up_to_date, current_version, prepare_apart, versions
from core.catalog.queries import tradeoff_frame
from core.catalog.store import Catalog
from core.catalog.tables import Base
from core.errors import CatalogError
from core.jobs.queue import Queue
from tests.catalog.samples import kl, run_of

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("catalog_v*.sqlite"))

LATEST = versions()[-1]
NEXT = f"""
import sqlalchemy as sa
from alembic import op
from core.catalog.immutable import freeze
revision, down_revision = "9000", "{LATEST}"
def upgrade():
    with op.batch_alter_table("run", recreate="always") as batch:
        batch.add_column(sa.Column("remark", sa.Text(), nullable=False, server_default="none"))
    freeze(op.get_bind(), ["run"])
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A catalog file of the first schema."""
    return Path(shutil.copy(FIXTURES[0], tmp_path / "catalog.sqlite"))


@pytest.fixture
def next_migrations(tmp_path: Path) -> Path:
    """The migrations as they will be when there is a next schema, which rebuilds an immutable table."""
    folder = Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))
    (folder / "versions" / "9000_next.py").write_text(NEXT)
    return folder


def test_every_schema_version_has_its_fixture() -> None:
    assert [int(path.stem.removeprefix("catalog_v")) for path in FIXTURES] == [int(v) for v in versions()]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_every_old_catalog_opens_with_all_it_held(fixture: Path, tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{shutil.copy(fixture, tmp_path / 'catalog.sqlite')}")
    base, variant = catalog.variants()
    assert (base.name, variant.id, variant.parents) == ("tiny", "v1", (base.id,))
    assert [run.status for run in catalog.runs("v1")] == ["flagged", "valid"]
    assert tradeoff_frame(catalog, base.id)["kl"].tolist() == [0.0, 0.25]
    assert len(catalog.layer_errors("v1")) == 2
    assert [job.kind for job in Queue(catalog).jobs()] == ["evaluate", "compress"]
    catalog.record_run(run_of(variant, kl(0.5), minute=9))
    assert tradeoff_frame(catalog, base.id)["kl"].tolist() == [0.0, 0.5]


def test_the_migrations_make_exactly_the_tables_of_the_code(url: str) -> None:
    Catalog(url).close()
    with open_engine(parse_url(url)).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_versions_are_those_alembic_sees() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [versions()[-1]]
    assert sorted(r.revision for r in script.walk_revisions()) == list(versions())


def test_a_newer_catalog_is_refused_unchanged(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for read_only in (False, True):
        with pytest.raises(CatalogError, match="9999, newer than this Slimscope knows"):
            Catalog(f"sqlite:///{old}", read_only=read_only)


def test_an_upgrade_backs_up_keeps_everything_and_freezes_again(old: Path, next_migrations: Path) -> None:
    url = parse_url(f"sqlite:///{old}")
    engine = open_engine(url)
    backup = bring_up_to_date(url, engine, migrations=next_migrations)
    assert current_version(engine) == "9000"
    with engine.connect() as connection:
        assert connection.execute(text("SELECT DISTINCT remark, count(*) FROM run")).one() == ("none", 3)
        assert connection.execute(text("SELECT count(*) FROM measurement")).scalar() == 3
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        with pytest.raises(Exception, match="run rows are immutable"):
            connection.execute(text("DELETE FROM run"))
    assert backup is not None
    assert current_version(open_engine(parse_url(f"sqlite:///{backup}"))) == "0001"
    assert bring_up_to_date(url, engine, migrations=next_migrations) is None, "nothing is left to do"


def test_a_failing_upgrade_changes_nothing(old: Path, next_migrations: Path) -> None:
    (next_migrations / "versions" / "9000_next.py").write_text(NEXT + "    raise RuntimeError('power cut')\n")
    Catalog(f"sqlite:///{old}").close()  # from here on it is in WAL mode
    before = old.read_bytes()
    url = parse_url(f"sqlite:///{old}")
    with pytest.raises(RuntimeError, match="power cut"):
        bring_up_to_date(url, open_engine(url), migrations=next_migrations)
    assert old.read_bytes() == before
    assert Catalog(str(url)).variants()


def test_a_reader_does_not_upgrade(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("DROP TABLE alembic_version")
    with pytest.raises(CatalogError, match="open it once for writing"):
        Catalog(f"sqlite:///{old}", read_only=True)


def test_two_processes_may_create_one_catalog_at_once(url: str) -> None:
    code = "import sys; from core.catalog.store import Catalog; print(Catalog(sys.argv[1]).revision())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == [b"0\n"] * 3


def test_a_catalog_is_prepared_without_alembic_in_this_process(tmp_path: Path) -> None:
    """In a fresh interpreter: the file is made and current afterwards, and Alembic was never imported there."""
    url = f"sqlite:///{tmp_path / 'new' / 'catalog.sqlite'}"
    script = f"""
import sys
from core.catalog.migrate import prepare_apart
from core.catalog.store import Catalog
prepare_apart({url!r})
Catalog({url!r}).revision()
sys.exit("alembic" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    prepare_apart(url)
    assert current_version(open_engine(parse_url(url))) == versions()[-1]


def test_what_cannot_be_prepared_is_told_by_who_opens_it(tmp_path: Path) -> None:
    broken = tmp_path / "catalog.sqlite"
    broken.write_bytes(b"this is no database, and it is longer than the header of one would be" * 4)
    prepare_apart(f"sqlite:///{broken}")
    with pytest.raises(CatalogError):
        Catalog(f"sqlite:///{broken}")
