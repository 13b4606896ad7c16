"""The anatomy of every family is proved, and every identity turns red when what it guards is wrong."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.errors import AnatomyMismatch, CannotOpen
from core.models.anatomy import Anatomy
from core.models.anatomy_find import find_anatomy
from core.models.anatomy_verify import verify_anatomy
from core.models.open import open_model
from core.models.readout import unembed
from core.types import ModelRef
from tests.tiny import (
    D_FF,
    D_MODEL,
    DECODERS,
    FAMILIES,
    HEADLESS,
    HEADS,
    LAYERS,
    MOE,
    SHIMMED,
    SPECIAL_VISION,
    VOCAB,
    tiny_folder,
    tiny_model,
)


@pytest.mark.parametrize("family", [*FAMILIES, *HEADLESS, *SHIMMED])
def test_every_identity_holds(family: str) -> None:
    loaded = tiny_model(family)
    gaps = verify_anatomy(loaded.model, loaded.anatomy)
    assert max(gaps.values()) < 1e-5
    expected = {"residual stream adds up", "norm weight and offset"}
    expected |= set() if family == "deepseek_v3" else {"heads sum to attention output"}
    expected |= (
        set()
        if family == "bert"
        else {"residual stream telescopes", "lens at the last layer gives the logits"}
    )
    routed = family in (*MOE, *SHIMMED)
    expected |= {"weighted experts sum to their output"} if routed else {"neurons sum to MLP output"}
    assert expected <= gaps.keys()


@pytest.mark.parametrize("family", [*FAMILIES, *HEADLESS, *SHIMMED])
def test_identities_hold_in_double_precision(family: str) -> None:
    """To 1e-9: what is left in float32 is rounding, not a wrong formula. RMS norms work in float32 inside."""
    model = copy.deepcopy(tiny_model(family).model).double()
    if family in MOE:
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    gaps = verify_anatomy(model, tiny_model(family).anatomy)
    gaps.pop("norm weight and offset")
    assert max(gaps.values()) < (1e-7 if family == "gemma2" else 1e-9)  # Gemma keeps √d_model in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family: str) -> None:
    anatomy = tiny_model(family).anatomy
    assert (anatomy.n_layers, anatomy.n_heads, anatomy.d_model) == (LAYERS, HEADS, D_MODEL)
    grouped = family not in ("gpt2", "gpt_neox", "opt", "bert", "vit")
    assert anatomy.n_kv_heads == (2 if grouped else HEADS)
    assert anatomy.head_dim == (64 if family in ("qwen3", "gemma2") else 32)
    assert anatomy.d_ff == D_FF
    assert anatomy.vocab_size == (10 if family == "vit" else VOCAB)
    assert anatomy.context_length == (17 if family == "vit" else 256)
    assert anatomy.family == {"bert": "encoder", "vit": "vision"}.get(family, "decoder")
    assert anatomy.tied == (family in ("smollm", "qwen2", "qwen3", "gpt2", "opt", "gemma2", "granitemoe"))
    assert (anatomy.n_experts, anatomy.experts_per_token) == ((4, 2) if family in MOE else (0, 0))
    assert anatomy.parallel_residual == (family == "gpt_neox")
    assert [block.is_moe for block in anatomy.blocks] == (
        {"qwen3_moe": [True, False, True], "qwen2_moe": [False, True, True]}.get(
            family, [family in MOE] * LAYERS
        )
    )


def test_facts_of_one_family_only() -> None:
    gemma = tiny_model("gemma2").anatomy
    assert gemma.windows == (16, None, 16)
    assert (gemma.norm_offset, gemma.norm_place, gemma.logit_softcap) == (1.0, "sandwich", 30.0)
    assert gemma.embedding_scale == pytest.approx(D_MODEL**0.5)
    assert tiny_model("mistral").anatomy.windows == (32, 32, 32)
    assert tiny_model("opt").anatomy.position_offset == 2
    assert tiny_model("gpt2").anatomy.fusion == "concatenated"
    assert tiny_model("gpt_neox").anatomy.fusion == "per_head"
    assert tiny_model("bert").anatomy.unembedding is None


@pytest.mark.parametrize("family", SPECIAL_VISION)
def test_vision_models_with_further_special_tokens(family: str) -> None:
    loaded = tiny_model(family)
    gaps = verify_anatomy(copy.deepcopy(loaded.model).double(), loaded.anatomy)
    assert max(gaps.values()) < 1e-9
    assert loaded.family == "vision"
    assert loaded.anatomy.context_length == {"deit": 3 * 4 + 2, "dinov2_registers": 2 * 2 + 5}[family]
    reads_class_token_alone = family == "deit"
    assert (loaded.anatomy.unembedding is not None) == reads_class_token_alone
    assert ("lens at the last layer gives the logits" in gaps) == reads_class_token_alone


def test_layer_scale_is_part_of_what_is_added() -> None:
    loaded = tiny_model("dinov2_registers")
    block = loaded.anatomy.blocks[0]
    for changes in ({"attention_write": block.attention}, {"mlp_write": str(block.mlp)}):
        with pytest.raises(AnatomyMismatch, match=r"norm reads|adds up"):
            verify_anatomy(loaded.model, _first_block(**changes)(loaded.anatomy))


def test_query_head_reads_its_group() -> None:
    assert [tiny_model("llama").anatomy.kv_head(head) for head in range(HEADS)] == [0, 0, 1, 1]


@pytest.mark.parametrize("family", [*DECODERS, "vit"])
def test_lens_at_the_last_layer_is_the_models_answer(family: str) -> None:
    """Independent of verify_anatomy: transformers' own hidden states, before the final norm by a hook."""
    loaded = tiny_model(family)
    last: dict[str, Any] = {}
    layer = loaded.model.get_submodule(loaded.anatomy.blocks[-1].path)
    handle = layer.register_forward_hook(lambda m, a, out: last.update(out=out))
    inputs = (
        {"pixel_values": torch.ones(2, 3, 32, 32)}
        if family == "vit"
        else {"input_ids": torch.arange(24).view(2, 12)}
    )
    with torch.inference_mode():
        logits = loaded.model(**inputs).logits
        final = last["out"][:, 0] if family == "vit" else last["out"]
        assert torch.equal(unembed(loaded.model, loaded.anatomy, final), logits)
    handle.remove()


