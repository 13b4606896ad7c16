"""Patch occlusion: what a class loses when a part of the picture is hidden (Zeiler and Fergus 2014).

Exact: every number is a difference of two forward passes of the whole model; nothing is linearised and no gradient is
taken, so it works on any variant. Legend: W windows, N patches, C channels, H and W pixels of the model's input.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput
from core.images.classes import class_logits
from core.images.pictures import Picture
from core.images.pixels import to_pixels
from core.lazy import torch
from core.models.patch_grid import PatchGrid
from core.probes._batching import in_batches
from core.probes._image import EncodedImage, encode_image
from core.probes._provenance import provenance
from core.probes._targets import Token, resolve_distractor, resolve_token
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]


class PatchOcclusionSettings(Settings):
    """What is hidden, by what, and which class is watched."""

    target: str = Field(
        "", description="Class to explain, by name or number; empty takes the model's own answer"
    )
    distractor: str = Field("", description="Class to compare with (why this and not that?); empty for none")
    size: int = Field(
        1, ge=1, le=64, description="Side of the hidden square, in patches; it moves by one patch"
    )
    hide_with: Literal["mean", "black", "white"] = Field(
        "mean", description="Colour of the hidden square: the picture's mean colour, black or white"
    )
    curve_points: int = Field(
        16,
        ge=0,
        le=64,
        description="Points of the curves that check the ranking by hiding patches in its order; 0 for none",
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: PatchOcclusionSettings) -> Cost:
    # One forward per place of the square; the context is the patches and a class token.
    return Cost(forwards=anatomy.context_length + 2 * settings.curve_points)


@method(
    "probe",
    title="Patch occlusion",
    needs=["vision"],
    paper="https://arxiv.org/abs/1311.2901",
    answers="Why this token?",
    examples=(
        Example("Which strokes make this a 7?", Prompt(image="digits:1348")),
        Example(
            "Why a 5 where a 9 is written?", Prompt(image="digits:1580"), {"target": "5", "distractor": "9"}
        ),
    ),
    cost=_cost,
)
def patch_occlusion(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: PatchOcclusionSettings
) -> Result:
    """Hide each patch in turn and see what the class loses.

    The weight of a patch is logit(picture) − logit(picture with the patch hidden), of the target class or of target −
    distractor: positive where the patch speaks for it, negative where it speaks against. With a square of several
    patches, a patch gets the mean over the squares that cover it. Exact for this way of hiding; what a hidden patch looks
    like matters, so compare colours. The curves hide patches from the heaviest down and from the lightest up: a good
    ranking makes the first fall early, and the area between them is the number to compare rankings by.
    """
    started = time.perf_counter()
    encoded = encode_image(loaded, prompt)
    grid = encoded.grid
    if settings.size > min(grid.rows, grid.columns):
        raise BadInput(
            f"size {settings.size} is more than the {grid.rows} × {grid.columns} patches; take at most "
            f"{min(grid.rows, grid.columns)}"
        )
    with loaded.lock, torch.inference_mode():
        pixels_CHW = encoded.inputs["pixel_values"][0]
        plain_C = class_logits(loaded, pixels_CHW[None])[0]
        target = resolve_token(loaded, settings.target, logits_V=plain_C)
        distractor = resolve_distractor(loaded, settings.distractor, target)
        hider = _Hider(
            loaded, pixels_CHW, _cover(loaded, encoded, settings), grid, target, distractor, progress
        )
        masks_WN = windows(grid, settings.size)
        score_W = hider.scores(np.vstack([np.zeros_like(masks_WN[:1]), masks_WN]), "hiding patches")
        base = float(hider.score(plain_C[None])[0])
        weight_N = np.array(score_W[0] - score_W[1:]) @ masks_WN / masks_WN.sum(0)
        curves = _curves(hider, weight_N, settings.curve_points)
    frames = {"main": _ranked(encoded, weight_N), "patches": encoded.patch_frame(weight_N)}
    if curves is not None:
        frames["curves"] = curves
    return Result(
        frames=frames,
        views=_views(target, distractor, with_curves=curves is not None),
        metrics=_metrics(base, plain_C, target, weight_N, curves),
        provenance=provenance(
            loaded,
            prompt,
            method="patch_occlusion",
            settings=settings,
            started=started,
            conditions={
                "patches": grid.n_patches,
                "squares": len(masks_WN),
                "target": target.text,
                "distractor": distractor.text if distractor else "",
            },
            exactness_gap=abs(base - float(score_W[0])),
            exactness_check="|score of the untouched picture inside the batch − its score alone|",
        ),
        notes=(
            f"Hidden with {settings.hide_with}. A patch that is already of that colour has weight 0.",
            *((f"The data set's label is {encoded.picture.label}.",) if encoded.picture.label else ()),
            *encoded.notes,
        ),
        images={"patches": encoded.png()},
    )


def windows(grid: PatchGrid, size: int) -> NDArray[np.float64]:
    """Every place of a square of ``size`` patches, as rows of 0 and 1 over the patches [W, N]."""
    found = []
    for row in range(grid.rows - size + 1):
        for column in range(grid.columns - size + 1):
            mask = np.zeros((grid.rows, grid.columns))
            mask[row : row + size, column : column + size] = 1
            found.append(mask.ravel())
    return np.array(found)


@dataclass
class _Hider:
    """Runs the model on pictures with some patches hidden."""

    loaded: LoadedModel
    pixels_CHW: Tensor
    cover_CHW: Tensor
    grid: PatchGrid
    target: Token
    distractor: Token | None
    progress: Progress

    def scores(self, masks_WN: Floats, message: str) -> Floats:
        """Score with each row's patches hidden."""
        anatomy = self.loaded.anatomy
        # Activations of one layer, patterns of its heads, and the picture itself; layers are freed one by one.
        position_bytes = 4 * (8 * anatomy.d_model + 2 * anatomy.d_ff + anatomy.n_heads * self.grid.n_tokens)
        each = self.grid.n_tokens * position_bytes + 8 * self.pixels_CHW.numel()

        def run(start: int, stop: int) -> Floats:
            self.progress(start, len(masks_WN), message)
            hidden = torch.tensor(masks_WN[start:stop] > 0, device=self.pixels_CHW.device)
            hidden = hidden.view(-1, 1, self.grid.rows, self.grid.columns)
            hidden = hidden.repeat_interleave(self.grid.patch_height, 2).repeat_interleave(
                self.grid.patch_width, 3
            )
            full = torch.zeros(
                len(hidden), 1, *self.pixels_CHW.shape[1:], dtype=torch.bool, device=hidden.device
            )
            full[:, :, : hidden.shape[2], : hidden.shape[3]] = hidden
            return self.score(class_logits(self.loaded, torch.where(full, self.cover_CHW, self.pixels_CHW)))

        found = in_batches(
            len(masks_WN), run, bytes_each=each, device=self.loaded.device, at_most_bytes=64 << 20
        )
        return np.concatenate(found)

    def score(self, logits_WC: Tensor) -> Floats:
        """Target's logit, less the distractor's where there is one."""
        score_W = logits_WC[:, self.target.id].double()
        if self.distractor is not None:
            score_W = score_W - logits_WC[:, self.distractor.id].double()
        return np.asarray(score_W.cpu().numpy())


