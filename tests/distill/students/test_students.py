"""Own students reload and are what was asked for; unfit pairs are refused; students that change kind learn of their teachers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from core.distill.features.feature_match import feature_match
from core.distill.layer_map import layer_map
from core.distill.students import refuse_unfit, shared_vocabulary
from core.errors import BadInput, CannotCompress
from core.models.gradients import leave_inference_mode
from core.models.loaded import LoadedModel
from core.models.sizes import component_sizes
from core.registry import get
from core.reshape.depth import evenly
from core.types import Documents, Result, silent
from tests.compress.making import own_model, save
from tests.compress.reloading import reloads
from tests.distill.features.pairs import batch, gradients, matched, twin
from tests.tiny import CORPUS, tiny_folder, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS * 4)


def made(loaded: LoadedModel, method: str = "own_student", **settings: Any) -> Result:
    chosen = get("compress", method)
    result: Result = chosen.run(loaded, TEXT, silent, chosen.parse(settings))
    return result


def test_a_sliced_student_holds_the_teachers_numbers_in_equal_steps_and_reloads(tmp_path: Path) -> None:
    teacher, student = tiny_model("smollm"), own_model("smollm", tmp_path)
    settings = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 96}
    left = get("compress", "own_student").left
    assert left is not None
    shares = left(teacher.anatomy, get("compress", "own_student").parse(settings))
    with torch.inference_mode():
        result = made(student, **settings)
    anatomy = student.anatomy
    assert (anatomy.n_layers, anatomy.d_model, anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_ff) == (
        2,
        64,
        2,
        1,
        96,
    )
    assert anatomy.tied
    whole, cut = (dict(loaded.model.named_parameters()) for loaded in (teacher, student))
    name = "model.layers.{}.mlp.down_proj.weight"
    rows, columns = torch.tensor(evenly(64, 128)), torch.tensor(evenly(96, 256))
    assert torch.equal(cut[name.format(1)], whole[name.format(2)][rows][:, columns])
    before, after = (component_sizes(m).groupby("component")["parameters"].sum() for m in (teacher, student))
    predicted = sum(n * shares.get(str(component), 1.0) for component, n in before.items())
    assert predicted == pytest.approx(after.sum(), rel=0.005)
    save(student, result, tmp_path / "variant")
    reloads(student, tmp_path / "variant")


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_random_student_is_drawn_as_transformers_draws_and_follows_its_seed(
    family: str, tmp_path: Path
) -> None:
    teacher = tiny_model(family)
    torch.manual_seed(99)
    expected = torch.rand(1)
    torch.manual_seed(99)
    students = [twin(teacher) for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2), strict=True):
        made(student, weights="random", hidden=64, heads=2, seed=seed)
    one, same, other = (torch.cat([p.flatten() for p in s.model.parameters()]) for s in students)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    matrices = [p for name, p in students[0].model.named_parameters() if p.ndim == 2 and "wpe" not in name]
    assert all(0.002 < float(p.std()) < 0.05 for p in matrices)  # their initializer_range is 0.02
    assert torch.equal(torch.rand(1), expected), "the process's own random numbers are left alone"


def test_an_existing_model_takes_the_teachers_place_where_it_fits(tmp_path: Path) -> None:
    student, small = own_model("llama", tmp_path), own_model("llama", tmp_path / "small")
    save(small, made(small, layers=1), tmp_path / "one_layer")
    result = made(student, model=str(tmp_path / "one_layer"))
    assert student.anatomy.n_layers == 1
    assert result.provenance.inputs["model"] != student.fingerprint
    for model, message in (
        ("variant:abc", "name its teacher in the step distil"),
        (str(tiny_folder("bert", tmp_path / "bert")), "family encoder"),
        (str(tiny_folder("mistral", tmp_path / "mistral")), "learns from a larger model"),
    ):
        with pytest.raises(BadInput, match=message):
            made(student, model=model)


def test_a_size_that_cannot_be_had_is_refused_and_leaves_the_model_whole() -> None:
    loaded = twin(tiny_model("llama"))
    for settings, message in (
        ({"layers": 4}, "more than the teacher's 3"),
        ({"heads": 3}, "a multiple of 2"),
    ):
        with pytest.raises(BadInput, match=message):
            made(loaded, **settings)
    with pytest.raises(CannotCompress, match="cut ffn, or drop layers"):
        made(twin(tiny_model("bert")), hidden=64)
    assert loaded.anatomy == tiny_model("llama").anatomy


def test_padded_vocabularies_share_their_beginning_and_others_are_refused() -> None:
    loaded = tiny_model("qwen2")
    student = twin(loaded)
    student.model.resize_token_embeddings(520, mean_resizing=False)
    student = replace(student, anatomy=replace(loaded.anatomy, vocab_size=520))
    assert shared_vocabulary(student, loaded) == shared_vocabulary(loaded, student) == 512
    with pytest.raises(
        BadInput, match=r"differ in .* tokens: .* Logits of different tokens cannot be compared"
    ):
        shared_vocabulary(tiny_model("bert"), loaded)
    with pytest.raises(BadInput, match="no tokenizer"):
        shared_vocabulary(tiny_model("vit"), loaded)
    narrow = replace(loaded, anatomy=replace(loaded.anatomy, vocab_size=100))
    with pytest.raises(BadInput, match="a row for every token"):
        shared_vocabulary(narrow, loaded)
    spaced = copy.deepcopy(loaded.tokenizer)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(BadInput, match=r"cut .* differently"):
        shared_vocabulary(replace(loaded, tokenizer=spaced), loaded)


def test_a_larger_student_is_refused_and_an_upcycled_one_is_not() -> None:
    small = twin(tiny_model("llama"))
    made(small, layers=1)
    with pytest.raises(BadInput, match="exchange the two"):
        refuse_unfit(tiny_model("llama"), small)
    refuse_unfit(small, tiny_model("llama"))
    refuse_unfit(tiny_model("llama"), tiny_model("llama"))
    upcycled = twin(tiny_model("llama"))
    made(upcycled, "upcycle")
    refuse_unfit(upcycled, tiny_model("llama"))


@pytest.mark.parametrize(
    ("family", "method", "weights"),
    [
        ("mixtral", "densify", {"expert_weight": 1.0}),
        ("llama", "upcycle", {"hidden_weight": 1.0}),
        ("llama", "moefy", {"hidden_weight": 1.0}),
        ("mixtral", "prune_experts", {"expert_weight": 1.0}),
    ],
)
def test_a_student_of_another_kind_of_mlp_learns_of_its_teacher(
    family: str, method: str, weights: Any
) -> None:
    teacher = tiny_model(family)
    student = twin(teacher)
    with torch.inference_mode():
        made(student, method)
    leave_inference_mode(student)
    student.model.requires_grad_(True)
    layers = layer_map("auto", student, teacher)
    assert layers.twins == (0, 1, 2)
    assert layers.how == "taken"
    match = feature_match(student, teacher, layers, **weights)
    assert match is not None
    found = matched(match, batch())
    assert found.loss.item() > 1e-6 or method == "upcycle"  # which begins as the same function
    assert all(torch.isfinite(g).all() for g in gradients(student, found))
