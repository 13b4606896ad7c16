"""What rtn touches, what it leaves and says so, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import BadSettings, CannotCompress
from tests.compress.making import apply, own_model
from tests.tiny import FAMILIES, MOE


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_left_out_silently(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    result = apply(loaded, "rtn", bits=4)
    frame = result.frame.set_index("module")
    assert frame["parameters"].sum() == sum(p.numel() for p in before.values())
    for name, parameter in loaded.model.named_parameters():
        line = frame.loc[name.removesuffix(".weight")]
        assert line["touched"] == (not torch.equal(parameter, before[name])), name
        assert bool(line["reason"]) != line["touched"], name
    share = {m.name: m.value for m in result.metrics}["share_of_parameters_touched"]
    # What is left are norms, biases, routers, position embeddings: a twelfth of these tiny models at most.
    assert share > 0.91


@pytest.mark.parametrize("family", MOE)
def test_fused_experts_are_quantized_and_routers_kept(family: str, tmp_path: Path) -> None:
    frame = apply(own_model(family, tmp_path), "rtn", bits=4).frame
    experts, routers = frame[frame["component"] == "experts"], frame[frame["component"] == "router"]
    experts = experts[~experts["module"].str.endswith("_bias")]  # gpt-oss has them, and keeps them
    assert experts["touched"].all()
    assert len(experts) >= 4
    assert len(routers) >= 2
    assert not routers["touched"].any()
    assert (experts["format"] == "int4 g32 symmetric").all()


def test_the_model_holds_exactly_what_is_packed(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    apply(loaded, "rtn", bits=3, group_size="64", scheme="symmetric")
    for module, packed in loaded.packed.items():
        weight = loaded.model.get_submodule(module).weight
        assert torch.equal(weight, packed.dequantize().to(weight.dtype))
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.model.embed_tokens.weight.data_ptr()


def test_error_of_each_tensor_is_that_of_the_weights(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    before = loaded.model.model.layers[1].mlp.up_proj.weight.clone()
    frame = apply(loaded, "rtn", bits=2).frame.set_index("module")
    after = loaded.model.model.layers[1].mlp.up_proj.weight
    line = frame.loc["model.layers.1.mlp.up_proj"]
    relative = ((after - before).norm() / before.norm()).item()
    assert line["relative_error"] == pytest.approx(relative, rel=1e-5)
    assert line["sqnr_db"] == pytest.approx(-20 * torch.tensor(relative).log10().item(), rel=1e-4)
    assert (line["layer"], line["component"], line["bits"], line["group_size"]) == (1, "mlp", 2, "32")


@pytest.mark.parametrize(
    ("embedding_bits", "format_"), [(4, "int4 g32 affine"), (8, "float8_e4m3fn"), (16, "bfloat16")]
)
def test_embedding_and_head_have_their_own_bits(embedding_bits: int, format_: str, tmp_path: Path) -> None:
    frame = apply(
        own_model("llama", tmp_path), "rtn", bits=4, embedding_bits=embedding_bits, head_bits=16
    ).frame.set_index("module")
    assert frame.loc["model.embed_tokens", "format"] == format_
    assert frame.loc["lm_head", "format"] == "bfloat16"
    assert frame.loc["model.layers.0.mlp.up_proj", "format"] == "int4 g32 affine"


def test_a_group_size_that_does_not_divide_names_module_value_and_choices(tmp_path: Path) -> None:
    loaded = own_model("qwen3_moe", tmp_path)  # experts of 64
    with pytest.raises(
        CannotCompress,
        match=r"group_size 128 does not divide in_features 64 of .*experts.*; choose 32, 64 or channel",
    ):
        apply(loaded, "rtn", group_size="128")
    assert not loaded.packed


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    tied = own_model("smollm", tmp_path)
    with pytest.raises(CannotCompress, match="head_bits=embedding"):
        apply(tied, "rtn", embedding_bits=8, head_bits=16)
    with pytest.raises(CannotCompress, match=r"choose embedding_bits=4 .*, 8 .* or 16"):
        apply(tied, "rtn", bits=4, embedding_bits=3)
    with pytest.raises(BadSettings, match="bits"):
        apply(tied, "rtn", bits=9)
    apply(tied, "rtn", bits=8, group_size=64)
    with pytest.raises(CannotCompress, match="one quantizing step"):
        apply(tied, "rtn", bits=4)
    with pytest.raises(CannotCompress, match="put cast first"):
        apply(tied, "cast")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    loaded.model.model.layers[2].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CannotCompress, match=r"layers\.2\.self_attn\.q_proj holds NaN"):
        apply(loaded, "rtn")


def test_a_float8_embedding_that_would_overflow_is_refused(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    loaded.model.model.embed_tokens.weight.data[3, 3] = 500.0
    with pytest.raises(CannotCompress, match=r"ends at 448 but model\.embed_tokens holds 500"):
        apply(loaded, "rtn", bits=4)


def test_conv1d_weights_are_quantized_with_a_note(tmp_path: Path) -> None:
    result = apply(own_model("gpt2", tmp_path), "rtn", bits=4)
    frame = result.frame.set_index("module")
    assert frame.loc["transformer.h.0.attn.c_attn", "touched"]
    assert any("Conv1D" in note for note in result.notes)
