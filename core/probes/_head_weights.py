"""A head's weights as maps between residual stream and head, with the norms around attention folded in.

Legend: D d_model, K head_dim, H query head, G key/value head, V vocabulary.

A head reads x · Q, x · K, x · V ([D, K] each) and writes z · O ([K, D]). Folded in are the gains of the norm before
attention and, for a sandwich of norms, of the one behind it, and a LayerNorm's centring; not its division by σ, which
is a positive number per position. Weights that are not stored as plain numbers are read through their module. It does
not know attention: no softmax, no positions, no q/k norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.lazy import torch
from core.models.anatomy import Anatomy, Block
from core.models.weights import input_first, split_heads
from core.types import Progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class HeadWeights:
    """One layer's heads, float32 or wider; entry h of ``k`` and ``v`` is what query head h reads."""

    q_HDK: Tensor
    k_HDK: Tensor
    v_HDK: Tensor
    o_HKD: Tensor


def head_weights(model: Any, anatomy: Anatomy, block: Block) -> HeadWeights:
    """The folded weights of one layer's heads; key/value heads are repeated for their query heads."""
    o_ID = dense_weight(model.get_submodule(block.o))
    o_HKD = o_ID.view(anatomy.n_heads, anatomy.head_dim, anatomy.d_model) * anatomy.residual_scale
    if anatomy.norm_place == "sandwich":
        o_HKD = write_through(model, anatomy, block.attention_write, o_HKD)

    def reading(part: Literal["q", "k", "v"]) -> Tensor:
        weight_DI = dense_weight(model.get_submodule(getattr(block, part)))
        heads_HDK = split_heads(anatomy, weight_DI, part).movedim(1, 0)
        if len(heads_HDK) != anatomy.n_heads:
            heads_HDK = heads_HDK[[anatomy.kv_head(head) for head in range(anatomy.n_heads)]]
        if anatomy.norm_place == "post":
            return heads_HDK  # BERT's attention reads a stream that is already normed
        return read_through(model, anatomy, block.attention_norm, heads_HDK.mT).mT

    return HeadWeights(reading("q"), reading("k"), reading("v"), o_HKD)


def token_interaction(model: Any, anatomy: Anatomy) -> Tensor:
    """Σ_t u_t ⊗ e_t over the vocabulary, [D, D]: u_t the unembedding with the final norm's gain, e_t the normed embedding.

    For any head W_U · OV · W_E has the non-zero eigenvalues of the K × K matrix O · this · V, because AB and BA have the
    same ones: the V × V matrix is never formed.
    """
    assert anatomy.unembedding is not None
    unembedding_DV = dense_weight(model.get_submodule(anatomy.unembedding))
    embedding_VD = model.get_submodule(anatomy.embedding).weight
    if anatomy.final_norm is not None:
        unembedding_DV = read_through(model, anatomy, anatomy.final_norm, unembedding_DV.mT).mT
    total_DD = torch.zeros(anatomy.d_model, anatomy.d_model, device=unembedding_DV.device)
    total_DD = total_DD.to(unembedding_DV.dtype)
    centred = _is_layer_norm(model.get_submodule(anatomy.blocks[0].attention_norm))
    for first in range(0, len(embedding_VD), _ROWS):
        rows_RD = at_least_float32(embedding_VD[first : first + _ROWS])
        if centred:
            rows_RD = _centred(rows_RD)
        rows_RD = rows_RD / rows_RD.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        total_DD += unembedding_DV[:, first : first + _ROWS] @ rows_RD
    return total_DD


_ROWS = 8192
"""Vocabulary rows widened and normed at once."""


def read_through(model: Any, anatomy: Anatomy, norm: str, directions_XD: Tensor) -> Tensor:
    """Directions [..., D] that meet a normed stream, as directions that meet the stream itself, but for 1 / σ."""
    module = model.get_submodule(norm)
    scaled_XD = directions_XD * (at_least_float32(module.weight) + anatomy.norm_offset)
    return _centred(scaled_XD) if _is_layer_norm(module) else scaled_XD


def write_through(model: Any, anatomy: Anatomy, norm: str, rows_XD: Tensor) -> Tensor:
    """Rows [..., D] that pass a norm on their way to the stream, but for 1 / σ."""
    module = model.get_submodule(norm)
    rows_XD = _centred(rows_XD) if _is_layer_norm(module) else rows_XD
    return rows_XD * (at_least_float32(module.weight) + anatomy.norm_offset)


def dense_weight(linear: Any) -> Tensor:
    """A projection's weight as [in, out] numbers, at least float32; a packed one answers for the unit vectors."""
    weight = linear.weight
    if type(weight).__name__ == "Parameter" and weight.is_floating_point():
        return at_least_float32(input_first(linear))
    unit_II = torch.eye(linear.in_features, device=weight.device, dtype=torch.float32)
    answer_IO: Tensor = linear(unit_II)
    return at_least_float32(answer_IO if linear.bias is None else answer_IO - linear.bias)


