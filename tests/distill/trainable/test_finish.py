"""What a training leaves in a model is, bit for bit, what its file gives back; and a merge changes no outputs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.distill.precision import Weights
from core.distill.trainable.prepare import prepare
from core.distill.trainable.trainable import Trainable
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.targets import targets
from core.numerics.activations import ActivationScheme
from core.numerics.integer import quantize
from core.numerics.packed import PackedExperts
from core.numerics.schemes import IntegerScheme
from core.quantize.grid import put, put_nearest
from core.saving.proof import expect, prove
from core.types import ModelRef, silent
from tests.compress.making import apply, own_model, save
from tests.tiny import tiny_model


def settings(train: str, **changes: object) -> SimpleNamespace:
    plain = {"train": train, "lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "all-linear", "seed": 0}
    return SimpleNamespace(**{**plain, **changes})


def distance(loaded: LoadedModel, wanted: torch.Tensor) -> torch.Tensor:
    given = outputs(loaded)
    return torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")


def outputs(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.randint(0, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    return loaded.model(ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)


def learn(
    loaded: LoadedModel, trainable: Trainable, family: str, *, rate: float, updates: int = 8
) -> list[float]:
    """Distances to the original before every update, and after the last."""
    with torch.no_grad():
        wanted = outputs(tiny_model(family))
    adam = torch.optim.Adam([parameter for _, parameter in trainable.named()], lr=rate)
    seen = []
    for _ in range(updates):
        adam.zero_grad()
        loss = distance(loaded, wanted)
        loss.backward()
        adam.step()
        trainable.before_forward()
        seen.append(float(loss.detach()))
    with torch.no_grad():
        return [*seen, float(distance(loaded, wanted))]


def same_after_reload(loaded: LoadedModel, result: Any, folder: Path) -> bool:
    save(loaded, result, folder)
    again = dict(open_model(ModelRef(str(folder), dtype="stored")).model.named_parameters())
    ours = dict(loaded.model.named_parameters())
    return ours.keys() == again.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


CASES = {
    "scales of a 3-bit grid": ("llama", "scales_and_norms", "rtn", {"bits": 3}, 0.01),
    "scales in bfloat16": ("llama", "scales_and_norms", "fp8", {}, 0.01),
    "scales of fused experts": ("mixtral", "scales_and_norms", "rtn", {"bits": 3}, 0.01),
    "tied weights behind their grid": (
        "smollm",
        "straight_through",
        "rtn",
        {"bits": 3, "embedding_bits": 3},
        0.001,
    ),
    "Conv1D behind a grid": ("gpt2", "straight_through", "rtn", {"bits": 3}, 0.001),
    "weights behind nvfp4": ("llama", "straight_through", "nvfp4", {}, 0.001),
    "low-rank updates behind a grid": ("mixtral", "lora", "rtn", {"bits": 3}, 0.03),
    "low-rank updates behind nvfp4": ("llama", "lora", "nvfp4", {}, 0.03),
}


@pytest.mark.rotating
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_what_a_reload_gives(case: str, tmp_path: Path):
    family, train, method, changes, rate = CASES[case]
    loaded = own_model(family, tmp_path)
    with torch.inference_mode():  # as a recipe's steps run
        result = apply(loaded, method, **changes)
    codes = {module: p.codes.clone() for module, p in loaded.packed.items() if hasattr(p, "codes")}
    trainable = prepare(loaded, settings(train))
    seen = learn(loaded, trainable, family, rate=rate)
    assert seen[-1] < 0.97 * seen[0], "it learns"
    with torch.no_grad():
        trained = outputs(loaded)
    notes = trainable.finish(loaded)
    assert torch.equal(outputs(loaded), trained), "what is trained is what is stored"
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    if train == "scales_and_norms":
        assert all(torch.equal(loaded.packed[module].codes, was) for module, was in codes.items())
    if train == "lora":
        assert "of codes changed" in notes[0]
        assert "0.00%" not in notes[0]
    assert same_after_reload(loaded, result, tmp_path / "variant")


@pytest.mark.parametrize("train", ["scales_and_norms", "straight_through", "lora"])
def test_gradients_arrive_in_bfloat16_too(train: str, tmp_path: Path):
    """The trainer casts the model behind ``prepare``'s back, and gives float32 back before ``finish``."""
    loaded = own_model("llama", tmp_path)
    result = apply(loaded, "rtn", bits=4)
    trainable = prepare(loaded, settings(train))
    for name, parameter in trainable.named():
        if "lora_B" in name:
            parameter.data += 0.01
    weights = Weights(loaded.model, dict(trainable.named()), "bfloat16")
    trainable.before_forward()
    outputs(loaded).square().sum().backward()
    weights.collect()
    silent_ones = [
        name for name, value in weights.exact.items() if value.grad is None or not value.grad.any()
    ]
    assert not silent_ones
    for value in weights.exact.values():
        value.data -= 0.001 * value.grad.sign()
    weights.release()
    trainable.finish(loaded)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert same_after_reload(loaded, result, tmp_path / "variant")


