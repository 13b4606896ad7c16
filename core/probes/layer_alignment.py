"""Layer alignment: which layer of a teacher each layer of its student has come to resemble.

Legend: S points of the student's residual stream, T of the teacher's, N tokens, D width.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.distill.layer_map import LayerMap, layer_map
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._alignment import GROUP, Alignment, gram, hsic, own_hsic, thinned, turned
from core.probes._clustered import described
from core.probes._provenance import provenance
from core.probes._tokens import limit_cells
from core.probes._twin_text import PROMPT, TwinText, TwinTextSettings, read_twin_text, twin_cost
from core.probes._twins import conditions
from core.registry import Example, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


class LayerAlignmentSettings(TwinTextSettings):
    """Text, and what of a vector counts."""

    vectors: Literal["direction", "raw"] = Field(
        "direction",
        description="direction: every token's vector at length 1, as the norm of the next block reads it; raw: as it is, "
        "so that a few very long ones decide",
    )
    skip_first: int = Field(
        1,
        ge=0,
        le=8,
        description="First positions of each document left out: models rest their attention there",
    )


@method(
    "probe",
    title="Layer alignment",
    needs=["text"],
    paper="https://arxiv.org/abs/1905.00414",
    answers="What did compression break?",
    examples=(
        Example("Text of eight kinds", PROMPT),
        Example("Vectors as long as they are", PROMPT, {"vectors": "raw"}),
    ),
    cost=twin_cost,
)
def layer_alignment(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: LayerAlignmentSettings,
) -> Result:
    """Compare every layer of a student with every layer of its teacher, whatever their widths.

    Both models read the same tokens. Linear CKA between two layers is HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)), K and L
    being the products of all pairs of tokens' vectors in each: 1 where one layer is the other rotated and scaled, 0 where
    they have nothing in common. HSIC is the unbiased one, so independent vectors give 0 however few the tokens.

    Layer 0 is the embedding; layer l the residual stream after l blocks. A student's layer is held against the one it
    was made from or taught by, and against the one it resembles most. Intervals are over groups of documents.
    """
    started = time.perf_counter()
    n_left, n_right = loaded.anatomy.n_layers + 1, reference.anatomy.n_layers + 1
    limit_cells(n_left, n_right)
    text = read_twin_text(loaded, reference, prompt, settings)
    taught = layer_map("auto", loaded, reference)
    parts, gaps = [], []
    groups = text.groups(GROUP)
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        for number, group in enumerate(groups):
            progress(number, len(groups), f"reading {text.name} with both")
            ours = _grams(loaded, text, group, settings, n_left + n_right)
            theirs = _grams(reference, text, group, settings, n_left + n_right)
            parts.append((hsic(ours[0], theirs[0]), own_hsic(ours[0]), own_hsic(theirs[0])))
            gaps.append((ours[1], theirs[1]))
    found = Alignment.of(parts)
    layers = _layer_rows(found, taught)
    return Result(
        frames={"layers": layers, "main": _cells(found, layers), "lines": _lines(layers)},
        views=_VIEWS,
        metrics=_metrics(layers, text, len(groups)),
        provenance=provenance(
            loaded,
            prompt,
            method="layer_alignment",
            settings=settings,
            started=started,
            conditions=conditions({**text.conditions, "layer_map": taught.how}, reference, path),
            exactness_gap=float(np.abs(np.array(gaps) - 1).max()),
            exactness_check="largest |CKA − 1| of the last layer with itself rotated and tripled, in any group",
        ),
        notes=_notes(loaded, reference, text, taught, settings),
    )


def _grams(
    loaded: LoadedModel, text: TwinText, group: range, settings: LayerAlignmentSettings, n_grams: int
) -> tuple[Tensor, float]:
    """Gram matrices of a group's tokens at every point [S, N, N], and the last layer's CKA with itself turned."""
    points: list[list[Tensor]] = []
    skip = settings.skip_first
    options = {"logits_to_keep": 1} if loaded.family == "decoder" else {}
    for _, ids_BP in text.batches(group, loaded.device):
        with capture_residual(
            loaded, reduce=lambda _, h_BPD: h_BPD[:, skip:].flatten(0, 1).float()
        ) as residual:
            loaded.model(input_ids=ids_BP, use_cache=False, **options)
        points.append(list(residual.values()))
    n = sum(part[0].shape[0] for part in points)
    if n < 4:
        raise BadInput(
            f"{n} tokens are left of this text; CKA needs four, and a few hundred to say something"
        )
    chosen = thinned(n, n_grams)
    x_SND = [torch.cat(parts)[chosen] for parts in zip(*points, strict=True)]
    if not all(bool(torch.isfinite(x_ND).all()) for x_ND in x_SND):
        raise SlimscopeError(
            f"a residual of {loaded.ref} is not finite (NaN or infinity); open it in float32, or check its weights"
        )
    if settings.vectors == "direction":
        x_SND = [torch.nn.functional.normalize(x_ND, dim=-1) for x_ND in x_SND]
    k_SNN = torch.stack([gram(x_ND) for x_ND in x_SND])
    pair_2NN = torch.stack([k_SNN[-1], gram(turned(x_SND[-1]))])
    own = own_hsic(pair_2NN)
    return k_SNN, float(hsic(pair_2NN[:1], pair_2NN[1:])[0, 0] / np.sqrt(own.prod()))


def _layer_rows(found: Alignment, taught: LayerMap) -> pd.DataFrame:
    """One row per point of the student: the teacher's layer that taught it, and the one most like it."""
    value_ST, half_ST = found.value_ST, found.half_ST
    best_S = np.nan_to_num(value_ST, nan=-2).argmax(1)
    taught_S = np.array([0, *(layer + 1 for layer in taught.outputs)])
    rows = np.arange(len(best_S))
    depth = value_ST.shape[1] - 1
    return pd.DataFrame(
        {
            "layer": rows,
            "most_alike": best_S,
            "cka": value_ST[rows, best_S],
            "cka_ci95": half_ST[rows, best_S],
            "taught_by": taught_S,
            "cka_taught": value_ST[rows, taught_S],
            "cka_taught_ci95": half_ST[rows, taught_S],
            "gain": value_ST[rows, best_S] - value_ST[rows, taught_S],
            "gain_ci95": found.half_of_gain(best_S, taught_S),
            "moved_layers": best_S - taught_S,
            "depth": best_S / max(1, depth),
        }
    )


