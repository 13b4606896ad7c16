"""Drop layers: take whole transformer blocks out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.calibrate.windows import calibration_windows, shortage_note
from core.errors import BadInput, CannotCompress
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.models.loaded import LoadedModel
from core.probes._interval import half_width
from core.registry import Settings, method
from core.reshape.depth import block_influence, evenly, greedy
from core.reshape.shallower import renumbered, without_blocks
from core.reshape.structure import Inventory, structural_result
from core.types import Cost, Documents, Metric, Progress, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy

Floats = NDArray[np.float64]
Criterion = Literal["block_influence", "loss", "last", "random", "listed", "even", "ends"]
READS_TEXT = ("block_influence", "loss")
BY_PLACE = {
    "last": "",
    "even": "Kept are round(linspace(0, L − 1, L')) of L blocks, as DistilBERT was made: a student to distil.",
    "ends": "Kept are the first and the last half of what stays: the middle is gone (symmetric dropping).",
}
"""Criteria that look at nothing but where a block is, and what is noted of them."""
LOSS_SAMPLES = 16
"""Each trial of criterion loss is a forward pass over this many windows, and there are up to count · layers trials."""
_VIEWS = (
    View(
        "bar", x="layer", y="score", color="status", frame="layers", nominal=True,
        title="Score of every block: the smallest go", tooltip=("half_width", "loss_increase"),
    ),
    View(
        "table", x="layer", text="status", frame="layers", title="What stays",
        tooltip=("new_index", "score", "half_width", "loss_increase"),
    ),
)  # fmt: skip


class DropLayersSettings(Settings):
    """Which blocks go, and how many."""

    count: int = Field(
        default=3, ge=1, le=512, description="Blocks to drop; as many as are named where listed"
    )
    criterion: Criterion = Field(
        default="block_influence",
        description="block_influence: those that turn the residual stream least; loss: one by one, whichever raises the "
        "loss least; last: those before the final one; even: keeps the first, the last and blocks evenly between; ends: takes "
        "out the middle; listed: named below; random: the control",
    )
    layers: str = Field(
        default="",
        max_length=2000,
        description="With criterion listed: blocks to drop, counted from 0, e.g. 11, 12",
    )
    keep_ends: bool = Field(default=True, description="Never drop the first or the last block")
    samples: int = Field(
        default=128,
        ge=1,
        le=4096,
        description="Calibration windows; loss reads at most 16 of them for each trial",
    )
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(
        default=0, ge=0, le=1_000_000, description="Seed of the windows and of criterion random"
    )


class _Choice(NamedTuple):
    """What goes, and why."""

    gone: tuple[int, ...]
    scores_L: Floats
    half_L: Floats
    added_L: Floats
    metrics: tuple[Metric, ...]
    note: str


def _cost(anatomy: Anatomy, n_tokens: int, settings: DropLayersSettings) -> Cost:
    """Forward passes over windows of ``sample_tokens``; a few to prove the cut."""
    n = anatomy.n_layers
    trials = sum(max(0, n - drop) for drop in range(settings.count)) + 1
    passes = {"block_influence": settings.samples, "loss": trials * min(settings.samples, LOSS_SAMPLES)}
    kept = 4 * settings.sample_tokens * (anatomy.d_model * (n + 1) + 2 * anatomy.vocab_size)
    return Cost(passes.get(settings.criterion, 0) + 3, kept)


def _left(anatomy: Anatomy, settings: DropLayersSettings) -> Mapping[str, float]:
    """Exact where the blocks are named or all alike; else which kind of block goes is not known beforehand."""
    n = anatomy.n_layers
    named = named_blocks(anatomy, settings)
    share = 1 - (settings.count if named is None else len(named)) / n
    left = dict.fromkeys(("attention", "mlp", "router", "experts", "shared_expert", "norm"), share)
    if named is not None:
        for is_moe, components in ((True, ("router", "experts", "shared_expert")), (False, ("mlp",))):
            of_kind = [block.index for block in anatomy.blocks if block.is_moe == is_moe]
            kept = sum(layer not in named for layer in of_kind)
            left |= dict.fromkeys(components, kept / len(of_kind) if of_kind else 1.0)
    return left


@method(
    "compress",
    title="Drop layers",
    needs=["calibration"],
    paper="https://arxiv.org/abs/2403.03853",
    cost=_cost,
    left=_left,
    group="prune",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: DropLayersSettings
) -> Result:
    """Take out the blocks that matter least: fewer bytes, less work per token, a smaller cache.

    Block influence is BI_l = 1 − mean cos(x_l, x_{l+1}) of the residual stream before and after the block on calibration
    text: 0 for a block that turns nothing. Criterion loss instead tries every block and drops the one without which the
    next-token loss is smallest, then tries all the others again. The config says how many layers are left and of which
    kind each is, so plain transformers builds the shallower model, with its cache numbered anew. Quality falls fast:
    beyond a tenth to a fifth of the layers, plan a distillation. For a student to distil, where a block stands says
    enough: even is DistilBERT's choice (1910.01108), ends is the symmetric dropping of Sajjad et al. (2004.03844), which
    keeps the lower ⌈L'/2⌉ and the upper ⌊L'/2⌋ of the L' blocks that stay.
    """
    loaded.refuse_if_packed()
    candidates = _candidates(loaded.anatomy, settings)
    _refuse_unusable(loaded, settings)
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts):
        choice = _choose(loaded, calibration, candidates, part_of(progress, 0.0, 0.9), settings)
        progress(0.9, 1.0, f"building the model without blocks {', '.join(map(str, choice.gone))}")
        model, gap = without_blocks(loaded, choice.gone)
    before = Inventory.of(loaded).moved(renumbered(loaded.anatomy, choice.gone))
    kept = [layer for layer in range(loaded.anatomy.n_layers) if layer not in choice.gone]
    loaded.become(model)
    return structural_result(
        before,
        loaded,
        settings,
        method="drop_layers",
        frames={"layers": _frame(choice, kept)},
        views=_VIEWS if np.isfinite(choice.scores_L).any() else _VIEWS[1:],
        metrics=(Metric("layers_removed", len(choice.gone), "layers"), *choice.metrics),
        notes=(
            f"Blocks {', '.join(map(str, choice.gone))} are gone (counted from 0); the others moved up.",
            choice.note,
        ),
        inputs={"calibration": calibration.fingerprint}
        if calibration is not None and settings.criterion in READS_TEXT
        else {},
        conditions={"kept": kept, "dropped": list(choice.gone)},
        exactness_gap=gap,
        exactness_check="output against the whole model with the same blocks skipped, largest relative difference",
    )


def _candidates(anatomy: Anatomy, settings: DropLayersSettings) -> list[int]:
    """The blocks that may go; raises ``BadInput`` where there are not enough, or a listed one may not."""
    last = anatomy.n_layers - 1
    free = [layer for layer in range(last + 1) if not settings.keep_ends or 0 < layer < last]
    wanted = len(_listed(anatomy, settings)) if settings.criterion == "listed" else settings.count
    if wanted > min(len(free), last):
        ends = ", and keep_ends keeps the first and last" if settings.keep_ends else ""
        raise BadInput(
            f"count={wanted} blocks of {last + 1} cannot go{ends}; choose at most {max(0, min(len(free), last))}"
        )
    return free


def named_blocks(anatomy: Anatomy, settings: DropLayersSettings) -> list[int] | None:
    """The blocks that go where neither text nor seed decides; None where one does."""
    free, n = _candidates(anatomy, settings), anatomy.n_layers
    left = n - settings.count
    if settings.criterion == "listed":
        return _listed(anatomy, settings)
    if settings.criterion == "last":
        return free[-settings.count :]
    if settings.criterion == "even":
        return [layer for layer in range(n) if layer not in evenly(left, n)]
    if settings.criterion == "ends":
        return list(range(-(-left // 2), n - left // 2))
    return None


def _listed(anatomy: Anatomy, settings: DropLayersSettings) -> list[int]:
    """The blocks named in ``layers``; raises ``BadInput`` for what is none."""
    words = settings.layers.replace(",", " ").split()
    last = anatomy.n_layers - 1
    wrong = [word for word in words if not word.isdecimal() or int(word) > last]
    if wrong or not words:
        raise BadInput(
            f"layers={settings.layers!r}: name the blocks to drop by numbers from 0 to {last}, e.g. 1, 2"
        )
    found = sorted({int(word) for word in words})
    if settings.keep_ends and {0, last} & set(found):
        raise BadInput(
            f"layers={settings.layers!r} names the first or the last block; set keep_ends=false to drop those too"
        )
    return found


def _refuse_unusable(loaded: LoadedModel, settings: DropLayersSettings) -> None:
    if settings.criterion in READS_TEXT and loaded.tokenizer is None:
        raise CannotCompress(
            f"criterion {settings.criterion} reads text, which {loaded.ref} does not; choose even, ends, last, listed or random"
        )
    if settings.criterion == "loss" and loaded.family != "decoder":
        raise CannotCompress(
            f"criterion loss is that of the next token, and {loaded.ref} predicts none; choose block_influence"
        )


def _choose(
    loaded: LoadedModel,
    calibration: Documents | None,
    free: Sequence[int],
    progress: Progress,
    settings: DropLayersSettings,
) -> _Choice:
    nothing = np.full(loaded.anatomy.n_layers, np.nan)
    named = named_blocks(loaded.anatomy, settings)
    if named is not None:
        return _Choice(tuple(named), nothing, nothing, nothing, (), BY_PLACE.get(settings.criterion, ""))
    if settings.criterion == "random":
        drawn = np.random.default_rng(settings.seed).choice(free, settings.count, replace=False)
        return _Choice(
            tuple(sorted(map(int, drawn))), nothing, nothing, nothing, (), "Drawn at random: the control."
        )
    assert calibration is not None, "the registry's `needs` bring calibration text"
    n_windows = min(settings.samples, LOSS_SAMPLES) if settings.criterion == "loss" else settings.samples
    windows_BP = calibration_windows(
        loaded, calibration, samples=n_windows, sample_tokens=settings.sample_tokens, seed=settings.seed
    )
    text = f"{windows_BP.shape[0]} windows of {windows_BP.shape[1]} tokens of {calibration.name}"
    if settings.criterion == "block_influence":
        found_BL = block_influence(loaded, windows_BP, progress)
        scores_L = found_BL.mean(0)
        gone = sorted(sorted(free, key=lambda layer: scores_L[layer])[: settings.count])
        short = shortage_note(windows_BP, n_windows, calibration)
        note = f"Scores are means over {text}; half_width: 95 % interval (Student's t over windows). {short}".strip()
        return _Choice(tuple(gone), scores_L, half_width(found_BL), nothing, (), note)
    return _by_loss(loaded, windows_BP, free, progress, settings, text)


def _by_loss(
    loaded: LoadedModel,
    windows_BP: Tensor,
    free: Sequence[int],
    progress: Progress,
    settings: DropLayersSettings,
    text: str,
) -> _Choice:
    found = greedy(loaded, windows_BP, free, settings.count, progress)
    added_B = found.after_NB[-1] - found.base_B
    mean, half = float(added_B.mean()), float(half_width(added_B[:, None])[0])
    added_L = np.full(loaded.anatomy.n_layers, np.nan)
    added_L[list(found.order)] = (found.after_NB - found.base_B).mean(1)
    known = np.isfinite(half)
    metric = Metric(
        "calibration_loss_increase", mean, "nats/token", "lower", n=len(added_B), low=mean - half if known else None,
        high=mean + half if known else None,
        interval=f"Student's t over {len(added_B)} windows" if known else "",
    )  # fmt: skip
    nothing = np.full(loaded.anatomy.n_layers, np.nan)
    note = (
        f"Dropped in the order {', '.join(map(str, found.order))}, on {text}: score is the loss that dropping the block "
        "alone adds, loss_increase the loss after it and all before it in that order went. The blocks were chosen on this "
        "text, so on other text expect more."
    )
    return _Choice(tuple(sorted(found.order)), found.first_L, nothing, added_L, (metric,), note)


def _frame(choice: _Choice, kept: Sequence[int]) -> pd.DataFrame:
    n = len(choice.scores_L)
    frame = pd.DataFrame(
        {
            "layer": range(n),
            "score": choice.scores_L,
            "half_width": choice.half_L,
            "loss_increase": choice.added_L,
            "status": ["dropped" if layer in choice.gone else "kept" for layer in range(n)],
            "new_index": [kept.index(layer) if layer in kept else None for layer in range(n)],
        }
    )
    return frame.astype({"new_index": "Int64"})
