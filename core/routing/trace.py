"""The routing of one short text, kept whole: which experts computed each token, with which weights, how decidedly.

For long text see ``aggregate.py``, which keeps counts only.

Legend: ``L`` MoE layers in order, ``T`` tokens, ``K`` slots, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.lazy import torch
from core.routing.discover import MoeLayer
from core.routing.lens import NOTHING, Change, Routed, layers_of, routed
from core.routing.scores import distribution, entropy, margin
from core.text.token_texts import token_texts
from core.types import Progress, silent

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

MAX_TOKENS = 4096
"""Longest text whose routing is kept whole."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Every decision of every MoE layer on one text."""

    layers: tuple[int, ...]
    """Block indices of the MoE layers."""
    experts_LTK: NDArray[np.int16]
    """-1 in slots that reach no expert."""
    weights_LTK: NDArray[np.float32]
    entropy_LT: NDArray[np.float32]
    """Nats, of the router's distribution over all experts; NaN for an unknown routing rule."""
    margin_LT: NDArray[np.float32]
    """Lowest chosen logit − highest logit left out; NaN where logits alone do not decide."""
    token_ids_T: NDArray[np.int64]
    texts: tuple[str, ...]
    """What each token looks like to a reader."""
    n_experts: int
    top_k: int


def trace(
    loaded: LoadedModel, text: str | Sequence[int], progress: Progress = silent, *, change: Change = NOTHING
) -> RoutingTrace:
    """Run the model once over ``text`` (a prompt, or token ids) and keep all its decisions.

    Raises ``BadInput`` for an empty text, one longer than ``MAX_TOKENS`` or the model's context, a dense model.
    """
    layers = layers_of(loaded)
    ids = _ids(loaded, text)
    seen: dict[int, tuple[Any, ...]] = {}

    def keep(at: Routed) -> None:
        layer = by_index[at.layer]
        progress(len(seen), len(layers), "watching the experts")
        seen[at.layer] = tuple(
            part.cpu().numpy() for part in (at.experts_TK, at.weights_TK, *_undecided(layer, at))
        )

    by_index = {layer.layer: layer for layer in layers}
    with loaded.lock, torch.inference_mode(), routed(loaded, keep, change=change):
        loaded.model(
            input_ids=torch.tensor([ids], device=loaded.model.device), use_cache=False, logits_to_keep=1
        )
    experts, weights, entropies, margins = zip(*(seen[layer.layer] for layer in layers), strict=True)
    slots = max(part.shape[1] for part in experts)
    return RoutingTrace(
        tuple(layer.layer for layer in layers),
        np.stack([_widened(part, slots, -1) for part in experts]).astype(np.int16),
        np.stack([_widened(part, slots, 0) for part in weights]),
        np.stack(entropies),
        np.stack(margins),
        np.asarray(ids),
        token_texts(loaded.tokenizer, ids) if loaded.tokenizer is not None else tuple(map(str, ids)),
        max(layer.n_experts for layer in layers),
        slots,
    )


def token_ids(loaded: LoadedModel, text: str) -> list[int]:
    """A text's token ids, special tokens as the tokenizer adds them; ``BadInput`` where there is no tokenizer."""
    if loaded.tokenizer is None:
        raise BadInput(f"{loaded.ref} has no tokenizer; give token ids instead of text")
    return list(loaded.tokenizer(text, verbose=False)["input_ids"])


def _ids(loaded: LoadedModel, text: str | Sequence[int]) -> list[int]:
    ids = token_ids(loaded, text) if isinstance(text, str) else list(text)
    limit = min(MAX_TOKENS, loaded.anatomy.context_length)
    if not ids:
        raise BadInput("the text is empty; type at least one word")
    if len(ids) > limit:
        raise BadInput(
            f"the text has {len(ids):,} tokens, more than the {limit:,} whose routing is kept whole; shorten it, or "
            "look at counts over long text instead"
        )
    return ids


def _undecided(layer: MoeLayer, at: Routed) -> tuple[Any, Any]:
    """Entropy and margin per row; NaN where the router's logits or their meaning are unknown."""
    nothing_T = torch.full_like(at.weights_TK[:, 0], float("nan"))
    shares_TE = None if at.logits_TE is None else distribution(layer.rule, at.logits_TE)
    if at.logits_TE is None or shares_TE is None:
        return nothing_T, nothing_T
    return entropy(shares_TE), margin(layer.rule, at.logits_TE, at.experts_TK)


def _widened(part_TK: NDArray[Any], slots: int, fill: int) -> NDArray[Any]:
    """Layers may differ in their top-k; missing slots are empty."""
    return np.pad(part_TK, ((0, 0), (0, slots - part_TK.shape[1])), constant_values=fill)
