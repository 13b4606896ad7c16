"""Several schemes in one file: any mixture reloads bit for bit with plain transformers, or is refused before the work."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.targets import targets
from core.numerics.activations import ActivationScheme, round_input
from core.numerics.schemes import FloatScheme, IntegerScheme, MxScheme, Scheme
from core.quantize.grid import put, rounded
from core.saving.description import is_lazy, modules_pattern, refuse_mixture, settle
from core.saving.proof import _options, _probe_inputs, auto_class, expect, prove
from core.saving.report import table
from core.saving.store import save_variant
from core.types import ModelRef, silent
from tests.compress.making import apply, own_model
from tests.tiny import tiny_folder, tiny_model

CHOICES: list[Scheme] = [
    IntegerScheme(bits, group, symmetric=True) for bits in range(2, 9) for group in (32, 64, None)
] + [FloatScheme("float8_e4m3fn", "row"), FloatScheme("bfloat16")]


def mixture(loaded: LoadedModel, seed: int) -> dict[str, Scheme]:
    """A scheme for every linear layer at random, a plain float8 embedding, the head as it falls."""
    draw = random.Random(seed)
    schemes: dict[str, Scheme] = {}
    for target in targets(loaded):
        if target.layout == "linear":
            schemes[target.name] = draw.choice(CHOICES)
        elif target.module == loaded.anatomy.embedding:
            schemes[target.name] = FloatScheme("float8_e4m3fn")
        elif target.layout == "experts":
            schemes[target.name] = IntegerScheme(3, 32, symmetric=True)
    return schemes


def packed(loaded: LoadedModel, schemes: dict[str, Scheme]) -> list[dict[str, object]]:
    rows = []
    for target in targets(loaded):
        weight = loaded.model.get_parameter(target.name).data
        scheme = schemes.get(target.name)
        rows.append(put(loaded, target, None if scheme is None else rounded(target, weight, scheme), weight))
    return rows


def saved(loaded: LoadedModel, schemes: dict[str, Scheme], folder: Path) -> dict[str, Any]:
    """Pack and save; the file's description."""
    refuse_mixture(loaded, schemes, loaded.activations)
    frame = table(packed(loaded, schemes))
    settle(loaded)
    files = save_variant(loaded, folder, frame=frame, provenance={"recipe": {}})
    assert files.bytes == pytest.approx(files.predicted_bytes, rel=0.02)
    described: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return described


def assert_reloads(loaded: LoadedModel, folder: Path) -> None:
    """Plain transformers, as the proof does it, but in this process: the same bits after the first forward."""
    again, report = getattr(transformers, auto_class(loaded)).from_pretrained(
        folder, output_loading_info=True, **_options(loaded)
    )
    assert not any(report.values()), report
    inputs = _probe_inputs(loaded)
    with torch.inference_mode():
        assert torch.equal(again.eval()(**inputs)[0], loaded.model(**inputs)[0])
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    for name, source in loaded.model.all_tied_weights_keys.items():
        assert again.get_parameter(name) is again.get_parameter(source)


def assert_opens_plain(loaded: LoadedModel, folder: Path) -> LoadedModel:
    again = open_model(ModelRef(str(folder), dtype="stored"))
    assert {n for n, _ in again.model.named_parameters()} == {n for n, _ in loaded.model.named_parameters()}
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        assert torch.equal(again.model(ids)[0], loaded.model(ids)[0])
    assert not any(hasattr(module, "quantization_scheme") for module in again.model.modules())
    assert not again.packed
    return again


