"""Reading the decision of experts that are not called with it.

Llama-4 (``Llama4TextMoe``) multiplies every expert's *input* by a routing weight, 0 for those not chosen, and computes
all experts on all tokens. Its decision is what its router hands over: scores [T, E] with exactly ``top_k`` above 0,
and the logits. This is still the decision that is used, not one computed again: the block multiplies by these scores.

Families whose decision cannot be read so are refused when they are opened (``UNSUPPORTED_EXPERTS``).

Legend: ``T`` tokens, ``K`` slots, ``E`` experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def scaled_input_decision(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts [T, K], their weights [T, K] and the logits [T, E] of what Llama-4's router put out."""
    scores_TE, logits_TE = output
    chosen = int((scores_TE > 0).sum(-1).max())
    weights_TK, experts_TK = scores_TE.topk(chosen, dim=-1)
    return experts_TK, weights_TK, logits_TE
