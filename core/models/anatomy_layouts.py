"""The ways the field lays out a transformer layer, as data: one row is one way.

A layer is recognised by the modules it has, not by the model's name: the first row whose modules are all present is
taken, so a new architecture built like Llama needs no line here. Names can lie: ``anatomy_verify.py`` is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.models.anatomy import Fusion, Mixer, NormPlace


@dataclass(frozen=True)
class AttentionLayout:
    """Paths inside a layer; ``norms`` are attention_norm, mlp_norm and, for a sandwich, the two after-norms."""

    attention: str
    q: str
    k: str
    v: str
    o: str
    norms: tuple[str, ...]
    fusion: Fusion = "separate"
    norm_place: NormPlace = "pre"
    write: str = ""
    """What attention adds to the residual, if not the attention module's own output."""
    mlp_write: str = ""
    """The same for the MLP."""
    mixer: Mixer = "heads"


@dataclass(frozen=True)
class MlpLayout:
    """Paths inside a layer; ``module`` is None where the layer holds the linears itself."""

    module: str | None
    gate: str | None
    up: str
    down: str


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ATTENTION = (
    # Gemma-2: its post_attention_layernorm is an after-norm, unlike Llama's, so this row comes first.
    AttentionLayout(
        "self_attn",
        *_QKV,
        norms=(
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ),
        norm_place="sandwich",
    ),
    # Llama, Mistral, Qwen, Mixtral, OLMoE
    AttentionLayout("self_attn", *_QKV, norms=("input_layernorm", "post_attention_layernorm")),
    # Jamba: attention in some layers, Mamba in the others
    AttentionLayout("self_attn", *_QKV, norms=("input_layernorm", "pre_ff_layernorm")),
    AttentionLayout(
        "mamba",
        *3 * ("mamba.in_proj",),
        "mamba.out_proj",
        norms=("input_layernorm", "pre_ff_layernorm"),
        mixer="mamba",
    ),
    # DeepSeek: keys and values unpacked from a latent; queries too, where there is a q_lora_rank
    *(
        AttentionLayout(
            "self_attn",
            f"self_attn.{query}",
            *2 * ("self_attn.kv_b_proj",),
            "self_attn.o_proj",
            norms=("input_layernorm", "post_attention_layernorm"),
            mixer="latent",
        )
        for query in ("q_b_proj", "q_proj")
    ),
    # GPT-2
    AttentionLayout(
        "attn", *3 * ("attn.c_attn",), "attn.c_proj", norms=("ln_1", "ln_2"), fusion="concatenated"
    ),
    # GPT-NeoX, Pythia
    AttentionLayout(
        "attention",
        *3 * ("attention.query_key_value",),
        "attention.dense",
        norms=("input_layernorm", "post_attention_layernorm"),
        fusion="per_head",
    ),
    # OPT
    AttentionLayout(
        "self_attn",
        *_QKV[:3],
        "self_attn.out_proj",
        norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    # BERT
    AttentionLayout(
        "attention.self",
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        norm_place="post",
        write="attention.output.dense",
    ),
    # ViT
    AttentionLayout(
        "attention",
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        norms=("layernorm_before", "layernorm_after"),
    ),
    # DINOv2: what a sublayer gives is scaled per dimension before it is added
    AttentionLayout(
        "attention",
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        norms=("norm1", "norm2"),
        write="layer_scale1",
        mlp_write="layer_scale2",
    ),
)
MLP = (
    MlpLayout("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    MlpLayout("feed_forward", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    MlpLayout("mlp", None, "mlp.c_fc", "mlp.c_proj"),
    MlpLayout("mlp", None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    MlpLayout("mlp", None, "mlp.fc1", "mlp.fc2"),
    MlpLayout(None, None, "fc1", "fc2"),
    MlpLayout(None, None, "intermediate.dense", "output.dense"),
)
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layernorm")
POSITIONS = ("wpe", "embed_positions", "embeddings.position_embeddings")
MOE_BLOCKS = ("mlp", "feed_forward", "block_sparse_moe")
"""What layers call the module that holds router and experts."""
ROUTERS = ("gate", "router")
SHARED_EXPERTS = ("shared_expert", "shared_experts")
SHARED_GATES = ("shared_expert_gate",)
SCALED_INPUT_EXPERTS = ("Llama4TextExperts",)
"""Experts modules called with every expert's inputs, already scaled by the routing weights (0: not chosen)."""
UNSUPPORTED_EXPERTS: dict[str, str] = {
    "JetMoeMoE": "sorts tokens by expert inside its router and is one of two mixtures in each layer, attention the other",
    "SwitchTransformersSparseMLP": "drops tokens over an expert's capacity and is part of an encoder–decoder",
    "NllbMoeSparseMLP": "drops tokens over an expert's capacity and is part of an encoder–decoder",
    "DbrxExperts": "keeps all experts in flat matrices outside the shared contract of transformers",
    "LongcatFlashExperts": "mixes experts that compute with experts that pass their input through, around two attentions",
    "DogeCDMoE": "retrieves experts by product keys from embeddings",
}
"""Experts modules known not to fit, by class, and why; every other one outside the contract is refused without why."""
