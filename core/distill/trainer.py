"""The loop that trains a student: read rows, take the gradient of an objective, update, measure on held-out rows, and
keep what is needed to go on after any death.

It knows neither teachers nor losses (``Objective``), neither weights nor scales (``Trainable``), and no format of data
(``TrainingData``). An update reads ``batch_tokens / window`` rows in micro-batches; its loss is the sum over all their
targets, divided once by how many there were, so that it does not matter how it was cut, nor among how many processes.
What is drawn (dropout, a student's own continuations) is drawn from the seed, the update and the micro-batch, so that
a resumed training draws the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.corpus.batches import order
from core.distill.curve import Curve
from core.distill.diagnosis import broken
from core.distill.held_out import HeldOut, chosen_rows, measure, n_targets
from core.distill.optimizer import Optimizer
from core.distill.precision import Weights
from core.distill.processes import Processes
from core.distill.schedule import learning_rate
from core.distill.settings import TrainingSettings
from core.distill.standing import Position, standing
from core.distill.telling import Telling
from core.errors import Cancelled, CannotCompress
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.models.gradients import differentiable
from core.models.loaded import LoadedModel
from core.types import Progress, content_hash, silent

if TYPE_CHECKING:
    from core.corpus.batches import Batch, TrainingData
    from core.distill.objective import Objective
    from core.distill.trainable.trainable import Trainable

Sampler = Callable[[], list[tuple[str, str]]]
"""Prompts and what the model goes on with."""


@dataclass(frozen=True)
class Trained:
    """What a training came to. The model holds the best weights seen, in float32; ``Trainable.finish`` is next."""

    curve: Curve
    before: HeldOut
    after: HeldOut
    """Of the best weights, which may be those it began with."""
    rows: list[int]
    """The held-out rows that were measured."""
    position: Position
    stopped: str
    """Why it ended: ``max_tokens``, ``epochs`` or ``patience``."""
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained, towards what, on what."""

    loaded: LoadedModel
    objective: Objective
    training: TrainingData
    held_out: TrainingData
    trainable: Trainable
    settings: TrainingSettings


def train(
    job: Job,
    *,
    scratch: Path | None = None,
    progress: Progress = silent,
    inputs: Sequence[str] = (),
    sampler: Sampler | None = None,
    processes: Processes | None = None,
) -> Trained:
    """Train what ``job.trainable`` names until tokens, epochs or patience end; leaves the best weights in the model.

    ``scratch`` keeps checkpoint and curve; a call with the same data, settings and ``inputs`` (fingerprints of whatever
    else it depends on) goes on there, bit for bit on a CPU. ``progress`` may raise ``Cancelled``: a checkpoint is
    written first. Raises ``CannotCompress`` where loss or gradient is no number, or there are no rows. Hold the locks
    of the models.
    """
    model, settings = job.loaded.model, job.settings
    with torch.inference_mode(False), torch.enable_grad(), fast_fp32(n_experts=job.loaded.anatomy.n_experts):
        named = dict([*job.trainable.named(), *job.objective.learned()])
        weights = Weights(model, named, settings.precision)
        try:
            with _checkpointed_activations(job):
                loop = _Loop(job, weights, scratch, progress, inputs, sampler, processes or Processes())
                return loop.run()
        finally:
            weights.release()
            model.eval()
            job.trainable.before_forward()


