"""One layer's attention rebuilt from the residual stream: pre-softmax scores of every head, and its values.

Legend: P positions, H query heads, K head_dim, D d_model, R rotated dimensions.

The rebuilt scores go norm → projection → q/k norm → rotary positions → scale → softcap by our own algebra, and are
compared with what the model itself hands to its softmax. So a wrong rotation, scale or key/value grouping cannot pass
as a plausible picture. Only rotary positions that pair dimension i with i + R/2 are known, as every supported family
has them; any other shows in the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.weights import split_heads, to_query_heads

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy, Block
    from core.probes._recording import Recording


@contextmanager
def softmax_inputs(n_heads: int, n_positions: int) -> Iterator[list[Tensor]]:
    """Collect what eager attention hands to its softmax, masks added: [1, H, P, P] per layer, in the order they run."""
    from torch.overrides import TorchFunctionMode

    seen: list[Tensor] = []
    softmaxes = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in softmaxes and args[0].shape == (1, n_heads, n_positions, n_positions):
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        yield seen


def read_by(model: Any, block: Block, stream_PD: Tensor) -> Tensor:
    """What the layer's projections are fed [P, D] when the residual stream before it is ``stream_PD``."""
    normed_PD: Tensor = model.get_submodule(block.attention_norm)(stream_PD)
    return normed_PD


def values(model: Any, anatomy: Anatomy, block: Block, read_PD: Tensor) -> Tensor:
    """[P, H, K]: the value each query head moves from each position."""
    projected = model.get_submodule(block.v)(read_PD[None])
    return to_query_heads(anatomy, split_heads(anatomy, projected, "v"))[0]


def rebuilt_scores(
    model: Any, anatomy: Anatomy, block: Block, read_PD: Tensor, recording: Recording
) -> Tensor:
    """Pre-softmax scores [H, P, P] of every head, without the mask."""
    attention = model.get_submodule(block.attention)
    q_PHK = _projected(model, anatomy, block.q, attention, "q", read_PD)
    k_PHK = _projected(model, anatomy, block.k, attention, "k", read_PD)
    rotation = _rotation(recording, block.index)
    if rotation is not None:
        q_PHK, k_PHK = _rotated(q_PHK, *rotation), _rotated(k_PHK, *rotation)
    k_PHK = to_query_heads(anatomy, k_PHK)
    scale = getattr(attention, "scaling", anatomy.head_dim**-0.5)
    scores_HPP: Tensor = torch.einsum("qhd,khd->hqk", q_PHK, k_PHK) * scale
    if anatomy.attention_softcap is not None:
        scores_HPP = torch.tanh(scores_HPP / anatomy.attention_softcap) * anatomy.attention_softcap
    return scores_HPP


def scores_gap(rebuilt_HPP: Tensor, captured_HPP: Tensor, visible_PP: Tensor) -> float:
    """Largest |rebuilt − captured| where the mask lets a query look, as a share of the largest captured score."""
    difference = (rebuilt_HPP - captured_HPP)[:, visible_PP]
    return float(difference.abs().max() / captured_HPP[:, visible_PP].abs().max().clamp_min(1e-12))


def _projected(model: Any, anatomy: Anatomy, path: str, attention: Any, part: Any, read_PD: Tensor) -> Tensor:
    """q or k of every head it has, [P, heads, K], after the q/k norm where the model has one."""
    projected = model.get_submodule(path)(read_PD)
    norm = getattr(attention, f"{part}_norm", None)
    if norm is None:
        return split_heads(anatomy, projected, part)
    if norm.weight.numel() == anatomy.head_dim:  # Qwen3: one norm for each head; OLMoE: one across all
        per_head: Tensor = norm(split_heads(anatomy, projected, part))
        return per_head
    return split_heads(anatomy, norm(projected), part)


def _rotation(recording: Recording, layer: int) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine [P, R] that the model gave this layer; None with learned positions."""
    _, arguments = recording.calls[layer]
    pair = arguments.get("position_embeddings")
    if pair is None:
        return None
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise CannotMeasure(
            "this model hands its layers rotary positions in a form that is not known here, so its scores cannot be "
            "rebuilt; see the attention pattern probe, which reads the model's own"
        )
    cos, sin = pair
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def _rotated(x_PHK: Tensor, cos_PR: Tensor, sin_PR: Tensor) -> Tensor:
    """Rotary positions: the first R dimensions turn in pairs (i, i + R/2), the others pass."""
    n = cos_PR.shape[-1]
    turned, passed = x_PHK[..., :n], x_PHK[..., n:]
    left, right = turned.chunk(2, dim=-1)
    partner = torch.cat([-right, left], -1)
    turned = turned * cos_PR[:, None] + partner * sin_PR[:, None]
    return torch.cat([turned, passed], -1)
