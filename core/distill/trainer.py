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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.distill.checkpoint import read_checkpoint, write_checkpoint
from core.distill.curve import NAME as CURVE
from core.distill.curve import Curve
from core.distill.diagnosis import broken
from core.distill.held_out import HeldOut, chosen_rows, measure
from core.distill.optimizer import Optimizer
from core.distill.precision import Weights
from core.distill.processes import Processes
from core.distill.schedule import learning_rate
from core.distill.settings import TrainingSettings
from core.errors import Cancelled, CannotCompress
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.models.gradients import differentiable
from core.models.loaded import LoadedModel
from core.types import Progress, content_hash, silent

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch, TrainingData
    from core.distill.objective import Objective
    from core.distill.trainable.trainable import Trainable

Sampler = Callable[[], list[tuple[str, str]]]
"""Prompts and what the model goes on with."""
PACE = 10
"""Updates over which tokens per second are averaged."""


@dataclass
class Position:
    """Where a training is; plain values, all that a resumed one needs beside its tensors."""

    update: int = 0
    rows: int = 0
    """Rows read, epoch after epoch."""
    tokens: int = 0
    """Tokens read, padding not counted."""
    measured_at: int = -1
    """Tokens at the latest measurement; -1 before the first."""
    best: float = math.inf
    best_tokens: int = 0
    without_best: int = 0
    """Measurements since the best one."""
    points: int = 0
    """Length of the curve."""


@dataclass(frozen=True)
class Trained:
    """What a training came to. The model holds the best weights seen, in float32, and ``Trainable.finish`` is next."""

    curve: Curve
    before: HeldOut
    after: HeldOut
    """Of the best weights, which may be those it began with."""
    position: Position
    stopped: str
    """Why it ended: ``max_tokens``, ``epochs`` or ``patience``."""
    notes: tuple[str, ...]


def train(
    loaded: LoadedModel,
    objective: Objective,
    training: TrainingData,
    held_out: TrainingData,
    trainable: Trainable,
    settings: TrainingSettings,
    *,
    scratch: Path | None = None,
    progress: Progress = silent,
    inputs: Sequence[str] = (),
    sampler: Sampler | None = None,
    processes: Processes | None = None,
) -> Trained:
    """Train what ``trainable`` names until tokens, epochs or patience end; leaves the best weights seen in the model.

    ``scratch`` keeps checkpoint and curve; a call with the same data, settings and ``inputs`` (fingerprints of whatever
    else it depends on) goes on there, bit for bit on a CPU. ``progress`` may raise ``Cancelled``: a checkpoint is
    written first. Raises ``CannotCompress`` where loss or gradient is no number. Hold ``loaded.lock``.
    """
    with torch.inference_mode(False), torch.enable_grad(), fast_fp32(n_experts=loaded.anatomy.n_experts):
        named = [*trainable.named(), *objective.learned()]
        weights = Weights(loaded.model, dict(named), settings.precision)
        try:
            with _checkpointed_activations(loaded, settings):
                return _Loop(
                    loaded, objective, training, held_out, trainable, settings, weights,
                    processes or Processes(), scratch, progress, inputs, sampler,
                ).run()  # fmt: skip
        finally:
            weights.release(loaded.model)
            loaded.model.eval()


