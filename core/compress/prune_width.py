"""Prune width: fewer neurons, attention heads or residual dimensions in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.calibrate.walk import walk_cost
from core.calibrate.windows import read_calibration
from core.errors import BadInput, CannotCompress
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.reshape.importance import best, complement, listed
from core.reshape.narrower import Part, Units, check_size, n_units, narrowed, refuse_part
from core.reshape.structure import Inventory, structural_result
from core.reshape.width_cut import MEASURED, Importance, Wish, choose
from core.types import Cost, Documents, Metric, Progress, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy

_VIEWS = (
    View(
        "heatmap", x="unit", y="layer", color="relative_score", frame="units", midpoint=1.0,
        title="Score of heads, relative to their layer's mean", tooltip=("score", "status"),
    ),
    View(
        "table", x="layer", text="removed", frame="layers", title="What each layer loses",
        tooltip=("kept", "score_removed", "output_error", "output_error_plain"),
    ),
)  # fmt: skip


class PruneWidthSettings(Settings):
    """What is cut, how much of it, and by which measure."""

    part: Part = Field(
        default="ffn",
        description="ffn: neurons of the MLPs; heads: query heads, equally many of each key/value group; kv_groups: whole "
        "key/value groups with their query heads; hidden: dimensions of the residual stream",
    )
    share: float = Field(default=0.25, gt=0, lt=1, description="Share of every layer's units to remove")
    importance: Importance = Field(
        default="output",
        description="output: how much a unit writes to the stream on calibration text; activation: how active it is; "
        "magnitude: its weights; ablation: KL that taking a head out adds (Inspect's scan); listed: named below; random: "
        "the control. hidden knows activation (of norm outputs), magnitude and random",
    )
    remove: str = Field(
        default="",
        max_length=20_000,
        description="With importance listed: layer:unit of what goes, e.g. 0:3, 1:7, or names of an ablation map (L0H3)",
    )
    compensate: bool = Field(
        default=True,
        description="Let what stays make good what goes: least squares on calibration text for the projection behind the "
        "cut; for hidden, norms rescaled",
    )
    multiple_of: Literal[1, 8, 16, 32, 64, 128] = Field(
        default=32,
        description="Neurons and dimensions left are a multiple of this, so that groups of a grid divide them",
    )
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(
        default=0, ge=0, le=1_000_000, description="Seed of the windows and of importance random"
    )

    @property
    def walks(self) -> bool:
        """Whether blocks are judged or made good one after another, on text."""
        return self.part != "hidden" and (self.compensate or self.importance in MEASURED)

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is looked at."""
        return self.compensate or self.importance in (*MEASURED, "ablation")


def _cost(anatomy: Anatomy, n_tokens: int, settings: PruneWidthSettings) -> Cost:
    forwards, extra = 3.0, 0
    if settings.walks:
        taken = walk_cost(anatomy, settings, collect=["gram"])
        forwards, extra = forwards + taken.forwards, taken.extra_bytes
    elif settings.reads_text:
        forwards += settings.samples * (2 if settings.compensate else 1)
    if settings.importance == "ablation":
        forwards += anatomy.n_layers * anatomy.n_heads / 2
    return Cost(forwards, extra)


def _left(anatomy: Anatomy, settings: PruneWidthSettings) -> Mapping[str, float]:
    part = _part(anatomy, settings)
    n = _n_kept(anatomy, settings)
    share = n / n_units(anatomy, part)
    if part == "ffn":
        return {"mlp": share}
    if part == "hidden":
        every = ("embedding", "attention", "mlp", "router", "experts", "shared_expert", "norm", "head")
        return dict.fromkeys(every, share)
    if part == "kv_groups":
        return {"attention": share}
    return {"attention": (n + anatomy.n_kv_heads) / (anatomy.n_heads + anatomy.n_kv_heads)}


@method(
    "compress",
    title="Prune width",
    needs=["calibration"],
    paper="https://arxiv.org/abs/2407.14679",
    cost=_cost,
    left=_left,
    group="prune",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: PruneWidthSettings,
) -> Result:
    """Cut the least important neurons, heads or dimensions out of every layer, as many in each: smaller and faster anywhere.

    A unit's importance is Σ_t ‖W_u x_u‖², what it writes to the residual stream over calibration tokens, unless another
    measure is chosen. Then the projection that reads what stays is fitted by least squares to give what it gave before,
    block after block, each on what the cut ones before it give. The config says the new sizes, so plain transformers
    loads the narrower model and every kernel runs it faster. Architectures whose config cannot say so are refused: those
    that compute head_dim from the number of heads lose neurons only. Beyond 15–20 % plan a distillation.
    """
    loaded.refuse_if_packed()
    anatomy, part = loaded.anatomy, _part(loaded.anatomy, settings)
    _refuse_unusable(loaded, settings)
    wish = Wish(
        part, settings.importance, _n_kept(anatomy, settings), settings.compensate, settings.seed,
        listed(anatomy, part, settings.remove) if settings.importance == "listed" else {},
    )  # fmt: skip
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=anatomy.n_experts):
        check_size(loaded, part, _any_units(anatomy, wish))
        windows_BP, short = _windows(loaded, calibration, settings)
        before = Inventory.of(loaded)
        cut = choose(loaded, windows_BP, wish, part_of(progress, 0.0, 0.9), scratch=scratch)
        progress(0.9, 1.0, "building the narrower model")
        model, gap = narrowed(loaded, part, cut.kept)
    loaded.become(model)
    with_map = "units" in cut.frames
    return structural_result(
        before,
        loaded,
        settings,
        method="prune_width",
        frames=cut.frames,
        views=_VIEWS if with_map else _VIEWS[1:],
        metrics=[Metric(f"{part}_per_layer", wish.n_kept, "units"), *cut.metrics],
        notes=[_size_note(anatomy, wish), short],
        inputs={} if windows_BP is None or calibration is None else {"calibration": calibration.fingerprint},
        conditions={
            "calibration_tokens": 0 if windows_BP is None else windows_BP.numel(),
            "kept": {str(layer): list(units) for layer, units in cut.kept.items()},
        },
        exactness_gap=gap,
        exactness_check=""
        if gap is None
        else "output against the whole model in which what was cut writes nothing, largest relative difference",
    )


