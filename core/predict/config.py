"""The shape of a decoder from its ``config.json`` alone and the bits of a storage format, for a model that is not here.

Knows grouped attention with an explicit ``head_dim``, sliding windows, multi-head latent attention (DeepSeek-V2,
arXiv:2405.04434), gated MLPs, routed and shared experts. Biases, norms and router biases are left out: under 0.1 % of
the weights. Knows no file but by its content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import BadInput
from core.predict.model import Layer, Shape

LONGEST = 1 << 20
"""Tokens of context where the config does not say."""
SLIDING_FIRST = ("gemma2", "gpt_oss")
"""Model types whose even layers slide, without a line in the config that says so."""
ATTENTION = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Bits:
    """Bits per weight of a format, scales included, by what it stores."""

    blocks: float
    """Attention, dense MLPs and shared experts."""
    head: float
    """The unembedding, and with it an embedding that is tied to it."""
    embedding: float
    experts: float


@dataclass(frozen=True)
class Attention:
    """One layer's attention: its weights, what it keeps per position, and n_heads · head_dim as scores and values cost."""

    parameters: int
    kept: int
    attends: int


def of_config(name: str, told: Mapping[str, Any], bits: Bits) -> Shape:
    """The shape of a decoder; raises ``BadInput`` for a config without the sizes or with layers of another kind."""
    config = told.get("text_config") or told  # a model that sees images has its decoder's sizes inside
    d, vocab = _size(name, config, "hidden_size"), _size(name, config, "vocab_size")
    n_layers, d_ff = _size(name, config, "num_hidden_layers"), _size(name, config, "intermediate_size")
    attention, experts = _attention(name, config, d), _Experts.of(config, d, d_ff)
    windows = _windows(name, config, n_layers)
    layers = tuple(
        Layer(
            kept=attention.kept,
            window=windows[index],
            attends=attention.attends,
            n_experts=experts.n if experts.routes(index) else 0,
            top_k=experts.top_k if experts.routes(index) else 0,
            expert_bytes=experts.each * bits.experts / 8 if experts.routes(index) else 0.0,
            expert_parameters=experts.each if experts.routes(index) else 0.0,
        )
        for index in range(n_layers)
    )
    n_routed = sum(layer.n_experts > 0 for layer in layers)
    dense = (n_layers - n_routed) * 3 * d * d_ff
    beside = n_routed * (d * experts.n + experts.shared)
    blocks, table = float(n_layers * attention.parameters + dense + beside), float(vocab * d)
    tied, routed = bool(config.get("tie_word_embeddings")), n_routed * experts.n * experts.each
    read = (blocks * bits.blocks + table * bits.head) / 8
    return Shape(
        name=name,
        family="decoder",
        weight_bytes=read + (0 if tied else table * bits.embedding / 8) + routed * bits.experts / 8,
        read_bytes=read,
        parameters=blocks + table * (1 if tied else 2) + routed,
        read_parameters=blocks + table,
        head_parameters=table,
        layers=layers,
        d_model=d,
        d_ff=experts.passed if n_routed else d_ff,
        vocab_size=vocab,
        context_length=int(config.get("max_position_embeddings") or LONGEST),
        counted="config",
    )


def _size(name: str, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"{name}: the config has no {key!r}; give one of a decoder such as Llama or Qwen")
    return value


def _attention(name: str, config: Mapping[str, Any], d: int) -> Attention:
    """Grouped or latent attention: weights of all its projections."""
    heads = _size(name, config, "num_attention_heads")
    if latent := config.get("kv_lora_rank"):
        rope, nope = (_size(name, config, key) for key in ("qk_rope_head_dim", "qk_nope_head_dim"))
        value, rank = _size(name, config, "v_head_dim"), config.get("q_lora_rank")
        query = rank * (d + heads * (nope + rope)) if rank else d * heads * (nope + rope)
        keys = d * (latent + rope) + latent * heads * (nope + value)
        # Scores over nope + rope and values over v_head_dim: together 4 FLOP per number of their mean.
        return Attention(query + keys + heads * value * d, latent + rope, heads * (nope + rope + value) // 2)
    groups = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or d // heads)
    return Attention(2 * d * heads * size + 2 * d * groups * size, 2 * groups * size, heads * size)


def _windows(name: str, config: Mapping[str, Any], n_layers: int) -> list[int | None]:
    """Per layer, the positions it looks back; None for all."""
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) - set(ATTENTION):
        other = sorted(set(kinds) - set(ATTENTION))
        raise BadInput(
            f"{name}: layers of type {', '.join(other)} cannot be counted from a config; leave --format out, so that "
            "the model itself is opened"
        )
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return [None] * n_layers
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if pattern := config.get("sliding_window_pattern"):  # Gemma 3, Command R7B: every n-th layer sees all
        return [window if (index + 1) % pattern else None for index in range(n_layers)]
    every = int(config.get("sliding_window_every") or (2 if config.get("model_type") in SLIDING_FIRST else 1))
    return [window if index % every == 0 else None for index in range(n_layers)]


@dataclass(frozen=True)
class _Experts:
    """The experts of a model's MoE layers; ``n`` is 0 for a dense one."""

    n: int = 0
    top_k: int = 0
    each: float = 0.0
    """Weights of one."""
    shared: int = 0
    """Weights of those that every token passes."""
    passed: int = 0
    """Neurons that one token passes."""
    first: int = 0
    """Layers before the first that routes."""
    every: int = 1
    dense: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any], d: int, d_ff: int) -> _Experts:
        keys = ("n_routed_experts", "num_experts", "num_local_experts")
        n = next((int(config[key]) for key in keys if config.get(key)), 0)
        if not n:
            return cls()
        width, top_k = (
            int(config.get("moe_intermediate_size") or d_ff),
            int(config.get("num_experts_per_tok") or 1),
        )
        shared = int(
            config.get("shared_expert_intermediate_size") or width * int(config.get("n_shared_experts") or 0)
        )
        return cls(
            n=n,
            top_k=top_k,
            each=3.0 * d * width,
            shared=3 * d * shared,
            passed=width * top_k + shared,
            first=int(config.get("first_k_dense_replace") or 0),
            every=int(config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1),
            dense=frozenset(config.get("mlp_only_layers") or ()),
        )

    def routes(self, layer: int) -> bool:
        """Whether a layer has routed experts (DeepSeek: from a layer on; Qwen: every n-th, but the named)."""
        if not self.n or layer < self.first or layer in self.dense:
            return False
        return (layer + 1) % self.every == 0 if self.first == 0 else layer % self.every == 0
