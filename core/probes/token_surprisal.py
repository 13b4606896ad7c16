"""Token surprisal: how unexpected each token of a text is to the model, and what the text costs in bits.

Legend: R scored tokens, V vocabulary. The first token has no prefix and is not scored, unless the tokenizer puts
a start token before it. A masked language model has no such left-to-right cost and is refused.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._distribution import Described, batch_reader, describe, reader, rows_at_once
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode, token_texts
from core.registry import Settings, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


class TokenSurprisalSettings(Settings):
    """Nothing to set: the text decides."""


@method("probe", title="Token surprisal", needs=["decoder", "text"])
def token_surprisal(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: TokenSurprisalSettings
) -> Result:
    """Show how unexpected each token is, given the tokens before it.

    Surprisal is −log p(token | prefix): in bits with log₂, in nats with ln. Rank 1 means that the model's first
    choice came. Bits per byte divides the bits so far by the UTF-8 bytes of the tokens so far, so that models with
    different tokenizers can be compared.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    if encoded.n_tokens < 2:
        raise BadInput(
            "the prompt is a single token, and the first token has no prefix; type at least two words"
        )
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        rows, gap = _score(loaded, encoded)
    frame = _frame(loaded, encoded, rows)
    scored = frame.iloc[1:]
    bits = float(scored["surprisal_bits"].sum())
    n_bytes = int(scored["n_bytes"].sum())
    mean_nats = float(scored["surprisal_nats"].mean())
    return Result(
        frames={"main": frame},
        views=_VIEWS,
        metrics=(
            Metric("bits_per_byte", bits / n_bytes if n_bytes else math.nan, "bits/byte", "lower", n=n_bytes),
            Metric("mean_surprisal", mean_nats / math.log(2), "bits/token", "lower", n=len(scored)),
            Metric("perplexity", math.exp(min(mean_nats, 700)), "", "lower", n=len(scored)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="token_surprisal",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "fp32_path": path.name,
            },
            exactness_gap=gap,
            exactness_check="largest |logits read here − the model's own logits| at the last position",
        ),
        notes=("The first token has no prefix and is not scored; its bytes are not counted.",),
    )


_VIEWS = (
    View(
        "tokens",
        x="position",
        color="surprisal_bits",
        text="token",
        title="Surprisal of each token",
        unit="bits",
        tooltip=("probability", "rank", "entropy_nats", "top1"),
    ),
    View(
        "line",
        x="position",
        y="cumulative_bits_per_byte",
        title="Bits per byte so far",
        unit="bits/byte",
        tooltip=("token", "surprisal_bits"),
    ),
    View(
        "table",
        x="position",
        y="surprisal_bits",
        text="token",
        title="All tokens",
        tooltip=("probability", "rank", "entropy_nats", "top1", "n_bytes"),
    ),
)


def _score(loaded: LoadedModel, encoded: Encoded) -> tuple[list[Described], float]:
    """Describe the prediction of every token but the first; logits exist for one batch of rows at a time."""
    last = loaded.anatomy.blocks[-1].path
    with capture(loaded.model, [last]) as residual:
        output = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    residual_PD = residual[last][0]
    gap = float((reader(loaded)(residual_PD[-1:]) - output.logits[0, -1:].float()).abs().max())
    targets_R = torch.tensor(encoded.ids[1:], device=loaded.model.device)
    read = batch_reader(loaded)
    step = rows_at_once(output.logits.shape[-1])
    rows = []
    for first in range(0, len(targets_R), step):
        span = slice(first, min(first + step, len(targets_R)))
        rows.append(
            describe(
                read(residual_PD[span]),
                targets_R[span],
                top_k=1,
                where=lambda row, first=first: f"the last layer, position {first + row}",  # type: ignore[misc]
            )
        )
    return rows, gap


def _frame(loaded: LoadedModel, encoded: Encoded, rows: list[Described]) -> pd.DataFrame:
    """One row per token; the first has no scores."""

    def column(field: str) -> np.ndarray:
        values = torch.cat([getattr(part, field) for part in rows]).double().cpu().numpy()
        return np.concatenate([[np.nan], values])

    top1_ids = torch.cat([part.top_ids_RK[:, 0] for part in rows]).tolist()
    log_p = column("log_p_target_R")
    bits = -log_p / math.log(2)
    counted = np.array(encoded.n_bytes, dtype=float)
    counted[0] = 0
    bytes_so_far = np.cumsum(counted)
    return pd.DataFrame(
        {
            "position": np.arange(encoded.n_tokens),
            "token": encoded.texts,
            "token_id": encoded.ids,
            "surprisal_bits": bits,
            "surprisal_nats": -log_p,
            "probability": np.exp(log_p),
            "rank": column("rank_R"),
            "entropy_nats": column("entropy_R"),
            "top1": ("", *token_texts(loaded.tokenizer, top1_ids)),
            "n_bytes": encoded.n_bytes,
            "cumulative_bits_per_byte": np.divide(
                np.nancumsum(bits),
                bytes_so_far,
                out=np.full(encoded.n_tokens, np.nan),
                where=bytes_so_far > 0,
            ),
        }
    )
