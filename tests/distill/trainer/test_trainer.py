from __future__ import annotations

import math
import os
import random
import resource
import signal
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from core.corpus.batches import order
from core.distill.checkpoint import NAME
from core.distill.curve import read_points
from core.distill.trainer import train
from core.errors import Cancelled, CannotCompress
from tests.distill.trainer.small import job_in, timeless, trained_in, weights_hash

FRESH = get_context("forkserver")
"""Children of a process without threads of its own: one forked beside a pool of threads may hang."""
FRESH.set_forkserver_preload(["torch", "transformers", "tests.distill.trainer.small"])
KILLS = 10 if os.environ.get("SLIMSCOPE_ROTATION") == "all" else 4
LONGER = 900
"""Training tokens, so that there is something left to kill."""


class Stop:
    """A progress that raises ``Cancelled`` at its n-th report."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, done: float, total: float, message: str) -> None:
        self.left -= 1
        if not self.left:
            raise Cancelled("enough")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """One thread's sums are the same in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(job, outcome, hash) of a training that nobody stopped."""
    job, trained = trained_in(tmp_path_factory.mktemp("whole"))
    return job, trained, weights_hash(job.loaded)


def test_it_learns_measures_and_counts_tokens(whole: Any) -> None:
    job, trained, _ = whole
    updates = [p for p in trained.curve.points if p["kind"] == "update"]
    measured = [p for p in trained.curve.points if p["kind"] == "held_out"]
    assert updates[-1]["loss"] < updates[0]["loss"] / 2
    assert trained.stopped == "max_tokens"
    assert updates[-2]["tokens"] < 300 <= trained.position.tokens == updates[-1]["tokens"]
    assert [p["tokens"] // 100 for p in measured] == [0, 1, 2, 3], "before, at each 100 tokens, and after"
    best = min(measured, key=lambda p: p["values"]["task"])
    assert trained.position.best_tokens == best["tokens"]
    assert trained.after.mean("task") == best["values"]["task"] < trained.before.mean("task")
    with torch.no_grad():  # the best weights are those in the model now
        sums = [job.objective.held_out(job.held_out.batch([row])) for row in trained.rows]
    assert [s["task"] for s in sums] == pytest.approx(trained.after.sums["task"].tolist(), rel=1e-6)


def test_how_an_update_is_cut_does_not_matter(whole: Any, tmp_path: Path) -> None:
    _, trained, _ = whole
    _, in_one = trained_in(tmp_path, micro_batch=8)
    _agree(timeless(in_one), timeless(trained))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_and_taken_up_again_is_bit_equal(precision: str, whole: Any, tmp_path: Path) -> None:
    if precision == "float32":
        _, straight, digest = whole
    else:
        job, straight = trained_in(tmp_path / "straight", precision=precision)
        digest = weights_hash(job.loaded)
    for at in (3, 12, 9):  # within a measurement, and within updates
        with pytest.raises(Cancelled):
            trained_in(tmp_path, scratch=tmp_path / "kept", progress=Stop(at), precision=precision)
    job, again = trained_in(tmp_path, scratch=tmp_path / "kept", precision=precision)
    assert any("Taken up again" in note for note in again.notes)
    assert timeless(again) == timeless(straight)
    assert [p["tokens"] for p in read_points(tmp_path / "kept" / "curve.jsonl")] == [
        p["tokens"] for p in again.curve.points
    ]
    assert weights_hash(job.loaded) == digest
    assert next(job.loaded.model.parameters()).dtype == torch.float32


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    job, _ = trained_in(tmp_path / "straight", max_tokens=LONGER)
    digest = weights_hash(job.loaded)
    draws, kills = random.Random(6), 0
    for _ in range(60):
        child = FRESH.Process(target=_train_in_child, args=(tmp_path,))
        child.start()
        if kills < KILLS:
            kept = tmp_path / "kept" / NAME
            known = kept.stat().st_mtime_ns if kept.exists() else 0
            while child.is_alive() and (not kept.exists() or kept.stat().st_mtime_ns == known):
                time.sleep(0.001)  # until it has gone further than the one before
            time.sleep(draws.random() * 0.1)
            os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
    assert kills >= KILLS
    assert (tmp_path / "hash").read_text() == digest


def _train_in_child(folder: Path) -> None:
    job, _ = trained_in(folder, scratch=folder / "kept", max_tokens=LONGER)
    (folder / "hash").write_text(weights_hash(job.loaded))


def test_a_full_disk_keeps_the_checkpoint_before_and_goes_on(whole: Any, tmp_path: Path) -> None:
    _, straight, digest = whole
    with pytest.raises(Cancelled):
        trained_in(tmp_path, scratch=tmp_path / "kept", progress=Stop(9))
    before = (tmp_path / "kept" / NAME).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        job, trained = trained_in(tmp_path / "other", scratch=tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "kept" / NAME).read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [NAME, "curve.jsonl"]
    assert sum("could not be written" in note for note in trained.notes) == 1
    assert timeless(trained) == timeless(straight)
    assert weights_hash(job.loaded) == digest


def test_a_loss_that_is_no_number_names_update_batch_and_advice(tmp_path: Path) -> None:
    job = job_in(tmp_path, clip=0, warmup=0, micro_batch=8)
    spoiled = replace(job, objective=_Spoiled(job.objective, at=3))
    with pytest.raises(CannotCompress) as told:
        train(spoiled, scratch=tmp_path / "kept")
    rows = order(job.training.n_rows, 0, 0)[4:6].tolist()
    assert "the loss became nan in update 3, after " in str(told.value)
    assert job.training.batch(rows).content_hash[:16] in str(told.value)
    assert "lower learning_rate (now 0.001), or set clip to 1, or set warmup to 0.05" in str(told.value)
    again, _ = trained_in(tmp_path / "again", scratch=tmp_path / "kept", clip=0, warmup=0, micro_batch=8)
    straight, _ = trained_in(tmp_path / "straight", clip=0, warmup=0, micro_batch=8)
    assert weights_hash(again.loaded) == weights_hash(straight.loaded), "the good checkpoint was kept"


class _Spoiled:
    """An aim whose n-th loss is no number."""

    def __init__(self, objective: Any, at: int) -> None:
        self._objective, self.left, self.chosen_by = objective, at, objective.chosen_by
        self.held_out, self.learned = objective.held_out, objective.learned

    def __call__(self, batch: Any) -> Any:
        self.left -= 1
        found = self._objective(batch)
        return replace(found, loss=found.loss * math.nan) if not self.left else found


def test_patience_stops_and_keeps_what_was_best(tmp_path: Path) -> None:
    job, trained = trained_in(tmp_path, learning_rate=1.0, warmup=0, patience=2, evaluate_every=50)
    assert trained.stopped == "patience"
    assert trained.position.best_tokens == 0
    fresh = job_in(tmp_path / "fresh")
    assert weights_hash(job.loaded) == weights_hash(fresh.loaded), "nothing was better than the start"
    assert len([p for p in trained.curve.points if p["kind"] == "held_out"]) == 3


def test_epochs_end_it_and_its_schedule(tmp_path: Path) -> None:
    job, trained = trained_in(tmp_path, epochs=2, max_tokens=10_000, evaluate_every=0, schedule="wsd")
    assert trained.stopped == "epochs"
    assert trained.position.tokens == 2 * job.training.n_tokens
    rates = [p["learning_rate"] for p in trained.curve.points if p["kind"] == "update"]
    assert max(rates) == 1e-3
    assert rates[-1] < 0.5e-3


def test_two_processes_train_as_one(whole: Any, tmp_path: Path) -> None:
    _, straight, _ = whole
    port = 20_000 + os.getpid() % 20_000
    pair = [FRESH.Process(target=_train_as, args=(tmp_path, rank, port)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(180)
    assert [process.exitcode for process in pair] == [0, 0]
    theirs = read_points(tmp_path / "kept" / "curve.jsonl")
    _agree(theirs, straight.curve.points)
    assert (tmp_path / "hash0").read_text() == (tmp_path / "hash1").read_text()


def _agree(mine: Any, others: Any) -> None:
    """Two curves are one, up to the order of float32 sums; the gradient of what is known by heart is mostly rounding."""
    assert len(mine) == len(others)
    for point, other in zip(mine, others, strict=True):
        assert point["tokens"] == other["tokens"]
        if "loss" in point:
            assert point["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert point["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        else:
            assert point["values"] == pytest.approx(other["values"], rel=1e-4)


def _train_as(folder: Path, rank: int, port: int) -> None:
    from accelerate import PartialState

    PartialState._reset_state()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    job, _ = trained_in(folder / str(rank), scratch=folder / "kept")
    (folder / f"hash{rank}").write_text(weights_hash(job.loaded))
    torch.distributed.destroy_process_group()