def _part(anatomy: Anatomy, settings: PruneWidthSettings) -> Part:
    """Where every head has keys and values of its own, a head is a group."""
    alone = anatomy.n_heads == anatomy.n_kv_heads
    return "kv_groups" if settings.part == "heads" and alone else settings.part


def _n_kept(anatomy: Anatomy, settings: PruneWidthSettings) -> int:
    """Units that stay in every layer; raises ``BadInput`` where that is none or all."""
    part = _part(anatomy, settings)
    size = n_units(anatomy, part)
    if settings.importance == "listed":
        return size - len(listed(anatomy, part, settings.remove)[0])
    steps = {
        "ffn": settings.multiple_of, "heads": anatomy.n_kv_heads, "kv_groups": 1,
        "hidden": math.lcm(settings.multiple_of, anatomy.n_heads),  # configs want whole heads in it
    }  # fmt: skip
    step = steps[part]
    n = round(size * (1 - settings.share) / step) * step
    if not 0 < n < size:
        choices = range(step, size, step)
        said = f"{choices[0]} to {choices[-1]} in steps of {step}" if choices else "no other number"
        smaller = (
            ", or a smaller multiple_of" if part in ("ffn", "hidden") and settings.multiple_of > 1 else ""
        )
        raise BadInput(
            f"share={settings.share} of {size} {part} leaves {n}; {said} can stay: choose another share{smaller}"
        )
    return n


def _any_units(anatomy: Anatomy, wish: Wish) -> dict[int, list[int]]:
    """Some units of the right number, to try whether the size can be had at all."""
    size = n_units(anatomy, wish.part)
    if wish.removed:
        return {layer: complement(size, units) for layer, units in wish.removed.items()}
    groups = anatomy.n_kv_heads if wish.part == "heads" else 1
    return dict.fromkeys(range(anatomy.n_layers), best(torch.zeros(size), wish.n_kept, groups=groups))


def _windows(
    loaded: LoadedModel, calibration: Documents | None, settings: PruneWidthSettings
) -> tuple[Tensor | None, str]:
    """Calibration windows where text is looked at, and a note where there were fewer than asked for."""
    if not settings.reads_text:
        return None, ""
    text = read_calibration(loaded, calibration, settings)
    return text.windows_BP, text.shortage


def _refuse_unusable(loaded: LoadedModel, settings: PruneWidthSettings) -> None:
    part = _part(loaded.anatomy, settings)
    refuse_part(loaded, part)
    if settings.reads_text and loaded.tokenizer is None:
        raise CannotCompress(
            f"{loaded.ref} reads no text; choose importance magnitude, random or listed, and compensate=false"
        )
    if settings.importance == "ablation" and (
        part not in ("heads", "kv_groups") or loaded.family != "decoder"
    ):
        raise CannotCompress(
            "importance ablation takes out heads of a decoder; choose part heads or kv_groups"
        )
    if settings.importance == "listed" and part == "hidden":
        raise CannotCompress(
            "all layers share the hidden dimensions, so they cannot be listed by layer; choose activation"
        )
    if settings.importance == "listed" and part == "heads":
        _refuse_uneven(loaded.anatomy, listed(loaded.anatomy, part, settings.remove))


def _refuse_uneven(anatomy: Anatomy, removed: Units) -> None:
    for layer, heads in removed.items():
        counts = [
            sum(anatomy.kv_head(head) == group for head in heads) for group in range(anatomy.n_kv_heads)
        ]
        if len(set(counts)) > 1:
            raise BadInput(
                f"remove takes {counts} heads of the key/value groups of layer {layer}; every group must lose as many, or "
                "choose part kv_groups"
            )


def _size_note(anatomy: Anatomy, wish: Wish) -> str:
    size = n_units(anatomy, wish.part)
    how = {"random": "drawn at random: the control", "listed": "as listed"}.get(
        wish.importance, f"by {wish.importance}"
    )
    return f"Every layer keeps {wish.n_kept} of {size} {wish.part}, {how}."