def _first_block(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    def change(anatomy: Anatomy) -> Anatomy:
        block = dataclasses.replace(anatomy.blocks[0], **changes)
        return dataclasses.replace(anatomy, blocks=(block, *anatomy.blocks[1:]))

    return change


def _second_block(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    def change(anatomy: Anatomy) -> Anatomy:
        first, second, *rest = anatomy.blocks
        return dataclasses.replace(anatomy, blocks=(first, dataclasses.replace(second, **changes), *rest))

    return change


def _facts(**changes: Any) -> Callable[[Anatomy], Anatomy]:
    return lambda anatomy: dataclasses.replace(anatomy, **changes)


class _NextGroup(Anatomy):
    """An anatomy whose query heads read the key/value head after their own."""

    def kv_head(self, head: int) -> int:
        return (super().kv_head(head) + 1) % self.n_kv_heads


def _shift_groups(anatomy: Anatomy) -> Anatomy:
    return _NextGroup(**{field.name: getattr(anatomy, field.name) for field in dataclasses.fields(anatomy)})


LAYER = "model.layers.0."
WRONG_ANATOMIES = [
    ("llama", _shift_groups, "heads sum"),
    ("gpt_neox", _facts(fusion="concatenated"), "heads sum"),
    ("gpt2", _facts(fusion="per_head"), "heads sum"),
    ("llama", _first_block(v=f"{LAYER}self_attn.k_proj"), "heads sum"),
    ("llama", _first_block(gate=f"{LAYER}mlp.up_proj", up=f"{LAYER}mlp.gate_proj"), "neurons are"),
    ("llama", _first_block(gate=None), "neurons are"),
    ("llama", _facts(activation="gelu"), "neurons are"),
    ("gemma2", _facts(embedding_scale=1.0), "embedding starts"),
    ("opt", _facts(position_offset=0), "embedding starts"),
    ("bert", _facts(token_type_embedding=None), "embedding starts"),
    ("vit", _facts(position_embedding="vit.layers.0"), "embedding starts"),
    ("gemma2", _facts(norm_offset=0.0), "norm weight"),
    ("llama", _facts(norm_offset=1.0), "norm weight"),
    ("gpt_neox", _facts(parallel_residual=False), "MLP norm reads"),
    ("llama", _facts(parallel_residual=True), "MLP norm reads"),
    ("gemma2", _first_block(attention_write=f"{LAYER}self_attn"), "MLP norm reads"),
    ("gemma2", _first_block(mlp_write=f"{LAYER}mlp"), "residual stream adds up"),
    ("bert", _facts(norm_place="pre"), "norm reads"),
    ("gemma2", _facts(logit_softcap=None), "lens at the last layer"),
    ("llama", _facts(logit_scale=0.5), "lens at the last layer"),
    ("llama", _facts(final_norm=None), "lens at the last layer"),
    ("mixtral", _facts(activation="gelu"), "experts' neurons are"),
    ("llama4", _facts(activation="gelu"), "neurons are"),
    ("llama4", _facts(experts_per_token=1), "distinct experts"),
    ("granitemoe", _facts(residual_scale=1.0), "MLP norm reads"),
    ("granitemoe", _facts(embedding_scale=1.0), "embedding starts"),
    ("granitemoe", _facts(logit_divisor=1.0), "lens at the last layer"),
    ("qwen2_moe", _second_block(shared_expert=None), "experts sum to MLP output"),
    ("qwen2_moe", _second_block(shared_gate=None), "experts sum to MLP output"),
    ("deepseek_v3", _second_block(shared_expert=None), "experts sum to MLP output"),
    ("gpt_oss", _first_block(v=f"{LAYER}self_attn.k_proj"), "heads sum"),
    ("mixtral", _facts(experts_per_token=1), "distinct experts"),
]


@pytest.mark.parametrize(("family", "spoil", "check"), WRONG_ANATOMIES)
def test_a_wrong_anatomy_is_refused(family: str, spoil: Callable[[Anatomy], Anatomy], check: str) -> None:
    loaded = tiny_model(family)
    with pytest.raises((AnatomyMismatch, AttributeError), match=check if family != "vit" else "cls_token"):
        verify_anatomy(loaded.model, spoil(loaded.anatomy))


def _shift_kv_heads(model: Any) -> None:
    """Attention in which head h reads the key/value head after its own."""
    attention = model.model.layers[1].self_attn
    attention.v_proj.register_forward_hook(lambda m, args, out: out.roll(32, dims=-1))
    attention.register_forward_hook(lambda m, args, out: (out[0] * 1.0, out[1].roll(1, dims=1)))


def _silence_an_expert(model: Any) -> None:
    """Experts that skip expert 0, as a broken fused kernel would."""
    experts = model.model.layers[0].mlp.experts

    def spoiled(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden, chosen, weights = args
        return output - torch.where(chosen == 0, weights, 0).sum(-1, keepdim=True) * hidden

    experts.register_forward_hook(spoiled)


def _scale_the_residual(model: Any) -> None:
    """Granite's residual multiplier: the direction stays, the size does not."""
    model.model.layers[0].register_forward_hook(lambda m, args, out: out * 1.01)


def _drop_repeats(model: Any) -> None:
    """A router that names one expert twice."""
    model.model.layers[0].mlp.gate.register_forward_hook(
        lambda m, args, out: (out[0], out[1], out[2][:, :1].expand(-1, 2))
    )


BROKEN_MODELS = [
    ("llama", _shift_kv_heads, "layers.1.self_attn fails .*heads sum"),
    ("olmoe", _silence_an_expert, "layers.0.mlp.experts fails .*weighted experts"),
    ("mixtral", _silence_an_expert, "layers.0.mlp.experts fails .*weighted experts"),
    ("mixtral", _drop_repeats, "distinct experts"),
    ("llama", _scale_the_residual, "layers.0 fails .*residual stream adds up"),
]


@pytest.mark.parametrize(("family", "spoil", "message"), BROKEN_MODELS)
def test_a_model_that_computes_otherwise_is_refused(
    family: str, spoil: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    spoil(loaded.model)
    with pytest.raises(AnatomyMismatch, match=message):
        verify_anatomy(loaded.model, loaded.anatomy)


def test_a_dense_granite_scales_what_it_adds() -> None:
    config = transformers.GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        residual_multiplier=0.5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GraniteForCausalLM(config).eval()
    anatomy = find_anatomy(model)
    assert anatomy.residual_scale == 0.5
    assert max(verify_anatomy(model, anatomy).values()) < 1e-5
    with pytest.raises(AnatomyMismatch, match=r"model\.layers\.0.*MLP norm reads the stream"):
        verify_anatomy(model, dataclasses.replace(anatomy, residual_scale=1.0))


def test_shared_expert_is_part_of_the_block() -> None:
    config = transformers.Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval().requires_grad_(False)
    anatomy = find_anatomy(model)
    assert anatomy.blocks[0].shared_expert == "model.layers.0.mlp.shared_expert"
    assert verify_anatomy(model, anatomy)["experts sum to MLP output"] < 1e-5
    with pytest.raises(AnatomyMismatch, match="experts sum to MLP output"):
        verify_anatomy(model, _first_block(shared_expert=None)(anatomy))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=16),
            "encoder–decoder",
        ),
        (
            transformers.OPTConfig(
                vocab_size=64,
                hidden_size=32,
                word_embed_proj_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                ffn_dim=32,
            ),
            "OPT-350m",
        ),
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
            "no attention and norms of a known",
        ),
        (
            transformers.FalconConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
            ),
            "not supported",
        ),
    ],
)
def test_other_architectures_are_refused_by_name(config: Any, message: str) -> None:
    auto = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    with pytest.raises(CannotOpen, match=message):
        find_anatomy(auto.from_config(config))


def test_masked_language_model_is_read_through_its_transform() -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertForMaskedLM(config).eval()
    anatomy = find_anatomy(model)
    assert verify_anatomy(model, anatomy)["lens at the last layer gives the logits"] == 0.0
    with pytest.raises(AnatomyMismatch, match="lens"):
        verify_anatomy(model, dataclasses.replace(anatomy, head_transform=None))
