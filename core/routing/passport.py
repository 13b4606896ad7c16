"""An adapter passport: what is known of a model's mixtures of experts, and proof from the model itself.

Every fact is read off the modules; the self-test watches one forward pass and holds the decision that was really used
against what the known rule makes of the router's logits. Plain data, fit for JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.routing.discover import MoeLayer, moe_layers, neutral_when_unused
from core.routing.lens import Routed, routed
from core.routing.rules import decide

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

TOKENS = 64
SEED = 20
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest allowed difference of a routing weight, relative to the scale; routers round weights to the model's dtype."""
RENORMALISED = ("softmax_topk_renorm", "topk_softmax", "sigmoid_bias_renorm")
"""Rules whose routing weights sum to the layer's scale for every token."""


def passport(loaded: LoadedModel) -> dict[str, Any]:
    """Facts and self-test of every MoE layer; ``layers`` is empty for a dense model.

    Each layer: router class, rule, renormalised, experts, top_k, groups, scale, shared expert, shim, whether removing
    an unused expert is neutral, and ``checks``, whose values are true, false, or None where the rule is unknown. Beside
    them the share of tokens whose recomputed set of experts is the captured one, the largest difference of a routing
    weight, and the smallest and largest sum of a token's weights. Takes the model's lock for two forward passes.
    """
    layers = moe_layers(loaded)
    if not layers:
        return {"architecture": loaded.anatomy.architecture, "layers": [], "checks": {}}
    seen: dict[int, Routed] = {}
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(loaded.anatomy.vocab_size, (1, TOKENS), generator=generator).to(loaded.device)
    with loaded.lock, torch.inference_mode():
        plain = loaded.model(input_ids=ids, use_cache=False).logits
        with routed(loaded, lambda at: seen.update({at.layer: at})):
            watched = loaded.model(input_ids=ids, use_cache=False).logits
        described = [_described(loaded, layer, seen[layer.layer]) for layer in layers]
    return {
        "architecture": loaded.anatomy.architecture,
        "model_type": loaded.anatomy.model_type,
        "fingerprint": loaded.fingerprint,
        "tokens": TOKENS,
        "checks": {"watching leaves the logits bit-equal": bool(torch.equal(plain, watched))},
        "layers": described,
    }


def _described(loaded: LoadedModel, layer: MoeLayer, at: Routed) -> dict[str, Any]:
    router = loaded.model.get_submodule(layer.router)
    distinct = all(len(set(row)) == layer.top_k for row in at.experts_TK.tolist())
    load_E = torch.bincount(at.experts_TK.flatten(), minlength=layer.n_experts)
    sums_T = at.weights_TK.sum(-1)
    share, gap = _recomputed(layer, router, at)
    tolerance = TOLERANCE[loaded.dtype]
    renormalised = layer.rule in RENORMALISED
    return {
        "layer": layer.layer,
        "router": layer.router,
        "router_class": layer.router_class,
        "rule": layer.rule,
        "renormalised": None if layer.rule == "unknown" else renormalised,
        "n_experts": layer.n_experts,
        "top_k": layer.top_k,
        "n_groups": layer.n_groups,
        "top_groups": layer.top_groups,
        "scale": layer.scale,
        "shared_expert": layer.shared is not None,
        "shared_gate": layer.shared_gate is not None,
        "shim": layer.shim,
        "neutral_when_unused": neutral_when_unused(layer),
        "share_of_tokens_recomputed": share,
        "largest_weight_difference": gap,
        "weight_sum": [float(sums_T.min()), float(sums_T.max())],
        "checks": {
            "each token has top_k distinct experts": distinct,
            "loads sum to tokens · top_k": int(load_E.sum()) == len(at.experts_TK) * layer.top_k,
            "recomputed decision is the captured one": None if share is None else share == 1.0,
            "recomputed weights are the captured ones": None
            if gap is None
            else gap <= tolerance * layer.scale,
            "weights sum to the scale": bool(
                ((sums_T - layer.scale).abs() <= 4 * tolerance * layer.scale).all()
            )
            if renormalised
            else None,
        },
    }


def _recomputed(layer: MoeLayer, router: Any, at: Routed) -> tuple[float | None, float | None]:
    """Share of tokens with the same set of experts, and the largest difference of their weights."""
    if layer.rule == "unknown" or at.logits_TE is None:
        return None, None
    experts_TK, weights_TK = decide(layer, router, at.logits_TE)
    captured_TE, computed_TE = (
        _spread(layer, experts, weights)
        for experts, weights in ((at.experts_TK, at.weights_TK), (experts_TK, weights_TK))
    )
    same_T = (at.experts_TK.sort(-1).values == experts_TK.sort(-1).values).all(-1)
    gap_T = (captured_TE - computed_TE).abs().amax(-1)
    return float(same_T.float().mean()), float(gap_T[same_T].max()) if same_T.any() else float("inf")


def _spread(layer: MoeLayer, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Routing weights by expert, [T, E], 0 where an expert was not chosen."""
    empty_TE = torch.zeros(len(experts_TK), layer.n_experts, device=weights_TK.device)
    spread_TE: Tensor = empty_TE.scatter(-1, experts_TK, weights_TK.float())
    return spread_TE