class _Loop:
    """One training; the only state that outlives an update is ``position``, the weights and the optimizer's moments."""

    def __init__(
        self,
        loaded: LoadedModel,
        objective: Objective,
        training: TrainingData,
        held_out: TrainingData,
        trainable: Trainable,
        settings: TrainingSettings,
        weights: Weights,
        processes: Processes,
        scratch: Path | None,
        progress: Progress,
        inputs: Sequence[str],
        sampler: Sampler | None,
    ) -> None:
        self._model, self._objective, self._trainable = loaded.model, objective, trainable
        self._training, self._held_out, self._settings = training, held_out, settings
        self._weights, self._optimizer = weights, Optimizer(weights, settings)
        self._processes, self._progress, self._sampler = processes, progress, sampler
        self._folder = scratch if processes.first else None
        self._total = min(settings.max_tokens, settings.epochs * training.n_tokens)
        self._rows = chosen_rows(held_out, max_tokens=settings.held_out_tokens)
        if not training.n_tokens or not self._rows:
            raise CannotCompress(
                f"{settings.data}: nothing is left to learn from or to measure on; give more text, or another held_out"
            )
        shapes = {name: list(value.shape) for name, value in weights.exact.items()}
        self._key = content_hash(
            [
                settings.model_dump(mode="json"),
                training.fingerprint,
                held_out.fingerprint,
                list(inputs),
                shapes,
            ]
        )
        self.position = Position()
        self._best: dict[str, Tensor] = {}
        self._before: HeldOut | None = None
        self._after: HeldOut | None = None
        self._notes: list[str] = []
        self._pace: list[tuple[float, int]] = []
        self._wish: Cancelled | None = None
        self._saved_at = time.monotonic()
        self._curve = self._resumed()

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> Trained:
        """Measure, update, measure, … until it ends."""
        try:
            while not (stopped := self._ended()):
                if self._measurement_due():
                    self._measure()
                    continue
                self._update()
                self._stop_if_asked()
                if time.monotonic() - self._saved_at >= 60 * self._settings.checkpoint_minutes:
                    self._save()
        except Cancelled:
            self._optimizer.forget()
            self._save()
            raise
        self._weights.put(self._best)
        self._trainable.before_forward()
        assert self._before is not None
        assert self._after is not None
        return Trained(
            self._curve, self._before, self._after, self.position, stopped, tuple(dict.fromkeys(self._notes))
        )

    def _ended(self) -> str:
        """Why the training is over; empty while it is not."""
        if self._measurement_due():
            return ""
        if self._settings.patience and self.position.without_best >= self._settings.patience:
            return "patience"
        if self.position.rows >= self._settings.epochs * self._training.n_rows:
            return "epochs"
        return "max_tokens" if self.position.tokens >= self._settings.max_tokens else ""

    def _measurement_due(self) -> bool:
        at, now = self.position.measured_at, self.position.tokens
        if at < 0 or (now >= self._total and at < now):
            return True
        every = self._settings.evaluate_every
        return bool(every) and at // every < now // every

    def _update(self) -> None:
        """Read the next rows and move once."""
        place, settings = self.position, self._settings
        started = time.monotonic()
        rows = self._next_rows()
        pieces = [rows[i : i + settings.micro_batch] for i in range(0, len(rows), settings.micro_batch)]
        self._model.train()
        n = tokens = 0
        loss, parts = 0.0, dict[str, float]()
        for number, piece in self._processes.mine(pieces):
            self._tell(f"update {place.update + 1}")
            batch = self._training.batch(piece)
            if not _learns(batch):
                tokens += batch.n_tokens
                continue
            with _drawn_from(settings.seed, place.update, number), differentiable():
                found = self._objective(batch)
                value = float(found.loss.detach())
                if not math.isfinite(value):
                    raise self._broken("loss", value, batch, found.parts)
                found.loss.backward()  # type: ignore[no-untyped-call]
            self._weights.collect()
            loss, n, tokens = loss + value, n + found.n, tokens + batch.n_tokens
            for name, part in found.parts.items():
                parts[name] = parts.get(name, 0.0) + part
        names = sorted(self._processes.share(parts))
        loss, n_all, tokens_all, stop, *summed = self._processes.sums(
            [loss, n, tokens, float(self._wish is not None), *(parts.get(name, 0.0) for name in names)]
        )
        share = (place.tokens + tokens_all / 2) / self._total
        rate = learning_rate(min(share, 1.0), settings)
        norm = self._move(rate, int(n_all), rows)
        place.update, place.rows, place.tokens = (
            place.update + 1, place.rows + len(rows), place.tokens + int(tokens_all),
        )  # fmt: skip
        if stop and self._wish is None:
            self._wish = Cancelled("stopped with the first process")
        self._note_update(
            started, int(tokens_all), loss / max(1.0, n_all), norm, rate,
            {name: part / max(1.0, n_all) for name, part in zip(names, summed, strict=True)},
        )  # fmt: skip

    def _move(self, rate: float, n: int, rows: Sequence[int]) -> float:
        """Update by the mean over ``n`` targets; the gradient's norm."""
        if not n:
            return 0.0
        self._processes.add_up(self._optimizer.gradients())
        norm = self._optimizer.step(rate, n=n)
        if not math.isfinite(norm):
            raise self._broken("gradient", norm, self._training.batch(list(rows)), {})
        self._trainable.before_forward()
        return norm

    def _next_rows(self) -> list[int]:
        """Numbers of the rows of the next update; an epoch's order is drawn anew, and its last update may be shorter."""
        wanted = max(1, self._settings.batch_tokens // self._training.window)
        epoch, first = divmod(self.position.rows, self._training.n_rows)
        return [int(row) for row in self._training.order(epoch, self._settings.seed)[first : first + wanted]]

    # --- measuring ------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Measure on held-out rows, and keep the weights where they are the best so far."""
        place, objective = self.position, self._objective
        self._model.eval()
        found = measure(
            objective, self._held_out, self._rows, self._processes,
            lambda done: self._tell(f"held-out row {done + 1} of {len(self._rows)}"),
        )  # fmt: skip
        samples = self._sampler() if self._sampler is not None and self._processes.first else []
        value = found.mean(objective.chosen_by)
        if not math.isfinite(value):
            raise self._broken(
                f"held-out {objective.chosen_by}", value, self._held_out.batch(self._rows[:1]), {}
            )
        first, better = place.measured_at < 0, value < place.best
        if first:
            self._before = found
        if better:
            place.best, place.best_tokens, place.without_best = value, place.tokens, 0
            self._best, self._after = self._weights.copied(), found
        else:
            place.without_best += 1
        place.measured_at = place.tokens
        self._point("held_out", tokens=place.tokens, values=found.means, best=better, samples=samples)

    # --- telling --------------------------------------------------------------------------------------

    def _tell(self, doing: str) -> None:
        """Report how far it is. Among several processes a wish to stop waits until all can hear it."""
        if not self._processes.first:
            return
        latest = next((p for p in reversed(self._curve.points) if p["kind"] == "update"), None)
        said = "" if latest is None else f": loss {latest['loss']:.4f}, {latest['tokens_per_s']:.0f} tokens/s"
        try:
            self._progress(min(self.position.tokens, self._total), self._total, f"{doing}{said}")
        except Cancelled as wish:
            if self._processes.n == 1:
                raise
            self._wish = wish

    def _stop_if_asked(self) -> None:
        if self._wish is not None:
            raise self._wish

    def _note_update(
        self, started: float, tokens: int, loss: float, norm: float, rate: float, parts: dict[str, float]
    ) -> None:
        place = self.position
        self._pace = [*self._pace, (time.monotonic() - started, tokens)][-PACE:]
        pace = sum(n for _, n in self._pace) / sum(seconds for seconds, _ in self._pace)
        self._point(
            "update", update=place.update, tokens=place.tokens, loss=loss, parts=parts, gradient_norm=norm,
            learning_rate=rate, tokens_per_s=pace, seconds_left=max(0, self._total - place.tokens) / max(pace, 1e-9),
        )  # fmt: skip

    def _point(self, kind: Any, **values: Any) -> None:
        self._curve.add(kind, **values)
        self.position.points = len(self._curve.points)

    def _broken(self, what: str, value: float, batch: Batch, parts: dict[str, float]) -> CannotCompress:
        return broken(
            what, value, update=self.position.update + 1, tokens=self.position.tokens, batch_hash=batch.content_hash,
            parts=parts, settings=self._settings, resumable=self._folder is not None and self.position.update > 0,
        )  # fmt: skip

    # --- checkpoints ----------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the checkpoint; where the disk is full, the one before stays and the training goes on."""
        self._saved_at = time.monotonic()
        if self._folder is None or self._before is None or self._after is None:
            return
        self._curve.flush()
        tensors = {f"weight:{name}": value for name, value in self._weights.exact.items()}
        tensors |= {f"moment:{name}": value for name, value in self._optimizer.state().items()}
        if self.position.best_tokens:
            tensors |= {f"best:{name}": value for name, value in self._best.items()}
        facts = {
            "position": asdict(self.position),
            "before": self._before.as_json(),
            "after": self._after.as_json(),
        }
        refused = write_checkpoint(self._folder, key=self._key, tensors=tensors, facts=facts)
        if refused:
            self._notes.append(f"A checkpoint could not be written and the one before was kept: {refused}.")

    def _resumed(self) -> Curve:
        """Take up the folder's checkpoint where there is one of this training; its curve, cut to where it was."""
        folder = self._folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        found = None if folder is None else read_checkpoint(folder, key=self._key)
        found = self._processes.share(found)
        file = None if folder is None else folder / CURVE
        if found is None:
            return Curve(file)
        start = self._weights.copied()
        self._weights.put(_under("weight:", found.tensors))
        self._optimizer.restore(_under("moment:", found.tensors))
        self._trainable.before_forward()
        self._best = _under("best:", found.tensors) or start
        self.position = Position(**found.facts["position"])
        self._before, self._after = HeldOut.of(found.facts["before"]), HeldOut.of(found.facts["after"])
        self._notes.append(f"Taken up again at {self.position.tokens:,} tokens.")
        return Curve(file, keep=self.position.points)


def _under(prefix: str, tensors: Any) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


def _learns(batch: Batch) -> bool:
    return batch.labels_B is not None or batch.n_targets > 0


@contextmanager
def _drawn_from(seed: int, update: int, piece: int) -> Iterator[None]:
    """Random numbers of torch from these three, and the caller's own again behind the block."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + update) * 10_007 + piece)
        yield


@contextmanager
def _checkpointed_activations(loaded: LoadedModel, settings: TrainingSettings) -> Iterator[None]:
    if not settings.gradient_checkpointing:
        yield
        return
    loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        loaded.model.gradient_checkpointing_disable()
