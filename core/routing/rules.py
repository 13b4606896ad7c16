"""The rules by which routers turn logits into a decision, as data and as formulas.

Analyses read the decision from the experts' arguments and never from here: this file only says which rule a router
follows, and recomputes the decision so that what was captured can be held against it. A router whose rule is not
known here is captured all the same, and its rule is ``unknown``.

Legend: ``T`` tokens, ``E`` experts, ``K`` top-k slots, ``G`` groups of E/G neighbouring experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.routing.discover import MoeLayer

Rule = Literal[
    "softmax_topk",
    "softmax_topk_renorm",
    "softmax_group_topk",
    "topk_softmax",
    "topk_sigmoid",
    "sigmoid_bias",
    "sigmoid_bias_renorm",
    "unknown",
]
"""How logits become chosen experts and routing weights:

- ``softmax_topk``: softmax over all E, the k largest, as they are (OLMoE, Qwen2-MoE, Jamba).
- ``softmax_topk_renorm``: the same, divided by their sum (Mixtral, Qwen3-MoE).
- ``softmax_group_topk``: softmax over all E, only the best groups by their largest, the k largest · scale
  (DeepSeek-V2, arXiv 2405.04434).
- ``topk_softmax``: the k largest logits, softmax over these k (gpt-oss, Granite-MoE).
- ``topk_sigmoid``: the k largest logits, each through a sigmoid; scales the experts' *inputs* (Llama-4).
- ``sigmoid_bias``: sigmoid scores; chosen by score + bias within the best groups by the sum of their two largest;
  weighed by the score without bias · scale (DeepSeek-V3, arXiv 2412.19437).
- ``sigmoid_bias_renorm``: the same, the weights divided by their sum before · scale.
"""

ALWAYS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "MixtralTopKRouter",
            "MiniMaxTopKRouter",
            "HunYuanMoEV1Gate",
            "Qwen3VLMoeTextTopKRouter",
            "Qwen3OmniMoeTextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ),
        "softmax_topk_renorm",
    ),
    "JambaTopKRouter": "softmax_topk",
    **dict.fromkeys(
        (
            "GptOssTopKRouter",
            "GraniteMoeTopKRouter",
            "GraniteMoeSharedTopKRouter",
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSWATopKRouter",
            "AriaTextTopKRouter",
        ),
        "topk_softmax",
    ),
    "Llama4Router": "topk_sigmoid",
    "MiniMaxM3VLTopKRouter": "sigmoid_bias_renorm",
}
"""Router class → the one rule it follows."""
IF_NORM_TOPK_PROB: dict[str, tuple[Rule, Rule]] = {
    **dict.fromkeys(
        (
            "OlmoeTopKRouter",
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter",
        ),
        ("softmax_topk", "softmax_topk_renorm"),
    ),
    **dict.fromkeys(
        (
            "AXK1TopkRouter",
            "AXK2TopkRouter",
            "BailingHybridTopkRouter",
            "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter",
            "Dots1TopkRouter",
            "Dots3NoteTextTopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV4TopkRouter",
            "KimiLinearTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        ("sigmoid_bias", "sigmoid_bias_renorm"),
    ),
}
"""Router class → its rule without and with ``norm_topk_prob``."""
BY_TOPK_METHOD = ("DeepseekV2TopkRouter", "DeepseekOcr2TextTopkRouter", "UnlimitedOcrTextTopkRouter")
"""Routers that know groups only where their ``topk_method`` says so."""


def rule_of(router: Any) -> Rule:
    """The rule a router follows, by its class and its own attributes; ``unknown`` for any other class."""
    name = type(router).__name__
    if name in IF_NORM_TOPK_PROB:
        return IF_NORM_TOPK_PROB[name][bool(router.norm_topk_prob)]
    if name in BY_TOPK_METHOD:
        return "softmax_topk" if router.topk_method == "greedy" else "softmax_group_topk"
    return ALWAYS.get(name, "unknown")


def decide(layer: MoeLayer, router: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] and routing weights [T, K] that ``layer``'s rule makes of its router's logits.

    The order of the k slots is by choice score, falling; routers need not keep it. Raises ``ValueError`` for a layer
    whose rule is unknown.
    """
    scores_TE, choice_TE = choice_scores(layer, router, logits_TE)
    top_TK, experts_TK = choice_TE.topk(layer.top_k, dim=-1)
    if layer.rule in ("topk_softmax", "topk_sigmoid"):
        return experts_TK, top_TK.softmax(-1) if layer.rule == "topk_softmax" else top_TK.sigmoid()
    weights_TK = scores_TE.gather(-1, experts_TK)
    if layer.rule.endswith("renorm"):
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return experts_TK, weights_TK * layer.scale


def choice_scores(layer: MoeLayer, router: Any, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """What routing weights are taken from, and what the k largest of are chosen: [T, E] both, float32.

    The second is −∞ for experts whose group was not. Raises ``ValueError`` for a layer whose rule is unknown.
    """
    wide_TE = logits_TE.float()
    if layer.rule == "unknown":
        raise ValueError(f"{layer.router}: {layer.router_class} follows no rule known here")
    if layer.rule in ("topk_softmax", "topk_sigmoid"):
        return wide_TE, wide_TE
    if layer.rule.startswith("sigmoid"):
        scores_TE = wide_TE.sigmoid()
        biased_TE = scores_TE + router.e_score_correction_bias
        return scores_TE, _best_groups(layer, biased_TE, best_of_group=2)
    scores_TE = wide_TE.softmax(-1)
    return scores_TE, _best_groups(layer, scores_TE, best_of_group=1)


def _best_groups(layer: MoeLayer, choice_TE: Tensor, *, best_of_group: int) -> Tensor:
    """Choice scores with −∞ outside the ``top_groups`` groups whose largest few scores sum highest."""
    if layer.top_groups == layer.n_groups:
        return choice_TE
    grouped_TGE = choice_TE.view(len(choice_TE), layer.n_groups, -1)
    strength_TG = grouped_TGE.topk(best_of_group, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(strength_TG, dtype=torch.bool)
    kept_TG.scatter_(-1, strength_TG.topk(layer.top_groups, dim=-1).indices, value=True)
    return grouped_TGE.masked_fill(~kept_TG[..., None], float("-inf")).view_as(choice_TE)
