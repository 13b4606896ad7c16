"""What a next-token distribution says, read from logits a few rows at a time.

Legend of shape suffixes: R rows (positions, or layers × positions), V vocabulary, K top tokens.

The vocabulary is the bill of every lens: logits of all layers are never held together. Each batch of rows is
unembedded, described by a few numbers per row, and dropped. ``log_softmax`` is not called: one exponential per
logit gives the normalizer and the entropy, one dot product the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.errors import SlimscopeError
from core.lazy import torch
from core.models.readout import finish_logits, unembed

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Read = Callable[["Tensor"], "Tensor"]
"""From residuals [R, d_model] to float32 logits [R, V]."""
UnembeddingPrecision = Literal["model", "bfloat16"]
ROWS_BYTES = 12 << 20
"""Size of one batch of float32 logits. A few buffers of this size stay inside the heap that glibc keeps; larger
ones are mapped afresh at each allocation, and their page faults cost as much as the arithmetic."""


@dataclass(frozen=True)
class Reference:
    """A distribution that others are compared with."""

    p_RV: Tensor
    negative_entropy_R: Tensor
    """Σ p · log p, nats."""

    @classmethod
    def of(cls, logits_RV: Tensor) -> Reference:
        """From logits."""
        z_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
        log_norm_R = z_RV.exp().sum(-1).log()
        p_RV = (z_RV - log_norm_R[:, None]).exp()
        return cls(p_RV, torch.linalg.vecdot(p_RV, z_RV) - log_norm_R)

    def divergence(self, z_RV: Tensor, log_norm_R: Tensor) -> Tensor:
        """KL(reference ‖ softmax(z)) per row in nats; z may be several times the reference's rows, one after another.

        The same numbers in the same order give exactly 0.
        """
        n, vocab_size = self.p_RV.shape
        cross_GR = torch.linalg.vecdot(self.p_RV, z_RV.view(-1, n, vocab_size)) - log_norm_R.view(-1, n)
        kl_GR: Tensor = self.negative_entropy_R - cross_GR
        return kl_GR.flatten().clamp(min=0)  # two equal sums in float32 may differ by 1e-6 either way


@dataclass(frozen=True)
class Described:
    """A few numbers per row of logits."""

    top_ids_RK: Tensor
    top_p_RK: Tensor
    entropy_R: Tensor
    """Nats."""
    log_p_target_R: Tensor
    """Natural logarithm of the target's probability."""
    rank_R: Tensor
    """Rank of the target: 1 is the top token; ties share the better rank."""
    kl_R: Tensor
    """KL from the reference to the row, nats; NaN without a reference."""


def describe(
    logits_RV: Tensor,
    targets_R: Tensor,
    *,
    top_k: int,
    where: Callable[[int], str],
    reference: Reference | None = None,
) -> Described:
    """Reduce float32 logits, which are overwritten.

    Raises ``SlimscopeError`` when a row is not finite, naming it by ``where(row)``.
    """
    z_RV = logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    top = z_RV.topk(top_k)
    e_RV = z_RV.exp()
    norm_R = e_RV.sum(-1)
    log_norm_R = norm_R.log()
    entropy_R = log_norm_R - torch.linalg.vecdot(e_RV, z_RV) / norm_R
    target_R1 = z_RV.gather(-1, targets_R[:, None])
    # Counted in the spent buffer: summing booleans would make an 8-byte copy of each, larger than the logits.
    rank_R = 1 + torch.gt(z_RV, target_R1, out=e_RV).sum(-1).long()
    bad_R = ~torch.isfinite(entropy_R)
    if bad_R.any():
        raise SlimscopeError(
            f"the logits at {where(int(bad_R.int().argmax()))} are not finite (NaN or infinity), so nothing can be read from them; "
            "open the model in float32, or check its weights"
        )
    kl_R = (
        torch.full_like(entropy_R, torch.nan) if reference is None else reference.divergence(z_RV, log_norm_R)
    )
    return Described(
        top.indices,
        (top.values - log_norm_R[:, None]).exp(),
        entropy_R.clamp(min=0),
        target_R1[:, 0] - log_norm_R,
        rank_R,
        kl_R,
    )


def rows_at_once(vocab_size: int) -> int:
    """How many rows of float32 logits fit one batch."""
    return max(1, ROWS_BYTES // (4 * vocab_size))


def reader(loaded: LoadedModel, precision: UnembeddingPrecision) -> Read:
    """A function from residuals [R, d_model] to float32 logits [R, V].

    ``"model"`` calls the model's own modules; ``"bfloat16"`` rounds the unembedding's inputs and weights, which is
    faster and only a preview.
    """
    model, anatomy = loaded.model, loaded.anatomy
    if precision == "model":
        return lambda residual_RD: unembed(model, anatomy, residual_RD).float()
    assert anatomy.unembedding is not None
    head = model.get_submodule(anatomy.unembedding)
    norms = [model.get_submodule(path) for path in (anatomy.final_norm, anatomy.head_transform) if path]
    weight_VD = head.weight.to(torch.bfloat16)
    bias_V = None if head.bias is None else head.bias.to(torch.bfloat16)

    def preview(residual_RD: Tensor) -> Tensor:
        for norm in norms:
            residual_RD = norm(residual_RD)
        rounded_RD = residual_RD.to(torch.bfloat16)
        return finish_logits(anatomy, torch.nn.functional.linear(rounded_RD, weight_VD, bias_V).float())

    return preview
