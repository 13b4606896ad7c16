"""A teacher's rows on disk: the same rows, made once, whole or absent, and never those of another teacher."""

import shutil
from collections import namedtuple

import pytest
import torch

from core.corpus.batches import tokenized
from core.corpus.rows import Row, Rows
from core.distill import teacher_cache
from core.distill.live_teacher import LiveTeacher
from core.distill.teacher_cache import build, cache_key
from core.distill.teacher_rows import top_k_of
from core.errors import Cancelled, CannotCompress
from tests.tiny import CORPUS, tiny_model

K = 8


@pytest.fixture(scope="module")
def teacher():
    return LiveTeacher(tiny_model("smollm"))


@pytest.fixture(scope="module")
def data(teacher):
    rows = Rows("corpus", "text", tuple(Row(text=text) for text in CORPUS[:12]))
    return tokenized(rows, teacher.loaded.tokenizer, window=32, packing="packed")


@pytest.fixture
def shards(monkeypatch, data):
    """Several shards, a row or two at a time."""
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", data.n_tokens // 5)
    monkeypatch.setattr(teacher_cache, "READ_TOKENS", 64)


@pytest.mark.usefixtures("shards")
def test_cached_rows_are_the_live_ones_to_16_bits_in_any_order(teacher, data, tmp_path):
    cache = build(teacher, data, top_k=K, temperature=2.0, folder=tmp_path)
    batch = data.batch([data.n_rows - 1, 0, 1])
    live = teacher.rows(batch)
    expected = top_k_of(live.part(0, len(live)).logits_NV, K, 2.0)
    found = cache.rows(batch)
    assert len(list(cache.folder.glob("*.safetensors"))) >= 3
    assert found.temperature == 2.0
    torch.testing.assert_close(found.log_p_NK.float(), expected.log_p_NK, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_tail_N.float(), expected.log_tail_N, rtol=1e-3, atol=1e-3)
    same = (found.ids_NK.long() == expected.ids_NK).float().mean()
    assert same > 0.98, "tokens of nearly equal probability may change places with the batch"
    torch.testing.assert_close(found.log_probabilities().exp().sum(-1), torch.ones(len(found)))


def test_bytes_per_token_are_those_of_the_files(teacher, data, tmp_path):
    cache = build(teacher, data, top_k=K, folder=tmp_path)
    assert cache.bytes_per_token == 4 * K + 2
    stated = cache.bytes_per_token * data.n_targets
    assert stated <= cache.nbytes <= stated + 4 * data.n_rows + 1024


@pytest.mark.usefixtures("shards")
def test_a_build_that_was_stopped_goes_on_behind_its_last_shard(teacher, data, tmp_path):
    def stop_late(done: float, total: float, message: str) -> None:
        if done > 0.7 * total:
            raise Cancelled

    with pytest.raises(Cancelled):
        build(teacher, data, top_k=K, folder=tmp_path, progress=stop_late)
    (folder,) = tmp_path.iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert kept
    (folder / ".shard-00002.safetensors.1.part").write_bytes(b"killed while writing")
    cache = build(teacher, data, top_k=K, folder=tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert kept.items() < now.items()
    assert not list(folder.glob("*.part"))
    whole = build(teacher, data, top_k=K, folder=tmp_path / "at once").rows(data.batch(range(data.n_rows)))
    assert torch.equal(cache.rows(data.batch(range(data.n_rows))).log_p_NK, whole.log_p_NK)


def test_a_finished_cache_is_found_and_the_teacher_does_not_run(teacher, data, tmp_path):
    build(teacher, data, top_k=K, folder=tmp_path)
    told = []
    build(teacher, data, top_k=K, folder=tmp_path, progress=lambda done, total, message: told.append(message))
    assert told == []


def test_everything_the_rows_depend_on_is_in_the_key(teacher, data):
    def names(teacher: LiveTeacher, data, k: int, temperature: float) -> str:
        return cache_key(teacher, data, top_k=k, temperature=temperature).name

    other_data = tokenized(
        Rows("corpus", "text", (Row(text=CORPUS[0]),)), teacher.loaded.tokenizer, window=32
    )
    other_teacher = LiveTeacher(tiny_model("llama"))
    keys = {
        names(teacher, data, K, 1.0), names(teacher, data, K, 2.0), names(teacher, data, K + 1, 1.0),
        names(teacher, other_data, K, 1.0), names(other_teacher, data, K, 1.0),
    }  # fmt: skip
    assert len(keys) == 5
    assert names(teacher, data, K, 1.0) == names(LiveTeacher(tiny_model("smollm")), data, K, 1.0)


def test_a_disk_without_room_is_refused_before_the_teacher_runs(teacher, data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, 0))
    with pytest.raises(CannotCompress, match="free"):
        build(teacher, data, top_k=K, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rows_of_other_data_are_not_handed_out(teacher, data, tmp_path):
    cache = build(teacher, data, top_k=K, folder=tmp_path)
    other = tokenized(Rows("other", "text", (Row(text="a b"),)), teacher.loaded.tokenizer, window=32)
    with pytest.raises(AssertionError, match="other data"):
        cache.rows(other.batch([0]))
