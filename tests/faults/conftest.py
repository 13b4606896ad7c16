from __future__ import annotations

import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from core.catalog.store import Catalog
from core.recipe import Recipe
from core.types import Run
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
RTN = {"steps": [{"method": "rtn", "settings": {"bits": 4, "group_size": "32"}}]}
EVALUATION = {"max_documents": 8, "max_document_tokens": 64}
SPEED = {"tier": "rapid", "prompt_tokens": 16, "new_tokens": 4}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the numeric path is chosen once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts background jobs deaf to Ctrl-C, and so would be every process that a test here starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test's own, also for every process it starts."""
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path))
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder("smollm", tmp_path_factory.mktemp("model") / "smollm"))


@pytest.fixture
def fresh(place: Path) -> Iterator[Catalog]:
    catalog = Catalog()
    yield catalog
    catalog.close()


def family(pid: int) -> list[psutil.Process]:
    """A process and everything it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def command_line(process: psutil.Process) -> str:
    """What a process was started with; nothing if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def ended(process: psutil.Process) -> bool:
    """Whether this very process runs no more (one that only waits to be reaped does not)."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def half_written(catalog: Catalog) -> list[Path]:
    return list(catalog.artifacts.root.glob(".incoming-*"))


def assert_whole(catalog: Catalog) -> None:
    """The database is sound, and everything it lists is there, byte for byte."""
    from core.catalog.artifacts import read_contents

    with sqlite3.connect(catalog.folder / "catalog.sqlite") as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        listed = [row[0] for row in raw.execute("SELECT hash FROM artifact")]
    for hash_ in listed:
        assert read_contents(catalog.artifact_folder(hash_)).hash == hash_
    for variant in catalog.variants():
        kinds = [run.kind for run in catalog.runs(variant.id)]
        assert variant.recipe is None or variant.proven == ("proof" in kinds)
        for run in catalog.runs(variant.id):
            if run.kind == "evaluate":
                assert len(catalog.frame(run.id, "documents")) == EVALUATION["max_documents"]


def measured(run: Run) -> dict[str, object]:
    """What an evaluation found, without when."""
    return {m.name: (m.value, m.low, m.high, m.n) for m in run.measurements}


def undisturbed(folder: Path, model: str) -> tuple[Catalog, str]:
    """The catalog as it is when nobody kills anything, and the variant's id."""
    from core.loop import evaluate_variant, make_variant

    catalog = Catalog(f"sqlite:///{folder / 'undisturbed' / 'catalog.sqlite'}")
    made = make_variant(catalog, model, Recipe.parse(RTN))
    evaluate_variant(catalog, made.variant.id, settings=EVALUATION)
    return catalog, made.variant.id
