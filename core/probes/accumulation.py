"""Accumulation: the same products of real weights and activations summed in narrow floats.

Legend: ``S`` sums (one row of a weight times one position's activations), ``K`` products of a sum, ``P`` positions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.models.weights import input_first
from core.probes._interval import half_width
from core.probes._provenance import provenance
from core.probes._tokens import encode
from core.registry import Example, Settings, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Unit roundoff: half the spacing of numbers around 1."""
CHUNK = 32
"""Products that "bfloat16, chunks in float32" adds up wide before it rounds once."""
TEXT = "When Mary and John went to the store, John gave a drink to Mary."


class AccumulationSettings(Settings):
    """Which layer's output projection, and how many sums."""

    layer: int = Field(-1, ge=-1, le=1024, description="Layer (block index); -1: the middle one")
    outputs: int = Field(
        64, ge=8, le=1024, description="Evenly spaced rows of the weight whose sums are taken"
    )
    positions: int = Field(
        16, ge=2, le=64, description="Last positions of the prompt whose activations are used"
    )


@method(
    "probe",
    title="Summing in few bits",
    needs=["text"],
    paper="https://epubs.siam.org/doi/book/10.1137/1.9780898718027",
    answers="What can a number hold?",
    examples=(Example("What does a bfloat16 sum lose?", Prompt(TEXT)),),
)
def accumulation(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AccumulationSettings
) -> Result:
    """Add up the products of one weight and its activations in narrow floats, and watch the error grow with the length.

    Each sum is one output of a layer's last projection: Σ w_k x_k, added one by one. Products are rounded to the sum's
    format first. The error is mean |sum - exact| over the root mean square of the exact sums of that length, in float64.
    With u half a spacing at 1, roundings that point at random make it grow as √n · u. Kahan's compensation and wide chunks
    undo it: why hardware multiplies in 8 bits but adds in 32.
    """
    started = time.perf_counter()
    products_SK, path = _products(loaded, prompt, settings)
    lengths = _lengths(products_SK.shape[1])
    exact_SL = products_SK.cumsum(1)[:, lengths - 1]
    size_L = exact_SL.square().mean(0).sqrt().clamp(min=1e-300)
    rows, finals = [], {}
    for series, partial_SL in _sums(products_SK, lengths).items():
        error_SL = ((partial_SL - exact_SL).abs() / size_L).cpu().numpy()
        half_L = half_width(error_SL)
        for at, length in enumerate(lengths.tolist()):
            mean = float(error_SL[:, at].mean())
            rows.append((length, series, mean, max(0.0, mean - half_L[at]), mean + half_L[at]))
        finals[series] = rows[-1]
    frame = pd.DataFrame(rows, columns=["length", "series", "relative_error", "low", "high"])
    frame["log2_length"] = np.log2(frame["length"])
    narrow = frame[frame["series"] != "float32"].reset_index(drop=True)
    growth = _growth(frame)
    n_sums = len(products_SK)
    return Result(
        frames={"main": narrow, "growth": growth, "all": frame},
        views=(
            View(
                "line", x="log2_length", y="relative_error", color="series", title="Error of a sum by its length",
                log=True, tooltip=("length", "low", "high"),
            ),
            View(
                "line", x="log2_length", y="roundoffs", color="series", frame="growth", log=True,
                title="The same in units of each format's roundoff u", unit="u", tooltip=("length",),
            ),
        ),
        metrics=tuple(
            Metric(
                f"error_in_{series.replace(',', '').replace(' ', '_')}", mean, "share", "lower", n=n_sums, low=float(low),
                high=float(high),
                interval="Student's t over sums",
            )
            for series, (_, _, mean, low, high) in finals.items()
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="accumulation",
            settings=settings,
            started=started,
            conditions={"weight": path, "sums": n_sums, "products": int(products_SK.shape[1])},
            exactness_gap=None,
            exactness_check="none: every format is held against float64",
        ),
        notes=(
            f"{n_sums} sums of {products_SK.shape[1]} products each: rows of {path} times its inputs on this prompt.",
            "Sums over the same inputs are not independent, so the intervals are a little narrow.",
        ),
    )  # fmt: skip