@pytest.mark.parametrize("family", ["llama", "smollm", "bert", "qwen2_moe"])
def test_a_random_mixture_reloads_bit_for_bit_and_opens_as_a_plain_model(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    described = saved(loaded, mixture(loaded, seed=7), tmp_path / "variant")
    assert described["dequantize"] is False
    assert_reloads(loaded, tmp_path / "variant")
    again = assert_opens_plain(loaded, tmp_path / "variant")
    assert again.anatomy == loaded.anatomy
    apply(again, "cast")  # plain float weights: a further step may start from them


def test_in_a_16_bit_model_scales_and_products_are_its_own(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    apply(loaded, "cast")
    saved(loaded, mixture(loaded, seed=8), tmp_path / "variant")
    assert_reloads(loaded, tmp_path / "variant")
    assert_opens_plain(loaded, tmp_path / "variant")


@pytest.mark.slow
def test_a_mixture_is_proved_in_a_fresh_process(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    frame = table(packed(loaded, mixture(loaded, seed=9)))
    settle(loaded)
    expected = expect(loaded)
    files = save_variant(loaded, tmp_path / "variant", frame=frame, provenance={"recipe": {}})
    proof = prove(files, loaded=loaded, expected=expected, progress=silent)
    assert proof.passed, proof.failure
    assert (proof.max_logit_difference, proof.differing_parameters, proof.ties_kept) == (0.0, 0, True)


def test_one_scheme_is_read_while_loading_as_before(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    before = apply(loaded, "rtn", bits=4, scheme="symmetric", embedding_bits=16)
    weights = {name: p.clone() for name, p in loaded.model.named_parameters()}
    assert not is_lazy(loaded)
    settle(loaded)
    assert all(torch.equal(p, weights[name]) for name, p in loaded.model.named_parameters())
    assert before.frame["touched"].any()


@pytest.mark.parametrize(
    ("family", "schemes", "message"),
    [
        ("llama", {"q_proj": IntegerScheme(4, 32, symmetric=False)}, "without zero points; choose symmetric"),
        ("llama", {"embed_tokens": IntegerScheme(4, 32, symmetric=True)}, "embeddings as plain floats only"),
        ("llama", {"q_proj": MxScheme("e2m1")}, "would come back in bfloat16"),
        ("gpt2", {"c_attn": IntegerScheme(4, 32, symmetric=True)}, "is a Conv1D: .*one format"),
        ("mixtral", {"gate_up_proj": IntegerScheme(4, 32, symmetric=True)}, "one for all experts"),
    ],
)
def test_what_no_file_holds_is_refused_before_the_work(
    family: str, schemes: dict[str, Scheme], message: str
) -> None:
    loaded = tiny_model(family)
    every = {
        t.name: IntegerScheme(8, None, symmetric=True)
        for t in targets(loaded)
        if t.layout in ("linear", "conv1d", "experts")
    }
    for target in targets(loaded):
        every.update((target.name, s) for end, s in schemes.items() if target.module.endswith(end))
    with pytest.raises(CannotCompress, match=message):
        refuse_mixture(loaded, every)
    assert not loaded.packed


def test_targets_name_exactly_their_modules_and_stay_short() -> None:
    one = [f"model.layers.{i}.mlp.up_proj" for i in (0, 2, 10)]
    two = ["lm_head", "model.layers.1.self_attn.q_proj"]
    pattern = modules_pattern([*one, *two]).removeprefix("re:")
    names = [*one, *two, "model.layers.1.mlp.up_proj", "model.layers.110.mlp.up_proj", "xlm_head", "lm_headx"]
    assert [name for name in names if re.match(pattern, name)] == [*one, *two]
    # 61 layers of 3 matrices: kilobytes, not megabytes.
    many = [f"model.layers.{i}.mlp.{part}_proj" for i in range(61) for part in ("gate", "up", "down")]
    assert len(modules_pattern(many)) < 1000


@pytest.mark.parametrize("scale", [None, 0.0625], ids=["dynamic", "static"])
def test_rounded_inputs_are_what_plain_transformers_computes(scale: float | None, tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    ids = torch.arange(24).view(2, 12)
    schemes: dict[str, Scheme] = {
        t.name: IntegerScheme(8, None, symmetric=True)
        for t in targets(loaded)
        if t.layout == "linear" and t.module != "lm_head"
    }
    with torch.inference_mode():
        exact = loaded.model(ids).logits
        for name in schemes:
            loaded.round_inputs(name.removesuffix(".weight"), ActivationScheme(scale))
        coarse = loaded.model(ids).logits
    assert 1e-4 < (coarse - exact).norm() / exact.norm() < 0.5
    described = saved(loaded, schemes, tmp_path / "variant")
    assert described["config_groups"]["group_000"]["input_activations"]["dynamic"] is (scale is None)
    assert_reloads(loaded, tmp_path / "variant")
    again = assert_opens_plain(loaded, tmp_path / "variant")
    assert again.activations == loaded.activations
    with pytest.raises(CannotCompress, match="put the step that rounds inputs last"):
        again.refuse_if_packed()


def test_files_of_others_are_opened_as_what_they_say(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    schemes: dict[str, Scheme] = {
        t.name: IntegerScheme(8, None, symmetric=True) for t in targets(loaded) if t.layout == "linear"
    }
    for name in schemes:
        loaded.round_inputs(name.removesuffix(".weight"), ActivationScheme())
    saved(loaded, schemes, tmp_path / "variant")
    path = tmp_path / "variant/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["dequantize"]  # as other tools write it
    path.write_text(json.dumps(config))
    assert open_model(ModelRef(str(tmp_path / "variant"))).activations == loaded.activations
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] |= {"symmetric": False}
    path.write_text(json.dumps(config))
    other = open_model(ModelRef(str(tmp_path / "variant")))
    assert not other.activations
    assert any("inputs exact" in note for note in other.notes)
    assert (
        torch.equal(other.model.lm_head.weight, loaded.model.lm_head.weight) is False
    )  # multiplied in float16
    assert torch.allclose(other.model.lm_head.weight, loaded.model.lm_head.weight, rtol=1e-3)


def test_rounded_inputs_by_hand() -> None:
    rows = torch.tensor([[[127.5, -1.0, 0.49], [0.0, 0.0, 0.0]]])
    assert round_input(rows, ActivationScheme()).tolist() == [[[127.0, -1.0, 0.0], [0.0, 0.0, 0.0]]]
    assert round_input(rows, ActivationScheme(scale=0.5))[0, 0].tolist() == [63.5, -1.0, 0.5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_experts_may_stay_plain_beside_packed_weights(several: bool, dtype: str, tmp_path: Path) -> None:
    folder = tiny_folder("olmoe", tmp_path / "base")
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    stored.save_pretrained(folder)
    loaded = open_model(ModelRef(str(folder)))
    linear = [target.name for target in targets(loaded) if target.layout == "linear"]
    schemes: dict[str, Scheme] = {name: IntegerScheme(4, 32, symmetric=True) for name in linear}
    if several:
        schemes[linear[0]] = IntegerScheme(8, None, symmetric=True)
    described = saved(loaded, schemes, tmp_path / "variant")
    assert described["dequantize"] is not several
    assert_reloads(loaded, tmp_path / "variant")
