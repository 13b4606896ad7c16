"""What one window of a text says about two models: nats, KL, and the top token, for each scored token.

Knows logits and targets; nothing about documents, tokenizers or statistics.
Letters: P scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.kv_cache import KvCache, new_cache
from core.models.loaded import LoadedModel
from core.text.windows import Ints, Window

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
CHUNK = 128
"""Positions compared at once: bounds the temporaries (128 × 49152 float32 is 25 MB each)."""


@dataclass(frozen=True)
class TokenScores:
    """Per scored token [P]: surprisal under each model (nats), KL(base‖variant) (nats), and top-1 token ids."""

    nats_base: Floats
    nats_variant: Floats
    kl: Floats
    top_base: Ints
    top_variant: Ints

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The scores of consecutive windows as one."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def next_token_logits(
    loaded: LoadedModel, ids: Ints, window: Window, *, kv_cache: KvCache = "model"
) -> Tensor:
    """Logits [P, V] that predict the scored tokens of ``window``; only their positions are unembedded."""
    with loaded.lock, torch.inference_mode():
        inputs = torch.as_tensor(ids[window.begin : window.end - 1], device=loaded.model.device)[None]
        keep = window.end - window.first
        cache = new_cache(loaded.model, kv_cache)
        output = loaded.model(inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)
        logits: Tensor = output.logits[0, -keep:]
    return logits


def score_window(
    base: LoadedModel, variant: LoadedModel, ids: Ints, window: Window, *, kv_cache: KvCache = "model"
) -> TokenScores:
    """Score one window under both models; one forward only, and a KL of exactly 0, where they are the same.

    ``kv_cache`` is what the variant keeps keys and values in; the base keeps its own. Raises ``CannotMeasure`` when a
    model gives a logit that is not a finite number.
    """
    base_PV = next_token_logits(base, ids, window)
    targets_P = torch.as_tensor(ids[window.first : window.end], device=base_PV.device)
    if variant is base and kv_cache == "model":
        scores = compare_logits(base_PV, None, targets_P)
    else:
        variant_PV = next_token_logits(variant, ids, window, kv_cache=kv_cache).to(base_PV.device)
        scores = compare_logits(base_PV, variant_PV, targets_P)
    variant_numbers = scores.nats_variant + scores.kl  # a logit of any other token shows in the KL only
    for role, loaded, numbers in (("base", base, scores.nats_base), ("variant", variant, variant_numbers)):
        if not np.isfinite(numbers).all():
            raise CannotMeasure(
                f"the {role} {loaded.ref} gives logits that are not finite numbers, in the window of tokens "
                f"{window.begin} to {window.end}; try float32, or discard this variant"
            )
    return scores


def compare_logits(base_PV: Tensor, variant_PV: Tensor | None, targets_P: Tensor) -> TokenScores:
    """Compare two models' logits; ``variant_PV`` None stands for the base itself.

    KL(p‖q) is summed as p·(ln p - ln q) + (q - p). The added terms sum to 0 in exact arithmetic; with them every
    summand is of second order in the difference, so that float32 rounding costs at most about 5e-8 nats per
    token, ten times less than in the plain formula (which also turns negative for nearly equal models).
    """
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for start in range(0, len(targets_P), CHUNK):
            rows = slice(start, start + CHUNK)
            target_P1 = targets_P[rows, None]
            p_log_PV = base_PV[rows].float().log_softmax(-1)
            nats_base_P = -p_log_PV.gather(1, target_P1)[:, 0]
            top_base_P = p_log_PV.argmax(-1)
            if variant_PV is None:
                parts.append(
                    (nats_base_P, nats_base_P, torch.zeros_like(nats_base_P), top_base_P, top_base_P)
                )
                continue
            q_log_PV = variant_PV[rows].float().log_softmax(-1)
            nats_variant_P = -q_log_PV.gather(1, target_P1)[:, 0]
            top_variant_P = q_log_PV.argmax(-1)
            p_PV = p_log_PV.exp()
            kl_PV = p_PV * (p_log_PV - q_log_PV) + (q_log_PV.exp() - p_PV)
            parts.append((nats_base_P, nats_variant_P, kl_PV.sum(-1).clamp(min=0), top_base_P, top_variant_P))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    nats_base, nats_variant, kl = (column.astype(np.float64) for column in columns[:3])
    return TokenScores(nats_base, nats_variant, kl, columns[3], columns[4])
