"""Low rank: fewer value dimensions in every head of a latent attention, where the config can say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field

from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected, cost_of_walk, walk
from core.calibrate.windows import read_calibration
from core.errors import BadInput, CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.reshape.rebuilt import built, edited_config, filled, probe_output, refuse_gap, sliced
from core.reshape.structure import Inventory, structural_result
from core.reshape.value_rank import truncated
from core.saving.storable import storable
from core.types import Documents, Metric, Progress, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Block

STEP = 8
"""Value dimensions left are a multiple of this, as attention kernels want."""
_VIEWS = (
    View(
        "heatmap", x="head", y="layer", color="error", frame="heads",
        title="Change of what each head writes, relative", tooltip=("error",),
    ),
)  # fmt: skip


class LowRankSettings(Settings):
    """How far the rank is lowered, and what error counts."""

    share: float = Field(
        default=0.25, gt=0, lt=1, description="Share of every head's value dimensions to remove"
    )
    weighting: Literal["outputs", "weights"] = Field(
        default="outputs",
        description="outputs: least error of what heads write on calibration text; weights: of the matrices themselves",
    )
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice of windows")


@method(
    "compress",
    title="Low rank",
    needs=["decoder", "text", "calibration"],
    paper="https://arxiv.org/abs/2403.07378",
    cost=cost_of_walk("gram"),
    group="prune",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: LowRankSettings,
) -> Result:
    """Lower the rank of every head's value–output product, for DeepSeek's latent attention, where it can be stored.

    A weight W = AB of low rank is two smaller matrices, and no plain architecture has a place for two where one was:
    stored dense it saves nothing, so for ordinary layers this method refuses. But a latent attention already holds two
    in a row: head h writes O_h V_h c, and the config says how wide the values between them are (v_head_dim). The best
    product of rank k, in the error of what heads write on text (SVD of O_h G_h^½, G_h = Σ z zᵀ of the values z), is then
    a model with v_head_dim = k that plain transformers loads, smaller and quicker.
    """
    loaded.refuse_if_packed()
    wide, rank = _refuse_others(loaded, settings)
    config = edited_config(loaded, {"v_head_dim": rank})
    with loaded.lock, torch.inference_mode():
        built(loaded, config)  # refused before anything is changed
        text = read_calibration(loaded, calibration, settings)
        before, as_stored = Inventory.of(loaded), storable(loaded)

        def change(block: Block, collected: Collected) -> list[float]:
            return _lower(loaded, block, collected, rank, settings, as_stored)

        errors = walk(
            loaded,
            text.windows_BP,
            change,
            collect=["gram"],
            progress=part_of(progress, 0, 0.9),
            scratch=scratch,
        )
        model, gap = _narrower(loaded, config, wide, rank)
    loaded.become(model)
    heads = _heads(errors)
    return structural_result(
        before,
        loaded,
        settings,
        method="low_rank",
        frames={"heads": heads},
        views=_VIEWS,
        metrics=[
            Metric("value_dimensions", rank, "per head"),
            Metric("head_output_error", float(heads["error"].mean()), "", "lower", n=len(heads)),
        ],
        notes=[
            f"Every head keeps {rank} of {wide} value dimensions.",
            text.shortage,
        ],
        inputs=text.inputs,
        conditions=text.conditions,
        exactness_gap=gap,
        exactness_check="output against the same model with the removed dimensions at zero, largest relative difference",
    )


def _heads(errors: Sequence[Sequence[float]]) -> pd.DataFrame:
    """One line per head."""
    return pd.DataFrame(
        [
            {"layer": layer, "head": head, "error": error}
            for layer, of_heads in enumerate(errors)
            for head, error in enumerate(of_heads)
        ]
    )


def _refuse_others(loaded: LoadedModel, settings: LowRankSettings) -> tuple[int, int]:
    """Value dimensions of a head before and after; raises ``CannotCompress`` for an architecture without such a size."""
    wide = getattr(loaded.model.config.get_text_config(), "v_head_dim", None)
    if wide is None or any(block.mixer != "latent" for block in loaded.anatomy.blocks):
        raise CannotCompress(
            f"{loaded.anatomy.architecture} has no place for two thin matrices where one was: a product of low rank, stored "
            "as one dense matrix, saves nothing. Only a latent attention (DeepSeek-V2, -V3) can say a lower rank in its "
            "config; here use prune_width, or fewer bits"
        )
    rank = round(wide * (1 - settings.share) / STEP) * STEP
    if not 0 < rank < wide:
        raise BadInput(
            f"share={settings.share} of {wide} value dimensions leaves {rank}; choose one that leaves a multiple of {STEP} "
            f"from {STEP} to {(wide - 1) // STEP * STEP}"
        )
    return wide, rank


def _lower(
    loaded: LoadedModel,
    block: Block,
    collected: Collected,
    rank: int,
    settings: LowRankSettings,
    as_stored: Callable[[Tensor], Tensor],
) -> list[float]:
    """Put the pair of lower rank in its place, zeros behind it; the error of each head."""
    by_module = {matrix.module: matrix for matrix in matrices(loaded, block)}
    value, output = by_module[block.v], by_module[block.o]
    heads = loaded.anatomy.n_heads
    value_HWR = value.read().view(heads, -1, value.shape[1])  # W: the keys' dimensions, then the values'
    output_OHv = output.read().view(output.shape[0], heads, -1)
    wide = output_OHv.shape[2]
    gram_II = collected.inputs[output.inputs].gram_II
    errors = []
    for head in range(heads):
        own = slice(head * wide, (head + 1) * wide)
        gram_vv = gram_II[own, own] if settings.weighting == "outputs" else None
        new_output, new_value, error = truncated(output_OHv[:, head], value_HWR[head, -wide:], gram_vv, rank)
        output_OHv[:, head], value_HWR[head, -wide:] = new_output, new_value
        errors.append(error)
    _write(value, value_HWR, as_stored)
    _write(output, output_OHv, as_stored)
    return errors


def _write(matrix: Matrix, weight: Tensor, as_stored: Callable[[Tensor], Tensor]) -> None:
    matrix.write(as_stored(weight.reshape(matrix.shape)))


def _narrower(loaded: LoadedModel, config: Any, wide: int, rank: int) -> tuple[Any, float]:
    """The model without the dimensions that are zero, and how far its output is from that with them."""
    heads, model = loaded.anatomy.n_heads, built(loaded, config)

    def kept(name: str, axis: int, before: int, after: int) -> Tensor:
        each = before // heads  # of o_proj the values, of kv_b_proj the keys' dimensions and then the values
        stay = torch.arange(each - wide + rank)
        return (torch.arange(heads)[:, None] * each + stay).flatten()

    filled(loaded, model, sliced(loaded, model, kept))
    return model, refuse_gap(loaded, probe_output(loaded, loaded.model), probe_output(loaded, model))
