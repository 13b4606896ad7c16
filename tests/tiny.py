"""Tiny random models of every supported family, made in code: config, seeded weights, a working tokenizer.

Nothing is downloaded. Weights are drawn wide (fan-in scaled, norms and biases random too), so that no
identity holds by accident: a dropped bias, a dropped (1 + γ) or a wrong head grouping changes the output.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.patch_grid import image_size
from core.types import ModelRef

VOCAB = 512
D_MODEL, D_FF, LAYERS, HEADS, KV_HEADS = 128, 256, 3, 4, 2
CORPUS = (
    "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees.",
    "When Mary and John went to the store, John gave a drink to Mary. One two three four five six seven.",
    "def add(left, right):\n    return left + right\n\nfor index in range(10):\n    print(index)\n",
    "A transformer reads tokens, adds to the residual stream, and predicts the next token of the text.",
)

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": KV_HEADS, "intermediate_size": D_FF}
_MOE = {**_GROUPED, "num_experts_per_tok": 2}

_BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=False)
    ),
    "smollm": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_GROUPED, sliding_window=32, head_dim=32, tie_word_embeddings=False)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=True)
    ),
    # head_dim 64 ≠ 128 / 4: the explicit head_dim must be read, never derived.
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_GROUPED, head_dim=64, tie_word_embeddings=True)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SIZES, n_inner=D_FF)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **_SIZES, intermediate_size=D_FF, use_parallel_residual=True, tie_word_embeddings=False
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_SIZES, ffn_dim=D_FF, word_embed_proj_dim=D_MODEL)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_GROUPED,
            head_dim=64,
            sliding_window=16,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        )
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**_SIZES, intermediate_size=D_FF, architectures=["BertModel"])
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_MOE, num_local_experts=4, tie_word_embeddings=False)
    ),
    "olmoe": lambda: transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**_MOE, num_experts=4, tie_word_embeddings=False)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **_MOE,
            num_experts=4,
            moe_intermediate_size=64,
            head_dim=32,
            mlp_only_layers=[1],
            tie_word_embeddings=False,
        )
    ),
    # A shared expert scaled by a sigmoid gate beside the routed ones, and a dense first layer.
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **_MOE,
            num_experts=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            mlp_only_layers=[0],
            tie_word_embeddings=False,
        )
    ),
    # Everything that Granite multiplies by: embeddings, attention scores, residual writes; and logits divided by 3.
    "granitemoe": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(
            **_MOE,
            num_local_experts=4,
            embedding_multiplier=6.0,
            residual_multiplier=0.4,
            attention_multiplier=0.1,
            logits_scaling=3.0,
            tie_word_embeddings=True,
        )
    ),
    # Transposed and interleaved experts with biases; a learned sink in every softmax; a window in every second layer.
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{**_MOE, "intermediate_size": 64},
            head_dim=32,
            num_local_experts=4,
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
        )
    ),
    # Latent attention; sigmoid scores, a bias for the choice alone, 2 of 4 groups of 4 taken; a dense first layer.
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**_MOE, "num_key_value_heads": HEADS},
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            moe_intermediate_size=64,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_rope_head_dim=16,
            qk_nope_head_dim=24,
            v_head_dim=32,
            tie_word_embeddings=False,
        )
    ),
    # Mamba, attention, Mamba; experts in the first and last layer.
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **_MOE,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=0,
            mamba_d_state=8,
            mamba_dt_rank=64,
            tie_word_embeddings=False,
        )
    ),
    # Experts whose inputs are scaled by the routing weight, all of them computed for every token.
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **{**_MOE, "intermediate_size": 64},
            intermediate_size_mlp=D_FF,
            head_dim=32,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=32,
            tie_word_embeddings=False,
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=D_FF,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    ),
    # Text classifiers: of a pooled first position, of all positions, of the last token.
    "bert_classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_SIZES, intermediate_size=D_FF, num_labels=3)
    ),
    "electra_classifier": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**_SIZES, intermediate_size=D_FF, embedding_size=D_MODEL, num_labels=3)
    ),
    "llama_classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**_GROUPED, num_labels=3)
    ),
    # A distillation token beside the class token, and a picture that is not square.
    "deit": lambda: transformers.DeiTForImageClassification(
        transformers.DeiTConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=D_FF,
            image_size=(24, 32),
            patch_size=8,
            num_labels=10,
        )
    ),
    # Registers between class token and patches; its classifier also reads the patches' mean.
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            mlp_ratio=D_FF // D_MODEL,
            image_size=28,
            patch_size=14,
            num_register_tokens=4,
            num_labels=10,
        )
    ),
}
SPECIAL_VISION: tuple[str, ...] = ("deit", "dinov2_registers")
"""Vision models with further special tokens, for the tests of anatomy and vision; other tests walk ``FAMILIES``."""
CLASSIFIERS: tuple[str, ...] = ("bert_classifier", "electra_classifier", "llama_classifier")
"""Text classifiers, for the tests of what a classifier answers."""
HEADLESS: tuple[str, ...] = ("gpt_oss", "deepseek_v3", "jamba")
"""Decoders without plain attention heads in every layer: probes of heads refuse them."""
SHIMMED: tuple[str, ...] = ("llama4",)
"""Decoders whose experts are not called with a decision, so that it is read by a shim."""
FUSED_ON_DISK: tuple[str, ...] = ("granitemoe", "gpt_oss", "llama4")
"""Stored with all experts of a layer in one tensor, which no file of integer grids can hold: such steps refuse them."""
FAMILIES: tuple[str, ...] = tuple(
    name for name in _BUILDERS if name not in (*SPECIAL_VISION, *CLASSIFIERS, *HEADLESS, *SHIMMED)
)
"""What every test of anatomy, heads, capture, compression and opening walks over."""
DECODERS: tuple[str, ...] = tuple(name for name in FAMILIES if name not in ("bert", "vit"))
MOE_DECODERS: tuple[str, ...] = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "granitemoe")
"""Mixtures of experts among ``DECODERS``."""
PACKABLE: tuple[str, ...] = (
    *(name for name in FAMILIES if name not in FUSED_ON_DISK),
    "deepseek_v3",
    "jamba",
)
"""What can be stored on integer grids."""
MOE: tuple[str, ...] = (*MOE_DECODERS, *HEADLESS)
"""Every mixture of experts whose experts are called with the decision."""


def tiny_folder(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny model of ``family`` to ``folder`` in Hugging Face layout; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = _BUILDERS[family]()
    _redraw(model, seed)
    model.save_pretrained(folder)
    if family in ("vit", *SPECIAL_VISION):
        height, width = image_size(model.config)
        transformers.ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
    else:
        _tokenizer(family).save_pretrained(folder)
    return folder


@cache
def tiny_model(family: str) -> LoadedModel:
    """An opened tiny model, shared by all tests of this process: read it, never change its weights.

    A test that changes weights opens its own copy: ``open_model(ModelRef(str(tiny_folder(family, tmp_path))))``.
    """
    home = Path(tempfile.mkdtemp(prefix="slimscope-tiny-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return open_model(ModelRef(str(tiny_folder(family, home / family))))


def _redraw(model: Any, seed: int) -> None:
    """Give every parameter a wide random value, so that each of them matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        biases = ((name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
        for name, parameter in (*model.named_parameters(), *biases):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / D_MODEL**0.5)
            elif "norm" in name.lower() or ".ln_" in name:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)


@cache
def _tokenizer(family: str) -> Any:
    return _wordpiece() if family.startswith(("bert", "electra")) else _byte_level_bpe()


def _byte_level_bpe() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, model_max_length=256
    )


def _wordpiece() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *_word_pieces(VOCAB - len(special))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
    )


def _word_pieces(n: int) -> list[str]:
    """Every letter, every word of the corpus, then the most frequent beginnings, middles and ends of words.

    Counted here since the library's trainer breaks ties by a hash that differs from process to process.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(" ".join(CORPUS))
    words = [word for word, _ in splitter.pre_tokenize_str(text)]
    letters = set(text.replace(" ", ""))
    parts = Counter(
        "##" * (start > 0) + word[start:end]
        for word in words
        for start in range(len(word))
        for end in range(start + 2, min(start + 4, len(word)) + 1)
    )
    frequent = sorted(parts, key=lambda part: (-parts[part], part))
    pieces = [*sorted(letters), *(f"##{letter}" for letter in sorted(letters)), *sorted({*words}), *frequent]
    return list(dict.fromkeys(pieces))[:n]


def n_hooks(model: Any) -> int:
    """Hooks there are; transformers adds lasting ones of its own when it is first asked for hidden states."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
