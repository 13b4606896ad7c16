"""A disk that is really full (a small file system in memory): one sentence, and nothing half-written is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core import cli, whole_folder
from core.catalog.store import Catalog
from core.loop import register
from tests.faults.conftest import EVALUATION, assert_whole, half_written

Command = Callable[..., tuple[int, str]]
COMPRESS = ("compress", "rtn", "--set", "group_size=32", "--model")
SETTINGS = tuple(f"--set={key}={value}" for key, value in EVALUATION.items())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB, mounted for this test alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here; a full disk needs one of its own")
    yield folder
    # Lazily: the commands ran in this process, whose pooled connections to the catalog may still be open.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def catalog(place: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    monkeypatch.setenv("SLIMSCOPE_CATALOG", f"sqlite:///{disk / 'catalog.sqlite'}")
    opened = Catalog()
    yield opened
    opened.close()


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Exit code and stderr of a command."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        return cli.main(arguments), capfd.readouterr().err

    return run


def fill(disk: Path, *, leave: int) -> None:
    """Take the disk's room until only so many bytes are left."""
    import shutil

    with (disk / "filling").open("wb") as filling:
        filling.write(b"\1" * (shutil.disk_usage(disk).free - leave))


def assert_one_line(answer: tuple[int, str], *words: str) -> None:
    code, err = answer
    assert code == 1, err
    assert err.count("\n") == 1, err
    assert err.startswith("slimscope: ")
    for word in words:
        assert word in err


def test_a_disk_without_room_refuses_before_writing(catalog: Catalog, tiny: str, command: Command) -> None:
    assert_one_line(command(*COMPRESS, tiny), "MB free but this needs", "free some space")
    assert half_written(catalog) == []
    assert [variant.recipe for variant in catalog.variants()] == [None]


def test_a_disk_that_becomes_full_leaves_nothing(
    catalog: Catalog, disk: Path, tiny: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the room had been there when it was asked for.
    monkeypatch.setattr(whole_folder, "SPARE_BYTES", -(1 << 30))
    base = register(catalog, tiny)

    fill(disk, leave=200_000)
    assert_one_line(command(*COMPRESS, tiny), "became full while writing; nothing was kept", "retry")
    assert half_written(catalog) == []
    assert catalog.variants() == [base]

    fill(disk, leave=0)
    assert_one_line(command("evaluate", tiny, *SETTINGS), "free some space and try again")
    assert half_written(catalog) == []
    (disk / "filling").unlink()
    assert_whole(catalog)
    assert command("evaluate", tiny, *SETTINGS)[0] == 0, "with room again, it works again"
    assert_whole(catalog)