class _Loop:
    """One training; what outlives an update is its standing, the weights and the optimizer's moments."""

    def __init__(
        self,
        job: Job,
        weights: Weights,
        scratch: Path | None,
        progress: Progress,
        inputs: Sequence[str],
        sampler: Sampler | None,
        processes: Processes,
    ) -> None:
        settings, training = job.settings, job.training
        self._job, self._settings, self._processes, self._sampler = job, settings, processes, sampler
        processes.agree(value.data for value in weights.exact.values())
        weights.follow()
        self._weights, self._optimizer = weights, Optimizer(weights, settings)
        self._rows = chosen_rows(job.held_out, max_tokens=settings.held_out_tokens, seed=settings.seed)
        if not training.n_tokens or not self._rows:
            raise CannotCompress(
                f"{settings.data}: nothing is left to learn from or to measure on; give more text, or another held_out"
            )
        self._total = min(settings.max_tokens, settings.epochs * training.n_tokens)
        self._tell = Telling(progress, processes, self._total)
        shapes = {name: list(value.shape) for name, value in weights.exact.items()}
        told = [
            settings.model_dump(mode="json"),
            training.fingerprint,
            job.held_out.fingerprint,
            self._rows,
            shapes,
        ]
        folder = scratch if processes.first else None
        self._stands = standing(folder, content_hash([*told, *inputs]), weights, self._optimizer, processes)
        job.trainable.before_forward()

    def run(self) -> Trained:
        """Measure, update, measure, … until it ends."""
        stands = self._stands
        try:
            while not (stopped := self._ended()):
                if self._measurement_due():
                    self._measure()
                    continue
                wanted = self._update()
                self._tell.stop_if_wanted(wanted)
                if time.monotonic() - stands.kept_at >= 60 * self._settings.checkpoint_minutes:
                    stands.keep(self._weights, self._optimizer)
        except Cancelled:
            self._optimizer.forget()
            stands.keep(self._weights, self._optimizer)
            raise
        self._weights.put(stands.best)
        assert stands.before is not None
        assert stands.after is not None
        notes = tuple(dict.fromkeys(stands.notes))
        return Trained(stands.curve, stands.before, stands.after, self._rows, stands.position, stopped, notes)

    def _ended(self) -> str:
        """Why the training is over; empty while it is not."""
        place, settings = self._stands.position, self._settings
        if self._measurement_due():
            return ""
        if settings.patience and place.without_best >= settings.patience:
            return "patience"
        if place.tokens >= settings.max_tokens:
            return "max_tokens"
        return "epochs" if place.rows >= settings.epochs * self._job.training.n_rows else ""

    def _measurement_due(self) -> bool:
        at, now = self._stands.position.measured_at, self._stands.position.tokens
        if at < 0 or (now >= self._total and at < now):
            return True
        every = self._settings.evaluate_every
        return bool(every) and at // every < now // every

    # --- one update -----------------------------------------------------------------------------------

    def _update(self) -> float:
        """Read the next rows and move once; how many processes were asked to stop."""
        place, started = self._stands.position, time.monotonic()
        rows = self._next_rows()
        loss, n, tokens, wanted, parts = self._gradient(rows)
        share = min(1.0, (place.tokens + tokens / 2) / self._total)
        rate = learning_rate(share, self._settings)
        norm = self._move(rate, n, rows)
        place.update, place.rows, place.tokens = (
            place.update + 1, place.rows + len(rows), place.tokens + tokens,
        )  # fmt: skip
        pace = self._tell.updated(loss, seconds=time.monotonic() - started, tokens=tokens)
        self._stands.point(
            "update", update=place.update, tokens=place.tokens, loss=loss, parts=parts, gradient_norm=norm,
            learning_rate=rate, tokens_per_s=pace, seconds_left=max(0, self._total - place.tokens) / pace,
        )  # fmt: skip
        return wanted

    def _gradient(self, rows: Sequence[int]) -> tuple[float, int, int, float, dict[str, float]]:
        """Collect the gradient of the summed loss of these rows: mean loss, targets, tokens, wishes to stop, parts."""
        place, settings, size = self._stands.position, self._settings, self._settings.micro_batch
        self._job.loaded.model.train()
        sums = {"loss": 0.0, "n": 0.0, "tokens": 0.0}
        parts: dict[str, float] = {}
        pieces = [rows[first : first + size] for first in range(0, len(rows), size)]
        for number, piece in self._processes.mine(pieces):
            self._tell(place.tokens, f"update {place.update + 1}")
            batch = self._job.training.batch(piece).to(self._processes.device)
            sums["tokens"] += batch.n_tokens
            if not n_targets(batch):
                continue
            with _drawn_from(settings.seed, place.update, number), differentiable():
                found = self._job.objective(batch)
                value = float(found.loss.detach())
                if not math.isfinite(value):
                    raise self._broken("loss", value, batch, found.parts)
                found.loss.backward()  # type: ignore[no-untyped-call]
            self._weights.collect()
            sums["loss"] += value
            sums["n"] += found.n
            for name, part in found.parts.items():
                parts[name] = parts.get(name, 0.0) + part
        names = self._processes.share(sorted(parts))
        wishes = float(self._tell.wish is not None)
        loss, n, tokens, wanted, *summed = self._processes.sums(
            [*sums.values(), wishes, *(parts.get(name, 0.0) for name in names)]
        )
        means = {name: part / max(1.0, n) for name, part in zip(names, summed, strict=True)}
        return loss / max(1.0, n), int(n), int(tokens), wanted, means

    def _move(self, rate: float, n: int, rows: Sequence[int]) -> float:
        """Update by the mean over ``n`` targets; the gradient's norm."""
        if not n:
            return 0.0
        self._processes.add_up(self._optimizer.gradients())
        norm = self._optimizer.step(rate, n=n)
        if not math.isfinite(norm):
            raise self._broken("gradient", norm, self._job.training.batch(rows), {})
        self._job.trainable.before_forward()
        return norm

    def _next_rows(self) -> list[int]:
        """Rows of the next update; an epoch's order is drawn anew, and its last update may be shorter."""
        training, settings = self._job.training, self._settings
        wanted = max(1, settings.batch_tokens // training.window)
        epoch, first = divmod(self._stands.position.rows, training.n_rows)
        return list(map(int, order(training.n_rows, epoch, settings.seed)[first : first + wanted]))

    # --- measuring ------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Measure on held-out rows; the weights are kept where they are the best so far."""
        place, objective = self._stands.position, self._job.objective
        self._job.loaded.model.eval()
        found = measure(
            objective, self._job.held_out, self._rows, self._processes,
            lambda done: self._tell(place.tokens, f"held-out row {done + 1} of {len(self._rows)}"),
        )  # fmt: skip
        samples = self._sampler() if self._sampler is not None and self._processes.first else []
        value = found.mean(objective.chosen_by)
        if not math.isfinite(value):
            raise self._broken(
                f"held-out {objective.chosen_by}", value, self._job.held_out.batch(self._rows[:1]), {}
            )
        better = self._stands.offer(found, value, self._weights)
        self._stands.point("held_out", tokens=place.tokens, values=found.means, best=better, samples=samples)

    def _broken(self, what: str, value: float, batch: Batch, parts: Mapping[str, float]) -> CannotCompress:
        place = self._stands.position
        return broken(
            what, value, update=place.update + 1, tokens=place.tokens, batch_hash=batch.content_hash, parts=parts,
            settings=self._settings, resumable=self._stands.is_kept,
        )  # fmt: skip


@contextmanager
def _drawn_from(seed: int, update: int, piece: int) -> Iterator[None]:
    """Random numbers of torch from these three, and the caller's own again behind the block."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + update) * 10_007 + piece)
        yield


@contextmanager
def _checkpointed_activations(job: Job) -> Iterator[None]:
    if not job.settings.gradient_checkpointing:
        yield
        return
    model = job.loaded.model
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
