"""Choosing what stays of every block, and making good what goes: the model is edited in place, its shapes stay.

Columns of what goes become zeros in the projection behind it, so that cutting them out afterwards changes nothing.

Legend: ``L`` blocks, ``U`` units of a block, ``O`` outputs, ``I`` inputs, ``D`` d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected, walk
from core.capture import capture
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.reshape.importance import ablated, best, complement, magnitudes, norm_outputs
from core.reshape.narrower import Part, Units, columns_of, n_units, writer
from core.reshape.reconstruction import DAMPING, active, reconstructed, without, written
from core.reshape.sparsity import output_error
from core.saving.storable import storable
from core.types import Metric, Progress, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Block

Importance = Literal["output", "activation", "magnitude", "ablation", "listed", "random"]
MEASURED = ("output", "activation")
"""What is read off the inputs of the projection behind the cut."""
MOST_UNITS = 64
"""Units of a layer that are listed one by one."""


@dataclass(frozen=True)
class Wish:
    """What is to be cut, and by which measure."""

    part: Part
    importance: Importance
    n_kept: int
    compensate: bool
    seed: int
    removed: Units = field(default_factory=dict)
    """Of importance listed: block → units."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of every block, and what it costs."""

    kept: Units
    scores_LU: Tensor | None = None
    errors: tuple[tuple[float, float], ...] = ()
    """Per block: relative change of what the projection behind the cut gives, as it is and without compensation."""

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """``layers``, and ``units`` where they are few enough to be read."""
        layers = pd.DataFrame([self._row(layer) for layer in sorted(self.kept)])
        if self.scores_LU is None or self.scores_LU.shape[1] > MOST_UNITS:
            return {"layers": layers}
        units = [
            {
                "layer": layer, "unit": unit, "score": float(score), "relative_score": float(score / row_U.mean()),
                "status": "kept" if unit in self.kept[layer] else "removed",
            }
            for layer, row_U in enumerate(self.scores_LU)
            for unit, score in enumerate(row_U)
        ]  # fmt: skip
        return {"units": pd.DataFrame(units), "layers": layers}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Mean over blocks of the change of what the projections behind the cut give."""
        if not self.errors:
            return ()
        now, plain = (sum(found) / len(found) for found in zip(*self.errors, strict=True))
        return (
            Metric("output_error", now, "", "lower", n=len(self.errors)),
            Metric("output_error_uncompensated", plain, "", "lower", n=len(self.errors)),
        )

    def _row(self, layer: int) -> dict[str, Any]:
        kept = list(self.kept[layer])
        row: dict[str, Any] = {"layer": layer, "kept": len(kept), "removed": "", "score_removed": None}
        row["output_error"], row["output_error_plain"] = self.errors[layer] if self.errors else (None, None)
        if self.scores_LU is not None:
            scores_U = self.scores_LU[layer]
            row["score_removed"] = 1 - float(scores_U[kept].sum() / scores_U.sum())
            gone = complement(len(scores_U), kept)
            row["removed"] = ", ".join(map(str, gone[:MOST_UNITS])) + (" …" if len(gone) > MOST_UNITS else "")
        return row


def choose(
    loaded: LoadedModel, windows_BP: Tensor | None, wish: Wish, progress: Progress, *, scratch: Path | None
) -> Cut:
    """Decide, and edit the model; ``windows_BP`` is None where no text is looked at. Hold the lock, without gradients."""
    if wish.part == "hidden":
        return _hidden(loaded, windows_BP, wish, progress)
    known = _scores_beforehand(loaded, windows_BP, wish, part_of(progress, 0.0, 0.4))
    if windows_BP is None or not (wish.compensate or wish.importance in MEASURED):
        cuts = [_zeroed(loaded, block, wish, known) for block in loaded.anatomy.blocks]
        return Cut({layer: cut["kept"] for layer, cut in enumerate(cuts)}, known)

    as_stored = storable(loaded)

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        return _refitted(loaded, block, collected, wish, known, as_stored)

    ahead = part_of(progress, 0.0 if wish.importance in MEASURED else 0.4, 1.0)
    reports = walk(loaded, windows_BP, change, collect=["gram"], progress=ahead, scratch=scratch)
    scores_LU = known if known is not None else torch.tensor([report["scores"] for report in reports])
    return Cut(
        {layer: report["kept"] for layer, report in enumerate(reports)},
        None if wish.importance == "listed" else scores_LU,
        tuple((report["error"], report["plain"]) for report in reports),
    )


def _scores_beforehand(
    loaded: LoadedModel, windows_BP: Tensor | None, wish: Wish, progress: Progress
) -> Tensor | None:
    """Scores [L, U] of a measure that looks at the whole model at once; None for one that is taken on the walk."""
    anatomy = loaded.anatomy
    shape = (anatomy.n_layers, n_units(anatomy, wish.part))
    if wish.importance == "magnitude":
        return magnitudes(loaded, wish.part)
    if wish.importance == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(wish.seed))
    if wish.importance == "ablation":
        assert windows_BP is not None, "an ablation map is made on text"
        return ablated(loaded, windows_BP, wish.seed, progress).view(*shape, -1).sum(-1)
    if wish.importance == "listed":
        found = torch.ones(shape)
        for layer, units in wish.removed.items():
            found[layer, list(units)] = 0
        return found
    return None


def _kept(loaded: LoadedModel, wish: Wish, scores_U: Tensor) -> list[int]:
    groups = loaded.anatomy.n_kv_heads if wish.part == "heads" else 1
    return best(scores_U, wish.n_kept, groups=groups)


def _behind(loaded: LoadedModel, block: Block, part: Part) -> Matrix:
    """The projection that reads the units."""
    path = writer(block, part)
    return next(matrix for matrix in matrices(loaded, block) if matrix.module == path)


def _zeroed(loaded: LoadedModel, block: Block, wish: Wish, known: Tensor | None) -> dict[str, Any]:
    """Cut by scores that are known, without looking at text."""
    assert known is not None, "a measured importance needs text"
    kept = _kept(loaded, wish, known[block.index])
    matrix = _behind(loaded, block, wish.part)
    matrix.write(without(matrix.read(), columns_of(loaded.anatomy, wish.part, kept).to(loaded.device)))
    return {"kept": kept}


def _refitted(
    loaded: LoadedModel,
    block: Block,
    collected: Collected,
    wish: Wish,
    known: Tensor | None,
    as_stored: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Cut one block by what its units write on text, and fit the projection to what stays."""
    matrix = _behind(loaded, block, wish.part)
    weight_OI, gram_II = matrix.read(), collected.inputs[matrix.inputs].gram_II
    width = weight_OI.shape[1] // n_units(loaded.anatomy, wish.part)
    if known is not None:
        scores_U = known[block.index]
    else:
        scores_U = (
            written(weight_OI, gram_II, width) if wish.importance == "output" else active(gram_II, width)
        )
    kept = _kept(loaded, wish, scores_U.cpu())
    columns_K = columns_of(loaded.anatomy, wish.part, kept).to(loaded.device)
    plain_OI = without(weight_OI, columns_K)
    new_OI = plain_OI
    if wish.compensate:
        new_OI = as_stored(reconstructed(weight_OI, gram_II, columns_K, damping=DAMPING))
    matrix.write(new_OI)
    return {
        "kept": kept, "scores": scores_U.tolist(), "error": output_error(weight_OI, new_OI, gram_II),
        "plain": output_error(weight_OI, plain_OI, gram_II),
    }  # fmt: skip


