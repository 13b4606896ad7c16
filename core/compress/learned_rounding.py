"""Learned rounding: which way every weight is rounded, learned block by block by signed gradients (AutoRound)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field

from core.calibrate.walk import Collected, walk, walk_cost
from core.calibrate.windows import read_calibration
from core.errors import CannotCompress, CannotMeasure
from core.lazy import torch
from core.models.gradients import differentiable, require_gradients
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.schemes import IntegerScheme, Scheme
from core.quantize.grid import GridSettings, assign, grid_notes, put, put_nearest, rounded
from core.quantize.learned import Rounding
from core.registry import method
from core.saving.layout import refuse_fused_on_disk
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Cost, Documents, Metric, Progress, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy, Block

CHECKS = 5
"""Times the loss on all windows is measured on the way; the best state measured is kept."""
CHECK_BATCH = 8
"""Windows per batch when the loss is measured."""


class LearnedRoundingSettings(GridSettings):
    """Which grid, how long is learned, and on how much text."""

    iterations: int = Field(
        default=200, ge=0, le=5000, description="Updates per block; 0 is rounding to nearest"
    )
    batch: int = Field(default=8, ge=1, le=128, description="Windows per update")
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows at most")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens per window, at most the context length"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice and order of windows")


def _cost(anatomy: Anatomy, n_tokens: int, settings: LearnedRoundingSettings) -> Cost:
    """Three passes per update (a backward pass is two), and the checks; activations of a whole batch are held."""
    walked = walk_cost(anatomy, settings, collect=[])
    length = min(settings.sample_tokens, anatomy.context_length)
    tokens = settings.batch * length
    held = tokens * (12 * anatomy.d_model + 6 * anatomy.d_ff * max(1, anatomy.experts_per_token)) * 4
    targets_held = settings.samples * length * anatomy.d_model * 4
    updates = 3 * settings.iterations * settings.batch
    return Cost(
        walked.forwards + updates + (CHECKS + 1) * settings.samples, walked.extra_bytes + held + targets_held
    )


@method(
    "compress",
    title="Learned rounding",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2309.05516",
    cost=_cost,
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: LearnedRoundingSettings,
) -> Result:
    """Learn for every weight whether to round it up or down, so that each block gives what it gave before.

    Minimises ‖block(X; Ŵ) - block(X; W)‖² over calibration text, X being what the quantized blocks before it give, in a
    shift V of every value (half a step at most) and two shares α, β of every group's range. Each moves by
    ``1 / iterations``, falling to 0, against the sign of its gradient. Loss on all windows is measured at the start,
    which is rounding to nearest, and on the way; the best state is kept, so that no block is worse than round-to-nearest
    there. The dearest of these methods, meant for 2 and 3 bits. Embedding and head are rounded to nearest.
    """
    started = time.monotonic()
    schemes = assign(loaded, settings)
    refuse_fused_on_disk(loaded, schemes)
    text = read_calibration(loaded, calibration, settings)
    with loaded.lock:
        _refuse_without_gradients(loaded)
        rows, blocks = _learn_blocks(loaded, text.windows_BP, schemes, settings, progress, scratch)
    frame, curve = table(rows), pd.DataFrame(blocks)
    notes = (
        text.shortage,
        untouched_note(frame),
        *grid_notes(targets(loaded), schemes.values(), symmetric=settings.grid.symmetric),
    )
    return Result(
        {"main": frame, "blocks": curve},
        (CURVE_VIEW, *VIEWS),
        (*_metrics(curve, text.n_tokens), *headline(frame)),
        Provenance(
            "learned_rounding", settings.model_dump(mode="json"), loaded.fingerprint,
            inputs=text.inputs, conditions=text.conditions, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


CURVE_VIEW = View(
    "line", x="iteration", y="loss_left", color="layer", frame="blocks", nominal=True,
    title="Loss of each block's output, of rounding to nearest's", tooltip=("loss",),
)  # fmt: skip


def _learn_blocks(
    loaded: LoadedModel, windows_BP: Tensor, schemes: Mapping[str, Scheme], settings: LearnedRoundingSettings,
    progress: Progress, scratch: Path | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Every tensor's line of the report, in the model's order, and every measured loss of every block."""
    todo = targets(loaded)
    rows = [put_nearest(loaded, t, schemes.get(t.name)) for t in todo if t.layer is None]

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        mine = [target for target in todo if target.layer == block.index]
        learning = [target for target in mine if isinstance(schemes.get(target.name), IntegerScheme)]
        roundings = {target.name: _nearest(loaded, target, schemes[target.name]) for target in learning}
        curve = _Learning(loaded, roundings, collected, settings, block.index).run(progress)
        lines = []
        for target in mine:
            if target.name not in roundings:
                lines.append(put_nearest(loaded, target, schemes.get(target.name)))
                continue
            before = loaded.model.get_parameter(target.name).data
            lines.append(put(loaded, target, roundings[target.name].packed(), before))
        return {"rows": lines, "curve": curve}

    with torch.inference_mode(False), torch.no_grad():
        reports = walk(loaded, windows_BP, change, collect=[], progress=progress, scratch=scratch)
    rows += [row for report in reports for row in report["rows"]]
    order = {target.module: index for index, target in enumerate(todo)}
    rows.sort(key=lambda row: order[row["module"]])
    return rows, [line for report in reports for line in report["curve"]]