def test_experts_of_two_forms_learn_the_scales_of_their_own(tmp_path: Path):
    loaded = own_model("olmoe", tmp_path)
    module = f"{loaded.anatomy.blocks[0].experts}.down_proj"
    target = next(t for t in targets(loaded) if t.module == module)
    weight = loaded.model.get_parameter(module).data
    forms = tuple(quantize(weight, IntegerScheme(4, group, symmetric=True)) for group in (32, None))
    put(loaded, target, PackedExperts(forms, (0, 1, 1, 0)), weight)
    trainable = prepare(loaded, settings("scales_and_norms"))
    seen = learn(loaded, trainable, "olmoe", rate=0.01, updates=2)
    assert seen[-1] < seen[0]
    fine, coarse = (dict(trainable.named())[f"{module}.{form}.scale"].detach().view(4, -1) for form in (0, 1))
    assert [bool(row.any()) for row in fine] == [True, False, False, True]
    assert [bool(row.any()) for row in coarse] == [False, True, True, False]
    trainable.finish(loaded)
    assert torch.equal(loaded.packed[module].dequantize(), loaded.model.get_parameter(module))


def test_a_fresh_process_proves_it(tmp_path: Path):
    """Three kinds of training, one after the other, on one model."""
    loaded = own_model("smollm", tmp_path)
    with torch.inference_mode():
        result = apply(loaded, "rtn", bits=4)
    for train, rate in (("lora", 0.003), ("straight_through", 0.001), ("scales_and_norms", 0.01)):
        trainable = prepare(loaded, settings(train))
        learn(loaded, trainable, "smollm", rate=rate, updates=2)
        trainable.finish(loaded)
    expected = expect(loaded)
    saved = save(loaded, result, tmp_path / "variant")
    proof = prove(saved, loaded=loaded, expected=expected, progress=silent)
    assert proof.passed, proof.failure


@pytest.mark.parametrize(("family", "train"), [("gpt2", "dora"), ("olmoe", "lora")])
def test_a_merge_changes_no_outputs(family: str, train: str, tmp_path: Path):
    loaded = own_model(family, tmp_path)
    names = [name for name, _ in loaded.model.named_parameters()]
    with torch.no_grad():
        first = outputs(loaded)
    trainable = prepare(loaded, settings(train))
    assert torch.allclose(outputs(loaded), first, atol=1e-4), "nothing learned, nothing changed"
    for index, (_, parameter) in enumerate(trainable.named()):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    with torch.no_grad():
        adapted = outputs(loaded)
        trainable.finish(loaded)
        assert (outputs(loaded) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert (adapted - first).abs().max() > 0.1
    assert [name for name, _ in loaded.model.named_parameters()] == names


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"train": "scales_and_norms"}, "nothing of this one is"),
        (
            "llama",
            {"train": "lora", "lora_targets": "q_proj, c_attn"},
            "ends in 'c_attn'; choose all-linear, or from down",
        ),
        ("mixtral", {"train": "dora"}, "peft has no DoRA"),
    ],
)
def test_what_cannot_be_trained_is_refused(family: str, changes: dict[str, str], said: str, tmp_path: Path):
    with pytest.raises(CannotCompress, match=said):
        prepare(own_model(family, tmp_path), settings(**changes))


def test_only_some_matrices_are_quantized(tmp_path: Path):
    loaded = own_model("llama", tmp_path)
    target = next(t for t in targets(loaded) if t.module.endswith("layers.1.mlp.down_proj"))
    put_nearest(loaded, target, IntegerScheme(3, 32, symmetric=False))
    with pytest.raises(CannotCompress, match=r"down_proj is stored as int3 g32 affine: DoRA"):
        prepare(loaded, settings("dora"))
    before = loaded.model.get_parameter(target.name).detach().clone()
    trainable = prepare(loaded, settings("lora"))
    learn(loaded, trainable, "llama", rate=0.03)
    with torch.no_grad():
        trained = outputs(loaded)
    grid, merge = trainable.finish(loaded)[:2]
    assert "of codes changed" in grid
    assert "merged" in merge
    assert torch.allclose(outputs(loaded), trained, atol=1e-3)
    assert not torch.equal(loaded.model.get_parameter(target.name), before)
    assert torch.equal(loaded.packed[target.module].dequantize(), loaded.model.get_parameter(target.name))


def test_rounded_inputs_are_refused(tmp_path: Path):
    loaded = own_model("llama", tmp_path)
    apply(loaded, "rtn", bits=8, scheme="symmetric")
    loaded.round_inputs("model.layers.0.mlp.up_proj", ActivationScheme())
    with pytest.raises(CannotCompress, match="a step without derivative"):
        prepare(loaded, settings("scales_and_norms"))