def _hidden(loaded: LoadedModel, windows_BP: Tensor | None, wish: Wish, progress: Progress) -> Cut:
    """The same dimensions of the stream for the whole model; its norms are told what they will no longer count."""
    anatomy = loaded.anatomy
    if wish.importance in MEASURED:
        assert windows_BP is not None, "norm outputs are measured on text"
        scores_D = norm_outputs(loaded, windows_BP, part_of(progress, 0.0, 0.5))
    else:
        known = _scores_beforehand(loaded, windows_BP, wish, progress)
        assert known is not None
        scores_D = known[0]
    kept = best(scores_D, wish.n_kept)
    if wish.compensate:
        assert windows_BP is not None, "norms are rescaled on text"
        _rescale_norms(
            loaded, windows_BP, torch.tensor(kept, device=loaded.device), part_of(progress, 0.5, 1.0)
        )
    return Cut(dict.fromkeys(range(anatomy.n_layers), kept), scores_D.expand(anatomy.n_layers, -1))


def _rescale_norms(loaded: LoadedModel, windows_BP: Tensor, kept_K: Tensor, progress: Progress) -> None:
    """γ times the median over tokens of σ_kept / σ_all: a norm over fewer dimensions divides by another number."""
    anatomy = loaded.anatomy
    paths = [path for block in anatomy.blocks for path in (block.attention_norm, block.mlp_norm)]
    paths += [anatomy.final_norm] if anatomy.final_norm else []
    centred = isinstance(loaded.model.get_submodule(paths[0]), torch.nn.LayerNorm)

    def ratios(path: str, stream_BPD: Tensor) -> Tensor:
        wide, part = stream_BPD.float(), stream_BPD[..., kept_K].float()
        if centred:
            return (part.std(-1) / wide.std(-1)).flatten()
        return (part.square().mean(-1) / wide.square().mean(-1)).sqrt().flatten()

    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    for number, ids_P in enumerate(windows_BP):
        progress(number, len(windows_BP), f"scales of norms on window {number + 1} of {len(windows_BP)}")
        with capture(loaded.model, paths, reduce=ratios, inputs=True) as seen:
            loaded.model(input_ids=ids_P[None])
        for path, values in seen.items():
            found[path].append(values)
    for path, parts in found.items():
        weight = loaded.model.get_submodule(path).weight.data
        factor = torch.cat(parts).median()
        weight.copy_((weight + anatomy.norm_offset) * factor - anatomy.norm_offset)
