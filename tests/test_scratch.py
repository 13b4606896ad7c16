"""Unfinished work of a variant: kept when its making is stopped, gone when it is made, never in two hands."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from core.errors import Cancelled, ProofFailed
from core.scratch import JOB, KEPT_S, sweep_variants, variant_scratch


def make(root: Path, *, error: type[Exception] | None = None, job_id: str | None = None) -> Path:
    """Work on a variant that leaves a file, and end well or badly."""
    with variant_scratch(root, "abc", job_id=job_id) as folder:
        assert folder is not None
        (folder / "block").write_text("done")
        if error is not None:
            raise error("stopped")
    return folder


def test_work_is_kept_when_stopped_and_gone_when_made(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        make(tmp_path, error=Cancelled)
    with variant_scratch(tmp_path, "abc") as folder:
        assert folder is not None
        assert (folder / "block").read_text() == "done"
    assert list(tmp_path.iterdir()) == []


def test_what_did_not_reload_is_not_taken_up_again(tmp_path: Path) -> None:
    with pytest.raises(ProofFailed):
        make(tmp_path, error=ProofFailed)
    assert not (tmp_path / "variant-abc").exists()


def test_a_second_maker_of_the_same_variant_works_without_it(tmp_path: Path) -> None:
    with variant_scratch(tmp_path, "abc") as first, variant_scratch(tmp_path, "abc") as second:
        assert first is not None
        assert second is None
        with variant_scratch(tmp_path, "other") as other:
            assert other is not None


def test_what_nobody_takes_up_is_swept_but_never_from_under_a_maker(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        make(tmp_path, error=Cancelled)
    folder = tmp_path / "variant-abc"
    assert sweep_variants(tmp_path) == []
    for path in (folder / "block", folder / JOB, folder):
        os.utime(path, (path.stat().st_mtime - KEPT_S - 1,) * 2)
    with (tmp_path / "variant-abc.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep_variants(tmp_path) == []
    assert sweep_variants(tmp_path) == [folder]
    assert not folder.exists()


def test_the_work_of_a_paused_job_waits_for_it(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        make(tmp_path, error=Cancelled, job_id="j1")
    folder = tmp_path / "variant-abc"
    for path in (folder / JOB, folder / "block", folder):
        os.utime(path, (path.stat().st_mtime - KEPT_S - 1,) * 2)
    assert sweep_variants(tmp_path, unfinished=["j1"]) == []
    assert sweep_variants(tmp_path, unfinished=["j2"]) == [folder]