def _cover(loaded: LoadedModel, encoded: EncodedImage, settings: PatchOcclusionSettings) -> Tensor:
    """A picture of one colour, processed like the real one: what hidden patches show."""
    from PIL import Image

    pixels_CHW: Tensor = encoded.inputs["pixel_values"][0]
    if settings.hide_with == "mean":
        return pixels_CHW.mean((-2, -1), keepdim=True).expand_as(pixels_CHW)
    blank = Image.new("RGB", encoded.picture.size, settings.hide_with)
    return to_pixels(loaded, [Picture(settings.hide_with, blank)]).values_NCHW[0]


def _curves(hider: _Hider, weight_N: Floats, points: int) -> pd.DataFrame | None:
    """The score as patches are hidden in the ranking's order, and in the opposite one; None for no points."""
    if not points:
        return None
    n = len(weight_N)
    counts = np.unique(np.linspace(0, n, min(points, n) + 1).round().astype(int))
    order = np.argsort(-weight_N, kind="stable")
    rows = []
    for name, ranked in (("heaviest first", order), ("lightest first", order[::-1])):
        masks_WN = np.zeros((len(counts), n))
        for row, count in enumerate(counts):
            masks_WN[row, ranked[:count]] = 1
        scores = hider.scores(masks_WN, f"hiding patches, {name}")
        rows += [
            {"order": name, "hidden": count, "share_hidden": count / n, "score": score}
            for count, score in zip(counts, scores, strict=True)
        ]
    return pd.DataFrame(rows)


def _ranked(encoded: EncodedImage, weight_N: Floats) -> pd.DataFrame:
    frame = encoded.patch_frame(weight_N)[["patch", "row", "column", "weight"]]
    return frame.sort_values("weight", ascending=False, kind="stable", ignore_index=True)


def _metrics(
    base: float, plain_C: Tensor, target: Token, weight_N: Floats, curves: pd.DataFrame | None
) -> tuple[Metric, ...]:
    found = [
        Metric("score", base, "logits"),
        Metric("p_target", float(plain_C.softmax(-1)[target.id]), "probability"),
        Metric("top_weight", float(weight_N.max()), "logits", n=len(weight_N)),
    ]
    if curves is not None:
        areas = {
            str(name): float(np.trapezoid(rows["score"], rows["share_hidden"]))
            for name, rows in curves.groupby("order")
        }
        gain = areas["lightest first"] - areas["heaviest first"]
        found.append(Metric("area_between_curves", gain, "logits", "higher", n=len(weight_N)))
    return tuple(found)


def _views(target: Token, distractor: Token | None, *, with_curves: bool) -> tuple[View, ...]:
    what = f"“{target.text}” − “{distractor.text}”" if distractor else f"“{target.text}”"
    found = [
        View(
            "image",
            x="x",
            y="y",
            color="weight",
            frame="patches",
            title=f"What hiding each patch costs {what}",
            unit="logits",
            midpoint=0.0,
            tooltip=("row", "column", "width", "height"),
        ),
        View("table", x="patch", y="weight", title="Ranked", unit="logits", tooltip=("row", "column")),
    ]
    if with_curves:
        found.append(
            View(
                "line",
                x="share_hidden",
                y="score",
                color="order",
                frame="curves",
                title="Check of the ranking: the score as patches are hidden in its order",
                unit="logits",
                tooltip=("hidden",),
            )
        )
    return tuple(found)