def _cells(found: Alignment, layers: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of layers."""
    value_ST = found.value_ST
    left, right = np.indices(value_ST.shape).reshape(2, -1)
    role = np.where(right == layers["taught_by"].to_numpy()[left], "taught", "")
    best = right == layers["most_alike"].to_numpy()[left]
    role = np.where(best, np.where(role == "taught", "taught, most alike", "most alike"), role)
    return pd.DataFrame(
        {
            "layer": left,
            "teacher_layer": right,
            "cka": value_ST.ravel(),
            "cka_ci95": found.half_ST.ravel(),
            "role": role,
        }
    )


def _lines(layers: pd.DataFrame) -> pd.DataFrame:
    """Long form: student layer, which teacher layer, CKA."""
    names = {"cka": "most alike", "cka_taught": "the one it learned from"}
    found = layers[["layer", *names]].rename(columns=names)
    return found.melt("layer", var_name="teacher_layer", value_name="cka")


def _metrics(layers: pd.DataFrame, text: TwinText, n_groups: int) -> tuple[Metric, ...]:
    how = described(len(text.ids), n_groups, "jackknife")
    last = layers.iloc[-1]
    blocks = layers.iloc[1:]

    def metric(name: str, value: float, half: float) -> Metric:
        known = bool(np.isfinite(half))
        return Metric(
            name, value, "CKA", "higher", text.n_tokens, value - half if known else None,
            value + half if known else None, how if known else "",
        )  # fmt: skip

    return (
        metric("last_layer_cka", float(last["cka_taught"]), float(last["cka_taught_ci95"])),
        Metric("lowest_cka", float(blocks["cka_taught"].min()), "CKA", "higher", text.n_tokens),
        Metric(
            "layers_that_moved", float((blocks["gain"] > blocks["gain_ci95"]).sum()), "layers", n=len(blocks)
        ),
    )


def _notes(
    loaded: LoadedModel,
    reference: LoadedModel,
    text: TwinText,
    taught: LayerMap,
    settings: LayerAlignmentSettings,
) -> tuple[str, ...]:
    learned = (
        "Seen from its weights, each block of the student was made from a block of the teacher; it is held against the "
        "stream that its successor's twin reads."
        if taught.how == "taken"
        else "The student's weights were made from none of the teacher's blocks; it is held against those at the same share "
        "of the depth."
    )
    found = [
        f"Student: {loaded.ref}, {loaded.anatomy.n_layers} blocks. Teacher: {reference.ref}, {reference.anatomy.n_layers}.",
        learned,
        "Neighbouring layers of one model are alike: read the gain of the most alike with its interval. It is chosen on the "
        + "same tokens, which flatters it a little.",
    ]
    if text.is_prompt:
        found.append("A prompt is one document: no interval, and CKA within one text only.")
    if settings.vectors == "raw":
        found.append("A few very long vectors can decide a raw CKA; compare with direction.")
    return tuple(found)


_PAIR = ("cka_ci95", "role")
_VIEWS = (
    View(
        "heatmap",
        x="teacher_layer",
        y="layer",
        color="cka",
        text="role",
        title="CKA of every student layer with every teacher layer",
        unit="CKA",
        tooltip=_PAIR,
    ),
    View(
        "line",
        x="layer",
        y="cka",
        color="teacher_layer",
        frame="lines",
        title="By student layer: the teacher layer it learned from, and the one most like it",
        unit="CKA",
    ),
    View(
        "table",
        x="layer",
        y="cka",
        frame="layers",
        title="Which teacher layer each student layer resembles",
        tooltip=(
            "most_alike",
            "cka_ci95",
            "taught_by",
            "cka_taught",
            "cka_taught_ci95",
            "gain",
            "gain_ci95",
            "moved_layers",
        ),
    ),
)
