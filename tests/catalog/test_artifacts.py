from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from core.catalog.artifacts import INCOMING, ArtifactStore, read_contents
from core.catalog.store import Catalog
from core.catalog.tables import ArtifactRow
from core.errors import BadInput, CatalogError
from core.types import content_hash
from tests.catalog.samples import folder_of

PUT = """
import sys
from pathlib import Path
from core.catalog.store import Catalog
catalog = Catalog(sys.argv[1])
folder = Path(sys.argv[2])
folder.mkdir()
for i in range(300):
    (folder / f"{i:03}.bin").write_bytes(bytes([i % 256]) * 50_000)
print("ready", flush=True)
catalog.put_artifact(folder)
print("done", flush=True)
"""


def test_a_folder_is_named_by_what_is_in_it(catalog: Catalog, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", weights=b"w")
    (folder / "sub").mkdir()
    (folder / "sub" / "config").write_bytes(b"c")
    sha = {
        "sub/config": "2e7d2c03a9507ae265ecf5b5356885a53393a2029d241394997265a1a25aefc6",
        "weights": "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326",
    }
    hash_ = catalog.put_artifact(folder)
    assert hash_ == content_hash(sha)
    assert not folder.exists()
    stored = catalog.artifact_folder(hash_)
    assert (stored / "sub" / "config").read_bytes() == b"c"
    again = folder_of(tmp_path, "b", weights=b"w")
    (again / "sub").mkdir()
    (again / "sub" / "config").write_bytes(b"c")
    assert catalog.put_artifact(again) == hash_
    assert not again.exists()
    renamed = folder_of(tmp_path, "c", other=b"w")
    assert catalog.put_artifact(renamed) != hash_


def test_what_is_no_artifact_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    linked = folder_of(tmp_path, "linked", weights=b"w")
    (linked / "link").symlink_to("/etc/hostname")
    for folder, said in [("none", "is no folder"), ("empty", "is empty"), ("linked", "is a link")]:
        with pytest.raises(BadInput, match=said):
            catalog.put_artifact(tmp_path / folder)
    with pytest.raises(CatalogError, match="not in the catalog"):
        catalog.artifact_folder("0" * 64)


def test_files_that_were_removed_by_hand_are_named(catalog: Catalog, tmp_path: Path) -> None:
    hash_ = catalog.put_artifact(folder_of(tmp_path, "a", weights=b"w"))
    catalog.artifacts.remove(hash_)
    with pytest.raises(CatalogError, match="missing under"):
        catalog.artifact_folder(hash_)


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="there is no second file system here",
)
def test_a_folder_from_another_file_system_is_copied_in(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    outside = Path("/dev/shm") / f"slimscope-test-{os.getpid()}"
    outside.mkdir()
    folder = folder_of(outside, "a", weights=b"w")
    contents = store.admit(folder)
    assert read_contents(store.folder(contents.hash)) == contents
    assert not folder.exists()
    assert list(store.root.glob(f"{INCOMING}*")) == []
    outside.rmdir()


def test_kill_during_put_lists_nothing_half_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'catalog.sqlite'}"
    catalog = Catalog(url)
    finished = 0
    for round_, delay in enumerate([0.0, 0.005, 0.02, 0.05, 0.1, 0.2]):
        process = subprocess.Popen(
            [sys.executable, "-c", PUT, url, str(tmp_path / f"in{round_}")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        finished += process.communicate()[0] == "done\n"
        with catalog.read() as session:
            listed = session.scalars(select(ArtifactRow.hash)).all()
        for hash_ in listed:
            assert read_contents(catalog.artifact_folder(hash_)).hash == hash_
        for folder in catalog.artifacts.root.iterdir():
            assert folder.name.startswith(INCOMING) or read_contents(folder).hash == folder.name
    assert finished < 6, "at least one was killed in the middle"
    code = subprocess.run([sys.executable, "-c", PUT, url, str(tmp_path / "last")], check=False).returncode
    assert code == 0
    with catalog.read() as session:
        assert len(session.scalars(select(ArtifactRow.hash)).all()) == 1


def test_sweep_takes_only_old_folders_of_dead_processes(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    kept = store.admit(folder_of(tmp_path, "a", weights=b"w"))
    dead = subprocess.Popen(["true"])
    dead.wait()
    folders = {
        "old of the dead": store.root / f"{INCOMING}{dead.pid}-1",
        "young of the dead": store.root / f"{INCOMING}{dead.pid}-2",
        "old of the living": store.root / f"{INCOMING}{os.getpid()}-3",
    }
    for name, folder in folders.items():
        folder.mkdir()
        if name.startswith("old"):
            os.utime(folder, (0, 0))
    assert store.sweep() == [folders["old of the dead"]]
    assert sorted(store.root.iterdir()) == sorted(
        [store.root / kept.hash, folders["young of the dead"], folders["old of the living"]]
    )
