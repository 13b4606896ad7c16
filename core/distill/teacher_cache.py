"""A teacher's rows on disk: it reads the data once, and every student of it learns from the files.

Kept for every target are the K likeliest tokens (ids in 16 bits where the vocabulary allows, log-probabilities in
float16) and the log of the mass of all others: 4 K + 2 bytes with 16-bit ids. A cache belongs to one teacher (weights and
precision), one data set (ids and targets), one K and one temperature; all of it is in its key, so a hit is never wrong.

It is made of shards of whole rows, each a safetensors file that is there complete or not at all, so that a stopped build
goes on behind the last one. The same job under way elsewhere is waited for. Knows no student and no loss.

Legend: N targets, K kept tokens, R rows of the data.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.distill.live_teacher import LiveTeacher
from core.distill.losses.fused_head import blocks
from core.distill.teacher_rows import Dense, TopK, top_k_of
from core.durable import whole_file
from core.errors import BadInput, CannotCompress
from core.lazy import torch
from core.paths import cache_dir
from core.types import Progress, content_hash, silent
from core.whole_folder import refuse_full_disk

if TYPE_CHECKING:
    from core.corpus.batches import Batch, TrainingData

VERSION = 1
SHARD_TOKENS = 65_536
"""Targets of a shard, about: 17 MB at K = 64; what a stopped build loses at most."""
READ_TOKENS = 2_048
"""Tokens the teacher reads at once, about."""
LOGIT_BYTES = 16 << 20
"""Float32 logits that are sorted at once."""
WAIT_S = 0.5


@dataclass(frozen=True)
class CacheKey:
    """What the kept rows depend on."""

    teacher: str
    """Fingerprint of its weights."""
    dtype: str
    """What it computes in."""
    data: str
    vocabulary: int
    top_k: int
    temperature: float
    version: int = VERSION

    @property
    def name(self) -> str:
        """The cache's folder."""
        return f"rows-{content_hash(vars(self))[:24]}"

    @property
    def id_dtype(self) -> Any:
        """The narrowest integers that hold a token's id."""
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def bytes_per_token(self) -> int:
        """On disk, for every target."""
        return self.top_k * ((2 if self.vocabulary <= 1 << 16 else 4) + 2) + 2


class TeacherCache:
    """The finished rows of one teacher on one data set; a ``Teacher`` for batches of that data and no other."""

    def __init__(self, folder: Path, key: CacheKey, shards: Sequence[range]) -> None:
        self.folder, self.key = folder, key
        self._shards = tuple(shards)
        self._open: dict[int, Any] = {}

    @property
    def bytes_per_token(self) -> int:
        """On disk, for every target."""
        return self.key.bytes_per_token

    @cached_property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @cached_property
    def _place_R(self) -> list[tuple[int, int, int]]:
        """(shard, first target in it, targets) of each row."""
        found = []
        for number in range(len(self._shards)):
            start = 0
            for n in self._file(number).get_tensor("targets_R").tolist():
                found.append((number, start, n))
                start += n
        return found

    def rows(self, batch: Batch) -> TopK:
        """What the teacher said at the batch's targets, on the batch's device."""
        pieces = []
        for row in batch.rows_B.tolist():
            number, start, n = self._place_R[row]
            file, stop = self._file(number), start + n
            pieces.append([file.get_slice(name)[start:stop] for name in ("ids_NK", "log_p_NK", "log_tail_N")])
        ids_NK, log_p_NK, log_tail_N = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        assert len(ids_NK) == batch.n_targets, "a batch of other data than the teacher read"
        return TopK(ids_NK, log_p_NK, log_tail_N, self.key.temperature).to(batch.ids_BP.device)

    def _file(self, number: int) -> Any:
        from safetensors import safe_open

        if number not in self._open:
            self._open[number] = safe_open(self.folder / _shard_name(number), framework="pt")
        return self._open[number]


def cache_key(teacher: LiveTeacher, data: TrainingData, *, top_k: int, temperature: float) -> CacheKey:
    """What ``build`` keeps its rows under; K is at most the vocabulary less one."""
    loaded, vocabulary = teacher.loaded, teacher.head.vocabulary
    return CacheKey(
        loaded.fingerprint,
        loaded.dtype,
        data.fingerprint,
        vocabulary,
        min(top_k, vocabulary - 1),
        temperature,
    )