def _growth(frame: pd.DataFrame) -> pd.DataFrame:
    """Errors of plain sums divided by their format's unit roundoff, and √n beside them."""
    plain = frame[frame["series"].isin(list(UNIT))]
    measured = plain.assign(roundoffs=plain["relative_error"] / plain["series"].map(UNIT))
    lengths = frame[["length", "log2_length"]].drop_duplicates()
    walk = lengths.assign(series="√n", roundoffs=np.sqrt(lengths["length"]))
    columns = ["length", "log2_length", "series", "roundoffs"]
    return pd.concat([measured[columns], walk[columns]], ignore_index=True)


def _products(loaded: LoadedModel, prompt: Prompt, settings: AccumulationSettings) -> tuple[Tensor, str]:
    """w_k · x_k [S, K] in float64 of a layer's last projection, and that module's path."""
    blocks = loaded.anatomy.blocks
    if settings.layer >= len(blocks):
        raise BadInput(
            f"there is no layer {settings.layer}; this model has layers 0 … {len(blocks) - 1}, or -1"
        )
    block = blocks[len(blocks) // 2 if settings.layer == -1 else settings.layer]
    path = block.down or block.o
    encoded = encode(loaded, prompt)
    with loaded.lock, torch.inference_mode(), capture(loaded.model, [path], inputs=True) as read:
        loaded.model(**encoded.inputs)
        weight_OK = input_first(loaded.model.get_submodule(path)).T
        input_PK = read[path].reshape(-1, weight_OK.shape[1])[-settings.positions :].double()
        most = min(settings.outputs, len(weight_OK))
        at = torch.linspace(0, len(weight_OK) - 1, most, device=weight_OK.device).long()
        rows_OK = weight_OK[at].double()
        return (rows_OK[:, None] * input_PK[None]).flatten(0, 1), path


def _lengths(n: int) -> Tensor:
    """Lengths at which sums are looked at: powers of two, and the whole."""
    powers = [1 << i for i in range(1, n.bit_length()) if 1 << i < n]
    return torch.tensor([*powers, n])


def _sums(products_SK: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Partial sums [S, L] in float64, however they were added."""
    return {
        "bfloat16": in_order(products_SK.bfloat16(), lengths),
        "float16": in_order(products_SK.half(), lengths),
        "bfloat16, Kahan": kahan(products_SK.bfloat16(), lengths),
        "bfloat16, chunks in float32": in_chunks(products_SK.bfloat16(), lengths),
        "float32": in_order(products_SK.float(), lengths),
    }


def in_order(terms_SK: Tensor, lengths: Tensor) -> Tensor:
    """Partial sums at ``lengths``, every addition rounded to the terms' dtype."""
    total_S = torch.zeros_like(terms_SK[:, 0])
    wanted, kept = set(lengths.tolist()), []
    for k, term_S in enumerate(terms_SK.unbind(1), 1):
        total_S = total_S + term_S
        if k in wanted:
            kept.append(total_S.double())
    return torch.stack(kept, dim=1)


def kahan(terms_SK: Tensor, lengths: Tensor) -> Tensor:
    """The same with Kahan's compensation: what each addition lost is given back to the next."""
    total_S, lost_S = torch.zeros_like(terms_SK[:, 0]), torch.zeros_like(terms_SK[:, 0])
    wanted, kept = set(lengths.tolist()), []
    for k, term_S in enumerate(terms_SK.unbind(1), 1):
        given_S = term_S - lost_S
        next_S = total_S + given_S
        lost_S = (next_S - total_S) - given_S
        total_S = next_S
        if k in wanted:
            kept.append(total_S.double())
    return torch.stack(kept, dim=1)


def in_chunks(terms_SK: Tensor, lengths: Tensor) -> Tensor:
    """Chunks of 32 terms added in float32, their sums in the terms' dtype; a length inside a chunk ends it early."""
    kept = []
    for length in lengths.tolist():
        total_S = torch.zeros_like(terms_SK[:, 0])
        for chunk_SC in torch.split(terms_SK[:, :length], CHUNK, dim=1):
            total_S = (total_S.float() + chunk_SC.float().sum(1)).to(terms_SK.dtype)
        kept.append(total_S.double())
    return torch.stack(kept, dim=1)
