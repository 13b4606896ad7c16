"""AWQ: channels with large activations get finer steps, by scales folded into what comes before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field

from core.compress._folding import EXACT
from core.compress._grid import GridSettings, assign, grid_notes, put, rounded, scale_dtype
from core.compress._grid_fit import Grid, grouped
from core.compress._matrices import Matrix, matrices
from core.compress._report import VIEWS, headline, table, untouched_note
from core.compress._scale_search import Reader, fit_to_inputs, output_loss, search_scales, weight_sizes
from core.compress._scaling_places import Place, places
from core.compress._targets import Target, targets
from core.compress._walk import Collected, walk, walk_cost
from core.compress._windows import calibration_windows, shortage_note
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme, Scheme
from core.registry import method
from core.types import Cost, Documents, Metric, Progress, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy, Block

LOSS_VIEW = View(
    "heatmap", x="layer", y="projection", color="loss_left", frame="losses", midpoint=1.0,
    title="Change of the output on calibration text, of round-to-nearest's",
    tooltip=("module", "expert", "loss_nearest", "loss_scaled", "loss"),
)  # fmt: skip
SCALE_VIEW = View(
    "table", x="source", text="ratio", frame="scales", title="Scales found", tooltip=("loss", "loss_before", "largest"),
)  # fmt: skip


class AwqSettings(GridSettings):
    """Which grid, how scales and ranges are searched, and on which text."""

    scale_steps: int = Field(
        default=20, ge=0, le=100, description="Ratios r = 0, 1/n … 1 tried for scales; 0: no scales"
    )
    duo: bool = Field(
        default=False,
        description="Divide scales by the size of weights too: s = x^r / w^(1 - r) instead of x^r",
    )
    clip_steps: int = Field(
        default=10, ge=0, le=50, description="Narrower ranges tried for every group; 0: no clipping"
    )
    max_shrink: float = Field(
        default=0.5, gt=0, lt=1, description="Share of a group's range that clipping may give up"
    )
    refits: int = Field(
        default=2, ge=0, le=20, description="Least-squares fits of every group's scale after clipping"
    )
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice of windows")


def _cost(anatomy: Anatomy, n_tokens: int, settings: AwqSettings) -> Cost:
    return walk_cost(
        anatomy, samples=settings.samples, sample_tokens=settings.sample_tokens, collect=["gram", "mean_abs"]
    )


@method(
    "compress",
    title="AWQ",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2306.00978",
    cost=_cost,
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: AwqSettings,
) -> Result:
    """Scale input channels by the size of their activations before rounding, then clip: rounding hits what matters least.

    Ŵ = Q(W · s) / s with s = mean|X|^r: the 1 / s is folded exactly into what comes before (norm → q, k, v; values →
    output, per key/value head; norm → gate, up, router; up → down, in every expert too), so files stay plain. r is the
    one of a grid whose error ‖X (Ŵ - W)ᵀ‖² of the layers' own outputs is least over all calibration tokens, by
    H = XᵀX. r = 0 is round-to-nearest, so no layer is worse on that text. Then every group's range is clipped and its
    scale refitted where that moves the outputs less. Blocks go in order, each calibrated on what the ones before give.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    started = time.monotonic()
    schemes = assign(loaded, settings)
    windows_BP = calibration_windows(
        loaded,
        calibration,
        samples=settings.samples,
        sample_tokens=settings.sample_tokens,
        seed=settings.seed,
    )

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        return _Step(loaded, block, collected, schemes, settings).run()

    with loaded.lock, torch.inference_mode():
        reports = walk(
            loaded, windows_BP, change, collect=["gram", "mean_abs"], progress=progress, scratch=scratch
        )
        rows = [row for report in reports for row in report["rows"]]
        rows += [_outside(loaded, t, schemes.get(t.name)) for t in targets(loaded) if t.layer is None]
    frame = table(rows)
    losses = pd.DataFrame([line for report in reports for line in report["losses"]]).astype(
        {"expert": "Int64"}
    )
    scales = pd.DataFrame([line for report in reports for line in report["scales"]])
    unreached = int((losses["tokens"] == 0).sum())
    todo = targets(loaded)
    notes = (
        shortage_note(windows_BP, settings.samples, calibration),
        f"{unreached} matrices of experts that no token reached were rounded to nearest."
        if unreached
        else "",
        "Errors of tensors are those of rounding: against the weights after scales were folded into them.",
        untouched_note(frame),
        *grid_notes(todo, schemes.values(), symmetric=settings.grid.symmetric),
    )
    frames, views = {"main": frame, "losses": losses}, [LOSS_VIEW, *VIEWS]
    if len(scales):
        frames["scales"] = scales
        views.append(SCALE_VIEW)
    return Result(
        frames,
        tuple(views),
        (
            Metric("output_loss_left", float(losses["loss"].sum() / losses["loss_nearest"].sum()), "", "lower", n=len(losses)),
            *headline(frame),
        ),
        Provenance(
            "awq", settings.model_dump(), loaded.fingerprint, inputs={"calibration": calibration.fingerprint},
            dtype=loaded.dtype, device=loaded.device, seconds=time.monotonic() - started,
            conditions={"calibration": calibration.name, "calibration_tokens": windows_BP.numel()},
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


class _Step:
    """One block: scales, then grids, then codes."""

    def __init__(
        self,
        loaded: LoadedModel,
        block: Block,
        collected: Collected,
        schemes: Mapping[str, Scheme],
        settings: AwqSettings,
    ) -> None:
        self.loaded, self.block, self.collected, self.settings = loaded, block, collected, settings
        self.schemes = schemes
        self.matrices = matrices(loaded, block)
        self.targets = [target for target in targets(loaded) if target.layer == block.index]
        self.grams = {name: seen.gram_II if seen.n else None for name, seen in collected.inputs.items()}
        """XᵀX as the matrices read X now: divided by the scales that were moved into them."""
        self.nearest: dict[str, float] = {}
        self.divided: dict[tuple[str, int | None], Tensor] = {}
        """What rows of a matrix were divided by: its outputs' errors are counted in what they were before."""

    def run(self) -> dict[str, Any]:
        found = {
            target.name: self.loaded.model.get_parameter(target.name).data.clone() for target in self.targets
        }
        self.nearest = {m.label: self._loss_of(m, m.read(), self._nearest(m)) for m in self.matrices}
        scales = self._scale() if self.settings.scale_steps else []
        losses, packed = [], {}
        for matrix in self.matrices:
            pack, line = self._round(matrix)
            packed.setdefault(matrix.name, []).append(pack)
            losses.append(line)
        rows = []
        for target in self.targets:
            packs = packed.get(target.name)
            now = self.loaded.model.get_parameter(target.name).data
            before = found[target.name] if packs is None else now.clone()
            rows.append(put(self.loaded, target, None if packs is None else _joined(packs, now), before))
        return {"rows": rows, "scales": scales, "losses": losses}

    def _scale(self) -> list[dict[str, Any]]:
        """Find and apply the scales of every place; their lines. The block's output must stay what it was."""
        probe_bPD = self.collected.stream_BPD[:1]
        before_bPD, lines = self.collected.run(probe_bPD), []
        for place in places(self.loaded, self.block):
            reached = [m for m in place.readers if self.grams[m.inputs] is not None]
            if reached:
                lines.append(self._scale_at(place, reached))
        moved = self.collected.run(probe_bPD) - before_bPD
        gap = float(moved.norm() / before_bPD.norm())
        if not gap <= EXACT[self.loaded.dtype]:
            raise CannotCompress(
                f"folding scales into {self.block.path} changed its output by {gap:.2g} of its size: something in it reads "
                "what was scaled in a way that is not known here; choose scale_steps=0"
            )
        return lines

    def _scale_at(self, place: Place, reached: list[Matrix]) -> dict[str, Any]:
        readers = [
            Reader(m.read(), self.grams[m.inputs], self._nearest_of(m), by_rows=not m.transposed)
            for m in reached
        ]
        mean_abs_I = self._mean_abs(reached)
        sizes_I = weight_sizes([r.weight_OI for r in readers], self._scheme(reached[0]).group_size)
        result = search_scales(
            readers, place.pool(mean_abs_I), steps=self.settings.scale_steps,
            weight_size_S=place.pool(sizes_I) if self.settings.duo else None, spread=place.spread,
        )  # fmt: skip
        if result.scale_S is not None:
            place.apply(result.scale_S)
            scale_I = place.spread(result.scale_S)
            if place.divided is not None:
                name, expert, rows_S = place.divided
                self._divisor(name, expert)[rows_S] *= result.scale_S
            for inputs in {m.inputs for m in place.readers}:
                gram_II = self.grams[inputs]
                if gram_II is not None:
                    self.grams[inputs] = gram_II / (scale_I[:, None] * scale_I)
        return {
            "layer": self.block.index,
            "source": place.source,
            "ratio": result.ratio,
            "largest": 1.0 if result.scale_S is None else float(result.scale_S.max()),
            "loss_before": result.loss_before,
            "loss": result.loss,
        }

    def _mean_abs(self, reached: list[Matrix]) -> Tensor:
        """mean |X| over the tokens of all readers, each activation once."""
        seen = {m.inputs: self.collected.inputs[m.inputs] for m in reached}.values()
        total_I = torch.stack([inputs.mean_abs_I * inputs.n for inputs in seen]).sum(0)
        mean_I: Tensor = total_I / sum(inputs.n for inputs in seen)
        return mean_I

    def _round(self, matrix: Matrix) -> tuple[PackedTensor, dict[str, Any]]:
        """The codes of one matrix, and what its outputs lose."""
        weight_OI, scheme, gram_II = matrix.read(), self._scheme(matrix), self.grams[matrix.inputs]
        stored = weight_OI.T.contiguous() if matrix.transposed else weight_OI
        nearest = self._nearest(matrix)
        line = {
            "module": matrix.module, "layer": matrix.layer, "projection": _projection(matrix), "expert": matrix.expert,
            "tokens": self.collected.inputs[matrix.inputs].n, "loss_nearest": self.nearest[matrix.label],
            "loss_scaled": 0.0, "loss": 0.0, "loss_left": 1.0,
        }  # fmt: skip
        if gram_II is None:
            return nearest, line
        line["loss_scaled"] = line["loss"] = self._loss_of(matrix, weight_OI, nearest)
        packed = nearest
        if self.settings.clip_steps or self.settings.refits:
            groups = grouped(stored, scheme)
            grid = fit_to_inputs(
                groups, Grid.of(nearest), gram_II, transposed=matrix.transposed, clip_steps=self.settings.clip_steps,
                max_shrink=self.settings.max_shrink, refits=self.settings.refits,
            )  # fmt: skip
            packed = grid.pack(groups)
            line["loss"] = self._loss_of(matrix, weight_OI, packed)
        line["loss_left"] = line["loss"] / line["loss_nearest"] if line["loss_nearest"] else 1.0
        return packed, line

    def _divisor(self, name: str, expert: int | None) -> Tensor:
        rows = next(m.shape[0] for m in self.matrices if (m.name, m.expert) == (name, expert))
        ones_O = torch.ones(rows, device=self.loaded.model.device)
        return self.divided.setdefault((name, expert), ones_O)

    def _loss_of(self, matrix: Matrix, weight_OI: Tensor, packed: PackedTensor) -> float:
        """‖X (Ŵ - W)ᵀ‖², in the units the outputs had before any of them were divided."""
        gram_II = self.grams[matrix.inputs]
        if gram_II is None:
            return 0.0
        values = packed.dequantize().float()
        error_OI = (values.T if matrix.transposed else values) - weight_OI
        return output_loss(error_OI * self._divisor(matrix.name, matrix.expert)[:, None], gram_II)

    def _nearest(self, matrix: Matrix) -> PackedTensor:
        """A matrix as it is now, rounded to nearest in the layout it is stored in."""
        weight_OI = matrix.read()
        stored = weight_OI.T.contiguous() if matrix.transposed else weight_OI
        return rounded(self._target(matrix), stored, self._scheme(matrix))

    def _nearest_of(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        """W [O, I] → its values after rounding to nearest, as they are stored."""
        scheme, target = self._scheme(matrix), self._target(matrix)
        dtype = scale_dtype(target, self.loaded.model.get_parameter(matrix.name).data)

        def values(weight_OI: Tensor) -> Tensor:
            stored = weight_OI.T if matrix.transposed else weight_OI
            given = quantize(stored, scheme, scale_dtype=dtype).dequantize().float()
            return given.T if matrix.transposed else given

        return values

    def _target(self, matrix: Matrix) -> Target:
        return next(target for target in self.targets if target.name == matrix.name)

    def _scheme(self, matrix: Matrix) -> IntegerScheme:
        scheme = self.schemes[matrix.name]
        assert isinstance(scheme, IntegerScheme), f"{matrix.name} is a matrix of a block, which has a grid"
        return scheme


def _outside(loaded: LoadedModel, target: Target, scheme: Scheme | None) -> dict[str, Any]:
    """Embedding, head and norms outside the blocks."""
    weight = loaded.model.get_parameter(target.name).data
    return put(loaded, target, None if scheme is None else rounded(target, weight, scheme), weight)


def _joined(packs: list[PackedTensor], like: Tensor) -> PackedTensor:
    """One matrix's packed form, or all experts' as one."""
    if like.ndim == 2:
        return packs[0]
    scales = [pack.scale for pack in packs if pack.scale is not None]
    return PackedTensor(torch.stack([p.codes for p in packs]), torch.stack(scales), None, packs[0].scheme)


def _projection(matrix: Matrix) -> str:
    return ".".join(part for part in matrix.module.split(".")[-2:] if not part.isdigit())
