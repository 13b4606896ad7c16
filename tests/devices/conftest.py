"""Devices without hardware, each test with places of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.devices.registry import Device
from core.devices.ssh import offered_key, pin
from core.loop import register
from tests.devices.loopback import SSHD, Loopback, adb_shim, loopback
from tests.tiny import tiny_folder


@pytest.fixture(scope="session")
def built_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines' files are kept, so that the tiny model is converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bin_(tmp_path: Path, built_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH; the catalog and all of ours are in the test's own places."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(built_files))
    monkeypatch.delenv("SLIMSCOPE_CATALOG", raising=False)
    return folder


@pytest.fixture
def unpinned(tmp_path: Path, bin_: Path) -> Iterator[Loopback]:
    """A real sshd whose host key nobody has pinned."""
    if SSHD is None:
        pytest.skip("no sshd on this machine: `make sshd` installs it")
    found = loopback(tmp_path / "device", bin_)
    yield found
    found.stop()


@pytest.fixture
def ssh(unpinned: Loopback) -> Loopback:
    """A real sshd, its key pinned."""
    pin(unpinned.device, offered_key(unpinned.device)[1])
    return unpinned


@pytest.fixture
def adb(tmp_path: Path, bin_: Path) -> Device:
    """A shim in place of adb."""
    return adb_shim(bin_, tmp_path / "phone")


@pytest.fixture
def variant(tmp_path: Path, bin_: Path) -> tuple[Catalog, str]:
    """A catalog with a tiny decoder."""
    catalog = Catalog()
    return catalog, register(catalog, str(tiny_folder("llama", tmp_path / "model"))).id