@dataclass(eq=False)
class _Learning:
    """The learning of one block."""

    loaded: LoadedModel
    roundings: dict[str, Rounding]
    collected: Collected
    settings: LearnedRoundingSettings
    layer: int

    def run(self, progress: Progress) -> list[dict[str, Any]]:
        """Leave the best state in ``roundings``; the losses measured."""
        stream_BPD = self.collected.stream_BPD
        wanted_BPD = torch.cat([self.collected.run(part) for part in torch.split(stream_BPD, CHECK_BATCH)])
        iterations, total = self.settings.iterations, len(stream_BPD)
        first = best = self._loss(wanted_BPD)
        curve = [self._line(0, first, first)]
        kept = self._state()
        generator = torch.Generator().manual_seed(self.settings.seed + self.layer)
        checks = {round(iterations * (check + 1) / CHECKS) for check in range(CHECKS)}
        for iteration in range(1, iterations + 1):
            rows = torch.randperm(total, generator=generator)[: self.settings.batch].to(stream_BPD.device)
            self._update(stream_BPD[rows], wanted_BPD[rows], (1 - (iteration - 1) / iterations) / iterations)
            progress(
                0.5 * iteration / iterations,
                1.0,
                f"learning block {self.layer + 1}: update {iteration} of {iterations}",
            )
            if iteration in checks:
                loss = self._loss(wanted_BPD)
                curve.append(self._line(iteration, loss, first))
                if loss < best:
                    best, kept = loss, self._state()
        for rounding, (shift, reach) in zip(self.roundings.values(), kept, strict=True):
            rounding.shift_RGK, rounding.reach_RG2 = shift, reach
        return curve

    def _update(self, stream_bPD: Tensor, wanted_bPD: Tensor, rate: float) -> None:
        for rounding in self.roundings.values():
            for learned in rounding.learned:
                learned.requires_grad_(True)
        with differentiable(), self._standing_in():
            given_bPD = self.collected.run(stream_bPD)
            (given_bPD - wanted_bPD).float().square().mean().backward()  # type: ignore[no-untyped-call]
        for rounding in self.roundings.values():
            rounding.step(rate)

    def _loss(self, wanted_BPD: Tensor) -> float:
        """Mean squared error of the block's output over all windows, with weights as they would be stored."""
        squares = 0.0
        with torch.no_grad(), self._standing_in():
            for stream, wanted in zip(
                torch.split(self.collected.stream_BPD, CHECK_BATCH),
                torch.split(wanted_BPD, CHECK_BATCH),
                strict=True,
            ):
                squares += float(
                    (self.collected.run(stream) - wanted).float().square().sum(dtype=torch.float64)
                )
        return squares / wanted_BPD.numel()

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        """Let the rounded weights stand in for the model's own."""
        owners = {name: self.loaded.model.get_submodule(name.rpartition(".")[0]) for name in self.roundings}
        own = {name: owners[name]._parameters[name.rpartition(".")[2]] for name in owners}
        for name, rounding in self.roundings.items():
            owners[name]._parameters[name.rpartition(".")[2]] = rounding.values().to(own[name].dtype)
        try:
            yield
        finally:
            for name, parameter in own.items():
                owners[name]._parameters[name.rpartition(".")[2]] = parameter

    def _state(self) -> list[tuple[Tensor, Tensor]]:
        return [(r.shift_RGK.detach().clone(), r.reach_RG2.detach().clone()) for r in self.roundings.values()]

    def _line(self, iteration: int, loss: float, first: float) -> dict[str, Any]:
        left = loss / first if first else 1.0
        return {"layer": self.layer, "iteration": iteration, "loss": loss, "loss_left": left}


def _nearest(loaded: LoadedModel, target: Target, scheme: Scheme) -> Rounding:
    weight = loaded.model.get_parameter(target.name).data
    return Rounding.nearest(weight, rounded(target, weight, scheme))


def _refuse_without_gradients(loaded: LoadedModel) -> None:
    with torch.inference_mode(False):
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
            if tensor.is_inference():  # made by an earlier step; autograd refuses to pass through it
                tensor.data = tensor.data.clone()
        try:
            require_gradients(loaded)
        except CannotMeasure as error:
            said = str(error).partition(";")[0]
            raise CannotCompress(
                f"{said}; learned rounding needs gradients, use gptq or awq instead"
            ) from None


def _metrics(curve: pd.DataFrame, n_tokens: int) -> tuple[Metric, ...]:
    first = curve[curve["iteration"] == 0]["loss"].sum()
    best = curve.groupby("layer")["loss"].min().sum()
    n = curve["layer"].nunique()
    return (
        Metric("block_loss", float(best), "", "lower", n=n),
        Metric("block_loss_nearest", float(first), "", "lower", n=n),
        Metric("calibration_tokens", n_tokens, "tokens", "higher"),
    )
