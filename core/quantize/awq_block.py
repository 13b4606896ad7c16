"""AWQ in one block: scales for every place, then a grid for every matrix, then codes; and what each step left of the loss.

Legend: ``O`` outputs, ``I`` inputs, ``S`` scales of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected
from core.lazy import torch
from core.models.anatomy import Block
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.numerics.integer import quantize
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme, Scheme
from core.quantize.columns import Part, gptq
from core.quantize.grid import put, rounded, scale_dtype
from core.quantize.grid_fit import Grid, grouped
from core.quantize.scale_search import Reader, fit_to_inputs, output_loss, search_scales, weight_sizes
from core.quantize.scaling_places import Place, places, unchanged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AwqOptions:
    """How scales, grids and codes are found."""

    scale_steps: int
    duo: bool
    clip_steps: int
    max_shrink: float
    refits: int
    by_gptq: bool
    damping: float


class AwqBlock:
    """One block on its way to its grids; weights are edited in place."""

    def __init__(
        self,
        loaded: LoadedModel,
        block: Block,
        collected: Collected,
        schemes: Mapping[str, Scheme],
        options: AwqOptions,
    ) -> None:
        self.loaded, self.block, self.collected = loaded, block, collected
        self.schemes, self.options = schemes, options
        self.matrices = matrices(loaded, block)
        self.targets = {target.name: target for target in targets(loaded) if target.layer == block.index}
        self.grams = {name: seen.gram_II if seen.n else None for name, seen in collected.inputs.items()}
        """XᵀX as the matrices read X now: divided by the scales that were moved into them. None: no token came."""
        self.divided = {m.label: torch.ones(m.shape[0], device=loaded.model.device) for m in self.matrices}
        """What each row was divided by: errors of outputs are counted in what these were before."""
        self.nearest = {m.label: self._loss(m, m.read(), self._rounded(m)) for m in self.matrices}

    def run(self) -> dict[str, Any]:
        """Quantize the block: lines of the table, of the losses and of the scales, and how exact the folds were."""
        found = {name: self.loaded.model.get_parameter(name).data.clone() for name in self.targets}
        scales, gaps = list[dict[str, Any]](), list[float]()
        if self.options.scale_steps:
            with unchanged(self.loaded, self.block, self.collected) as gaps:
                for place in places(self.loaded, self.block):
                    scales += self._scale(place)
        packed: dict[str, dict[int | None, PackedTensor]] = {}
        losses = []
        for inputs in dict.fromkeys(matrix.inputs for matrix in self.matrices):
            together = [matrix for matrix in self.matrices if matrix.inputs == inputs]
            for matrix, pack, line in self._round(together):
                packed.setdefault(matrix.name, {})[matrix.expert] = pack
                losses.append(line)
        rows = []
        for name, target in self.targets.items():
            now = self.loaded.model.get_parameter(name).data
            pack_of = packed.get(name)
            before = found[name] if pack_of is None else now.clone()
            rows.append(put(self.loaded, target, None if pack_of is None else _joined(pack_of), before))
        return {"rows": rows, "losses": losses, "scales": scales, "gap": max(gaps, default=0.0)}

    def _scale(self, place: Place) -> list[dict[str, Any]]:
        """Find and apply the scales of one place; its line, or none where no token came."""
        reached = [m for m in place.readers if self.grams[m.inputs] is not None]
        if not reached:
            return []
        readers = [
            Reader(m.read(), self.grams[m.inputs], self._values_of(m), by_rows=not m.transposed)
            for m in reached
        ]
        sizes_I = weight_sizes([r.weight_OI for r in readers], self._scheme(reached[0]).group_size)
        found = search_scales(
            readers, place.pool(self._mean_abs(reached)), steps=self.options.scale_steps,
            weight_size_S=place.pool(sizes_I) if self.options.duo else None, spread=place.spread,
        )  # fmt: skip
        if found.scale_S is not None:
            self._apply(place, found.scale_S)
        return [
            {
                "layer": self.block.index,
                "source": place.source,
                "ratio": found.ratio,
                "largest": 1.0 if found.scale_S is None else float(found.scale_S.max()),
                "loss_before": found.loss_before,
                "loss": found.loss,
            }
        ]

    def _apply(self, place: Place, scale_S: Tensor) -> None:
        place.apply(scale_S)
        if place.divided is not None:
            name, expert, rows_S = place.divided
            source = next(m for m in self.matrices if (m.name, m.expert) == (name, expert))
            self.divided[source.label][rows_S] *= scale_S
        scale_I = place.spread(scale_S)
        for inputs in {matrix.inputs for matrix in place.readers}:
            gram_II = self.grams[inputs]
            if gram_II is not None:
                self.grams[inputs] = gram_II / (scale_I[:, None] * scale_I)

    def _mean_abs(self, reached: Sequence[Matrix]) -> Tensor:
        """mean |X| over the tokens of all readers, each activation once."""
        seen = {m.inputs: self.collected.inputs[m.inputs] for m in reached}.values()
        total_I = torch.stack([inputs.mean_abs_I * inputs.n for inputs in seen]).sum(0)
        mean_I: Tensor = total_I / sum(inputs.n for inputs in seen)
        return mean_I

    def _round(self, together: Sequence[Matrix]) -> list[tuple[Matrix, PackedTensor, dict[str, Any]]]:
        """Codes of the matrices that read one activation, each with its line of the losses."""
        gram_II = self.grams[together[0].inputs]
        tokens = self.collected.inputs[together[0].inputs].n
        nearest = [self._rounded(matrix) for matrix in together]
        if gram_II is None:
            return [
                (m, pack, self._line(m, tokens, pack, pack))
                for m, pack in zip(together, nearest, strict=True)
            ]
        fitted = [self._fitted(m, pack, gram_II) for m, pack in zip(together, nearest, strict=True)]
        packs = [pack for _, pack in fitted]
        if self.options.by_gptq:
            found = self._by_gptq(together, [grid for grid, _ in fitted], gram_II)
            packs = [self._better(*each) for each in zip(together, found, packs, strict=True)]
        return [
            (m, pack, self._line(m, tokens, scaled, pack))
            for m, pack, scaled in zip(together, packs, nearest, strict=True)
        ]

    def _better(self, matrix: Matrix, one: PackedTensor, other: PackedTensor) -> PackedTensor:
        """The form that moves the matrix's outputs less; a loss that is no number loses."""
        weight_OI = matrix.read()
        return one if self._loss(matrix, weight_OI, one) < self._loss(matrix, weight_OI, other) else other

    def _fitted(self, matrix: Matrix, nearest: PackedTensor, gram_II: Tensor) -> tuple[Grid, PackedTensor]:
        """The matrix's grid, clipped and refitted, and the matrix rounded to nearest on it."""
        grid, groups = Grid.of(nearest), grouped(_stored(matrix, matrix.read()), self._scheme(matrix))
        if self.options.clip_steps or self.options.refits:
            grid, _ = fit_to_inputs(
                groups, grid, gram_II, transposed=matrix.transposed, clip_steps=self.options.clip_steps,
                max_shrink=self.options.max_shrink, refits=self.options.refits,
            )  # fmt: skip
        return grid, grid.pack(groups)

    def _by_gptq(
        self, together: Sequence[Matrix], grids: Sequence[Grid], gram_II: Tensor
    ) -> list[PackedTensor]:
        """The matrices rounded on their grids by GPTQ, side by side."""
        parts = [_part(matrix, grid) for matrix, grid in zip(together, grids, strict=True)]
        weight_NIO = torch.cat([matrix.read().T for matrix in together], 1)[None]
        result = gptq(weight_NIO, gram_II[None], parts, damping=self.options.damping, act_order=True)
        codes = torch.split(result.codes_NIO[0], [part.outputs for part in parts], -1)
        found = []
        for matrix, grid, codes_IO in zip(together, grids, codes, strict=True):
            stored = codes_IO if matrix.transposed else codes_IO.T
            zero = None if grid.zero_RG is None else grid.zero_RG.to(torch.int8)
            found.append(PackedTensor(stored.contiguous(), grid.scale_RG, zero, grid.scheme))
        return found

    def _line(self, matrix: Matrix, tokens: int, scaled: PackedTensor, final: PackedTensor) -> dict[str, Any]:
        nearest, weight_OI = self.nearest[matrix.label], matrix.read()
        loss = self._loss(matrix, weight_OI, final)
        return {
            "module": matrix.module,
            "layer": matrix.layer,
            "projection": matrix.projection,
            "expert": matrix.expert,
            "tokens": tokens,
            "loss_nearest": nearest,
            "loss_scaled": self._loss(matrix, weight_OI, scaled),
            "loss": loss,
            "loss_left": loss / nearest if nearest else 1.0,
        }

    def _loss(self, matrix: Matrix, weight_OI: Tensor, packed: PackedTensor) -> float:
        """‖X (Ŵ - W)ᵀ‖² over all tokens; 0 where none came."""
        gram_II = self.grams[matrix.inputs]
        if gram_II is None:
            return 0.0
        error_OI = _stored(matrix, packed.dequantize().float()) - weight_OI
        return output_loss(error_OI * self.divided[matrix.label][:, None], gram_II)

    def _rounded(self, matrix: Matrix) -> PackedTensor:
        """The matrix as it is now, rounded to nearest."""
        stored = _stored(matrix, matrix.read()).contiguous()
        return rounded(self.targets[matrix.name], stored, self._scheme(matrix))

    def _values_of(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        """W [O, I] → what rounding to nearest would make of it."""
        scheme, target = self._scheme(matrix), self.targets[matrix.name]
        dtype = scale_dtype(target, self.loaded.model.get_parameter(matrix.name).data)

        def values(weight_OI: Tensor) -> Tensor:
            packed = quantize(_stored(matrix, weight_OI), scheme, scale_dtype=dtype)
            return _stored(matrix, packed.dequantize().float())

        return values

    def _scheme(self, matrix: Matrix) -> IntegerScheme:
        scheme = self.schemes[matrix.name]
        assert isinstance(scheme, IntegerScheme), f"{matrix.name} is a matrix of a block, which has a grid"
        return scheme


def _stored(matrix: Matrix, weight_OI: Tensor) -> Tensor:
    """[O, I] to the layout it is stored in, or back."""
    return weight_OI.T if matrix.transposed else weight_OI


def _part(matrix: Matrix, grid: Grid) -> Part:
    outputs, inputs = matrix.shape
    one = replace(
        grid, scale_RG=grid.scale_RG[None], zero_RG=None if grid.zero_RG is None else grid.zero_RG[None]
    )
    channel = outputs if matrix.transposed else inputs
    return Part(one, outputs, grid.scheme.group_size or channel, matrix.transposed)


def _joined(packs: Mapping[int | None, PackedTensor]) -> PackedTensor:
    """One matrix's packed form, or all experts' as one."""
    if None in packs:
        return packs[None]
    of = [packs[expert] for expert in sorted(e for e in packs if e is not None)]
    scales = [pack.scale for pack in of if pack.scale is not None]
    return replace(of[0], codes=torch.stack([pack.codes for pack in of]), scale=torch.stack(scales))