def build(
    teacher: LiveTeacher,
    data: TrainingData,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    folder: Path | None = None,
    progress: Progress = silent,
) -> TeacherCache:
    """Let the teacher read all rows of ``data``, or find that it has; ``folder`` holds all caches.

    ``progress`` counts targets and may raise ``Cancelled``: finished shards stay and are not made again. Raises
    ``BadInput`` for data without targets, ``CannotCompress`` where the disk has no room. Hold the teacher's lock.
    """
    if not data.n_targets:
        raise BadInput(
            f"{data.name} has no token to learn, so a teacher has nothing to say of it; choose other data"
        )
    key = cache_key(teacher, data, top_k=top_k, temperature=temperature)
    place = (folder or cache_dir() / "teachers") / key.name
    place.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(data))
    with _alone(place, progress, data.n_targets):
        missing = [number for number in range(len(shards)) if not (place / _shard_name(number)).exists()]
        left = sum(len(shards[number]) for number in missing) / data.n_rows
        refuse_full_disk(place / "x", int(left * data.n_targets * key.bytes_per_token), refuse=CannotCompress)
        for leftover in place.glob(".*.part"):
            leftover.unlink()
        for number in missing:
            _write_shard(place, number, shards[number], teacher, data, key, progress)
    return TeacherCache(place, key, shards)


def _shards(data: TrainingData) -> Iterator[range]:
    """Runs of rows with about ``SHARD_TOKENS`` tokens each, from the data alone: the same in every build."""
    start = tokens = 0
    for row in range(data.n_rows):
        tokens += data.length(row)
        if tokens >= SHARD_TOKENS:
            yield range(start, row + 1)
            start, tokens = row + 1, 0
    if start < data.n_rows:
        yield range(start, data.n_rows)


def _write_shard(
    place: Path,
    number: int,
    shard: range,
    teacher: LiveTeacher,
    data: TrainingData,
    key: CacheKey,
    progress: Progress,
) -> None:
    from safetensors.torch import save_file

    counts: list[int] = []
    # Filled in place: small tensors kept one by one would lie between large ones that are freed, and pin their memory.
    room, at = sum(data.length(row) for row in shard), 0
    ids_NK = torch.empty(room, key.top_k, dtype=key.id_dtype)
    log_p_NK = torch.empty(room, key.top_k, dtype=torch.float16)
    log_tail_N = torch.empty(room, dtype=torch.float16)
    size = max(1, READ_TOKENS // data.window)
    for first in range(shard.start, shard.stop, size):
        progress(first / data.n_rows * data.n_targets, data.n_targets, "the teacher reads the training data")
        batch = data.batch(range(first, min(first + size, shard.stop)))
        counts += _targets_by_row(batch)
        for rows in _kept(teacher, batch, key):
            part = slice(at, at + len(rows))
            ids_NK[part], log_p_NK[part], log_tail_N[part] = rows.ids_NK, rows.log_p_NK, rows.log_tail_N
            at = part.stop
    tensors = {
        "targets_R": torch.tensor(counts, dtype=torch.int32),
        "ids_NK": ids_NK[:at], "log_p_NK": log_p_NK[:at], "log_tail_N": log_tail_N[:at],
    }  # fmt: skip
    try:
        with whole_file(place / _shard_name(number)) as file:
            save_file(tensors, file)
    except Exception as error:  # safetensors has an error of its own for what the disk refuses
        raise CannotCompress(
            f"the teacher's rows could not be written to {place.parent} ({error}); the shards before are kept: free some "
            "space and start again, or choose a smaller top_k"
        ) from error


def _targets_by_row(batch: Batch) -> list[int]:
    from core.corpus.batches import IGNORE

    counts: list[int] = (batch.targets_BP != IGNORE).sum(-1).tolist()
    return counts


def _kept(teacher: LiveTeacher, batch: Batch, key: CacheKey) -> Iterator[TopK]:
    """The batch's rows in parts, on the CPU."""
    unread = teacher.rows(batch)
    for start, stop in blocks(len(unread), key.vocabulary, 4, LOGIT_BYTES):
        logits: Dense = unread.part(start, stop)
        yield top_k_of(logits.logits_NV, key.top_k, key.temperature).to("cpu")


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@contextmanager
def _alone(place: Path, progress: Progress, total: int) -> Iterator[None]:
    """Hold the cache's lock, which the system frees at any death; until then say what is waited for."""
    with (place / ".lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(0, total, "another job lets this teacher read this data; waiting for it")
                time.sleep(WAIT_S)
        yield
