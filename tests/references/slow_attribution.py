"""Slow, obvious versions of the attributions: one head, one neuron, one coalition at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from core.capture import capture
from core.models.anatomy import Anatomy
from core.models.anatomy_verify import eager_attention
from core.models.loaded import LoadedModel
from core.models.weights import split_heads


def parts_by_hand(loaded: LoadedModel, ids: list[int], weight_D: torch.Tensor) -> dict[str, float]:
    """What each head and dense MLP adds to weight · final norm(residual) at the last position, norms frozen.

    Head outputs are made from the attention pattern and the values, by the anatomy's map of query to key/value
    heads; each is carried through every norm on its way as a whole vector, by the norm's textbook formula.
    """
    model, anatomy = loaded.model, loaded.anatomy
    blocks = anatomy.blocks
    writes = [path for b in blocks for path in (b.attention_write, b.mlp_write)]
    kept = [*writes, *(b.o for b in blocks), *(b.v for b in blocks), *(b.down for b in blocks if b.down)]
    with (
        torch.inference_mode(),
        eager_attention(model),
        capture(model, [b.attention for b in blocks], item=1) as pattern,
        capture(model, kept) as out,
        capture(model, [b.down for b in blocks if b.down], inputs=True) as neurons,
        capture(model, [blocks[-1].path]) as final,
    ):
        model(torch.tensor([ids]))
    h_D = final[blocks[-1].path][0, -1].double()
    final_norm = model.get_submodule(anatomy.final_norm)

    def read(part_D: torch.Tensor, through: str) -> float:
        if anatomy.norm_place == "sandwich":
            before = next(b for b in blocks if through in (b.attention_write, b.mlp_write))
            source = before.o if through == before.attention_write else before.down
            fed_D = out[source].reshape(-1, anatomy.d_model)[-1].double()
            part_D = frozen_norm(model.get_submodule(through), part_D, fed_D, anatomy)
        return float(weight_D.double() @ frozen_norm(final_norm, part_D, h_D, anatomy))

    found = {}
    for block in blocks:
        values = split_heads(anatomy, out[block.v], "v")[0].double()  # [P, G, K]
        o = model.get_submodule(block.o)
        weight_ID = (o.weight if hasattr(o, "nf") else o.weight.T).double()
        for head in range(anatomy.n_heads):
            z_K = sum(
                float(pattern[block.attention][0, head, -1, p]) * values[p, anatomy.kv_head(head)]
                for p in range(len(ids))
            )
            rows = weight_ID[head * anatomy.head_dim : (head + 1) * anatomy.head_dim]
            found[f"L{block.index}H{head}"] = read(z_K @ rows, block.attention_write)
        if block.down is not None:
            down = model.get_submodule(block.down)
            weight_ND = (down.weight if hasattr(down, "nf") else down.weight.T).double()
            a_N = neurons[block.down].reshape(-1, weight_ND.shape[0])[-1].double()
            written_D = sum(a_N[n] * weight_ND[n] for n in range(len(a_N)))
            if down.bias is not None:
                written_D = written_D + down.bias.double()
            found[f"MLP {block.index}"] = read(written_D, block.mlp_write)
    return found


def frozen_norm(norm: Any, part_D: torch.Tensor, fed_D: torch.Tensor, anatomy: Anatomy) -> torch.Tensor:
    """γ ⊙ (part − mean) / σ(fed), the mean only for a LayerNorm; no bias."""
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    if isinstance(norm, torch.nn.LayerNorm):
        part_D = part_D - part_D.mean()
        sigma = math.sqrt(float(((fed_D - fed_D.mean()) ** 2).mean()) + eps)
    else:
        sigma = math.sqrt(float((fed_D**2).mean()) + eps)
    return part_D / sigma * (norm.weight.double() + anatomy.norm_offset)


def shapley_by_permutations(n_players: int, value: Callable[[frozenset[int]], float]) -> list[float]:
    """Shapley values as the mean marginal contribution over all n! orders."""
    totals = [0.0] * n_players
    for order in itertools.permutations(range(n_players)):
        present: frozenset[int] = frozenset()
        for player in order:
            totals[player] += value(present | {player}) - value(present)
            present |= {player}
    return [total / math.factorial(n_players) for total in totals]