def eigenvalues(matrix_HKK: Tensor) -> Tensor:
    """Complex eigenvalues [..., K] of small matrices, in float64 on the CPU (no CUDA kernel for general matrices)."""
    values: Tensor = torch.linalg.eigvals(matrix_HKK.double().cpu())
    return values


def copying(eigenvalues_HK: Tensor, scale_H: Tensor) -> Tensor:
    """Σλ / Σ|λ| per head: 1 copies every token, −1 suppresses it; 0 where the eigenvalues vanish beside ``scale_H``."""
    total_H = eigenvalues_HK.abs().sum(-1)
    share_H: Tensor = eigenvalues_HK.real.sum(-1) / total_H
    return torch.where(total_H > 1e-9 * scale_H.double().cpu().clamp_min(1e-300), share_H, 0.0)


def _centred(rows_XD: Tensor) -> Tensor:
    return rows_XD - rows_XD.mean(-1, keepdim=True)


def _is_layer_norm(module: Any) -> bool:
    return isinstance(module, torch.nn.LayerNorm)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def every_copying(loaded: LoadedModel, progress: Progress) -> tuple[np.ndarray, float]:
    """Σλ / Σ|λ| of every head [L, H], and how far Σλ is from the trace, as a share of Σ|λ|."""
    model, anatomy = loaded.model, loaded.anatomy
    token_DD = token_interaction(model, anatomy)
    rows, gap = [], 0.0
    for block in anatomy.blocks:
        progress(block.index, anatomy.n_layers, f"weights of layer {block.index}")
        weights = head_weights(model, anatomy, block)
        small_HKK = weights.o_HKD @ token_DD @ weights.v_HDK
        lambda_HK = eigenvalues(small_HKK)
        trace_H = small_HKK.diagonal(0, -1, -2).sum(-1).double().cpu()
        size_H = lambda_HK.abs().sum(-1)
        off_H = (lambda_HK.sum(-1).real - trace_H).abs() / size_H.clamp_min(torch.finfo(torch.float64).tiny)
        gap = max(gap, float(off_H.max()))
        scale_H = weights.o_HKD.norm(dim=(-1, -2)) * token_DD.norm() * weights.v_HDK.norm(dim=(-1, -2))
        rows.append(copying(lambda_HK, scale_H))
    return torch.stack(rows).numpy(), gap


def composition(chosen: HeadWeights, head: int, earlier: HeadWeights) -> dict[str, Tensor]:
    """How much a head reads what each head of an earlier layer writes, per way of reading: ``q``, ``k``, ``v`` → [H].

    ‖W_1 W_2‖_F / (‖W_1‖_F ‖W_2‖_F) of Elhage et al. 2021 with W_2 the earlier head's OV, W_1 the chosen head's QK read
    from the query's or the key's side, or its OV. All products are head_dim × head_dim.
    """
    q_DK, k_DK, v_DK, o_KD = (part[head] for part in (chosen.q_HDK, chosen.k_HDK, chosen.v_HDK, chosen.o_HKD))
    # x · V₁ · O₁ · [what the head reads] · [the rest of its circuit]
    circuits = {"q": (q_DK, k_DK.mT), "k": (k_DK, q_DK.mT), "v": (v_DK, o_KD)}
    written_H = product_norm(earlier.v_HDK, earlier.o_HKD)
    found = {}
    for name, (reads_DK, rest_KD) in circuits.items():
        middle_HKK = earlier.o_HKD @ reads_DK
        gram_HKK = earlier.v_HDK.mT @ earlier.v_HDK
        squared_H = ((gram_HKK @ middle_HKK @ (rest_KD @ rest_KD.mT)) * middle_HKK).sum((-1, -2))
        size_H = written_H * product_norm(reads_DK, rest_KD)
        found[name] = torch.where(size_H > 0, squared_H.clamp(min=0).sqrt() / size_H.clamp_min(1e-30), 0.0)
    return found


def product_norm(left_XDK: Tensor, right_XKD: Tensor) -> Tensor:
    """‖left · right‖_F from K × K products."""
    squared: Tensor = ((left_XDK.mT @ left_XDK) * (right_XKD @ right_XKD.mT)).sum((-1, -2))
    return squared.clamp(min=0).sqrt()


def chance_composition(d_model: int, head_dim: int, *, draws: int = 16) -> float:
    """The composition score of heads with random Gaussian weights of these shapes, mean of seeded draws."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(draws, d_model, head_dim, generator=generator)

    chosen, earlier = (HeadWeights(drawn(), drawn(), drawn(), drawn().mT) for _ in range(2))
    scores = [float(composition(chosen, head, earlier)["k"].mean()) for head in range(2)]
    return sum(scores) / len(scores)
