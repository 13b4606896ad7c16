"""Narrower models: dead units are free, sizes are uniform and reload, what cannot be cut is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.calibrate.windows import calibration_windows
from core.compress._pipeline import compress
from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.models.sizes import component_sizes
from core.models.weights import input_first
from core.recipe import Recipe
from core.registry import get
from core.reshape.importance import ablated, best
from core.types import Documents, Result, silent
from tests.compress.making import own_model, save
from tests.compress.reloading import reloads
from tests.tiny import CORPUS, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS * 4)
SMALL: dict[str, Any] = {"samples": 8, "sample_tokens": 32}
PLAIN: dict[str, Any] = {"importance": "magnitude", "compensate": False}
IDS = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(5))


def cut(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "prune_width")
    result: Result = chosen.run(loaded, TEXT, silent, None, chosen.parse({**SMALL, **settings}))
    return result


def output(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found = loaded.model(IDS)
    logits: torch.Tensor = found["logits"] if "logits" in found else found["last_hidden_state"]
    return logits


def kill_units(loaded: LoadedModel, part: str) -> dict[int, list[int]]:
    """Other units in every layer write nothing; layer → those."""
    anatomy = loaded.anatomy
    count, size, width = {"ffn": (64, anatomy.d_ff, 1), "heads": (1, anatomy.n_heads, anatomy.head_dim)}[part]
    dead = {}
    for block in anatomy.blocks:
        generator = torch.Generator().manual_seed(block.index)
        if part == "heads":  # one of each of two key/value groups
            units = [int(torch.randint(2, (1,), generator=generator)), 2 + block.index % 2]
        else:
            units = torch.randperm(size, generator=generator)[:count].sort().values.tolist()
        weight_IO = input_first(loaded.model.get_submodule(str(block.down if part == "ffn" else block.o)))
        weight_IO.view(size, width, -1)[units] = 0
        dead[block.index] = units
    return dead


@pytest.mark.parametrize(
    ("family", "part", "importance"),
    [
        ("gpt2", "ffn", "output"), ("bert", "ffn", "magnitude"), ("llama", "ffn", "output"),
        ("qwen3", "heads", "output"), ("smollm", "heads", "ablation"), ("mixtral", "heads", "magnitude"),
    ],
)  # fmt: skip
def test_units_that_write_nothing_are_found_and_cut_for_free(
    family: str, part: str, importance: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    dead = kill_units(loaded, part)
    before = output(loaded)
    share = 0.5 if part == "heads" else 0.25
    result = cut(loaded, part=part, share=share, importance=importance, compensate=False)
    kept = {int(layer): units for layer, units in result.provenance.conditions["kept"].items()}
    assert all(not set(dead[layer]) & set(units) for layer, units in kept.items())
    assert torch.allclose(output(loaded), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-5


@pytest.mark.parametrize("family", ["smollm", "qwen3"])
def test_dimensions_that_nobody_writes_are_cut_for_free_once_norms_are_rescaled(
    family: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    dead = torch.arange(0, 128, 4)
    for block in loaded.anatomy.blocks:
        for path in (block.o, block.down):
            input_first(loaded.model.get_submodule(str(path)))[:, dead] = 0
    loaded.model.get_submodule(loaded.anatomy.embedding).weight.data[:, dead] = 0
    before = output(loaded)
    result = cut(loaded, part="hidden", share=0.25)
    assert loaded.anatomy.d_model == 96
    assert loaded.anatomy.tied
    assert torch.allclose(output(loaded), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert result.provenance.exactness_gap is None


@pytest.mark.parametrize(
    ("family", "part", "size"),
    [
        ("opt", "ffn", "d_ff"), ("gpt_neox", "ffn", "d_ff"),
        ("vit", "ffn", "d_ff"), ("bert", "ffn", "d_ff"), ("gpt2", "ffn", "d_ff"), ("gemma2", "heads", "n_heads"),
        ("qwen3_moe", "kv_groups", "n_kv_heads"), ("qwen2", "kv_groups", "n_kv_heads"),
        ("granitemoe", "hidden", "d_model"), ("llama4", "heads", "n_heads"),
    ],
)  # fmt: skip
def test_a_narrower_model_reloads_with_plain_transformers(
    family: str, part: str, size: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    before = loaded.anatomy
    chosen = get("compress", "prune_width")
    settings = {"part": part, "share": 0.5, **PLAIN}
    assert chosen.left is not None
    left = chosen.left(before, chosen.parse(settings))
    sizes = component_sizes(loaded).groupby("component")["parameters"].sum()
    result = cut(loaded, **settings)
    assert getattr(loaded.anatomy, size) == getattr(before, size) // 2
    assert loaded.anatomy.head_dim == before.head_dim
    saved = save(loaded, result, tmp_path / "variant")
    reloads(loaded, tmp_path / "variant")
    expected = sum(n * left.get(str(component), 1.0) for component, n in sizes.items())
    assert saved.parameters == pytest.approx(expected, rel=0.02)


def test_what_stays_makes_good_what_goes_on_the_text_it_was_fitted_on(tmp_path: Path) -> None:
    base = tiny_model("llama")
    ids = calibration_windows(base, TEXT, samples=8, sample_tokens=32, seed=0)
    moved = {}
    for compensate in (True, False):
        loaded = own_model("llama", tmp_path / str(compensate))
        result = cut(loaded, compensate=compensate)
        with torch.inference_mode():
            moved[compensate] = float((loaded.model(ids).logits - base.model(ids).logits).norm())
        if compensate:
            told = {metric.name: metric.value for metric in result.metrics}
            assert told["output_error"] < 0.5 * told["output_error_uncompensated"]
    assert moved[True] < 0.6 * moved[False]


def test_heads_can_come_from_the_ablation_map(tmp_path: Path) -> None:
    """By name as the map shows them, or by running it: what has the smallest effect goes."""
    loaded = own_model("llama", tmp_path / "a")
    windows = calibration_windows(loaded, TEXT, samples=8, sample_tokens=32, seed=0)
    with torch.inference_mode():
        effect_LH = ablated(loaded, windows, 0, silent)
    expected = [best(row, 2, groups=2) for row in effect_LH]
    measured = cut(loaded, part="heads", share=0.5, importance="ablation", compensate=False)
    assert list(measured.provenance.conditions["kept"].values()) == expected
    names = [f"L{i}H{h}" for i, kept in enumerate(expected) for h in range(4) if h not in kept]
    named = own_model("llama", tmp_path / "b")
    cut(named, part="heads", importance="listed", remove=", ".join(names), compensate=False)
    assert torch.equal(output(named), output(loaded))


def test_what_does_not_apply_is_refused_with_the_choices() -> None:
    llama = tiny_model("llama")
    before = {name: p.clone() for name, p in llama.model.named_parameters()}
    for settings, message in (
        ({"share": 0.01}, "32 to 224 in steps of 32"),
        ({"part": "heads", "share": 0.1}, "2 to 2 in steps of 2 can stay"),
        ({"importance": "listed", "remove": "0:1"}, "the same number in every layer"),
        ({"importance": "listed", "remove": "0-1"}, "write layer:unit"),
        ({"importance": "listed", "remove": "9:1"}, "layers 0 to 2"),
        ({"part": "heads", "importance": "listed", "remove": "0:0 1:0 2:0"}, "every group must lose as many"),
    ):
        with pytest.raises(BadInput, match=message):
            cut(llama, **settings)
    for family, settings, message in (
        ("gpt2", {"part": "heads", "share": 0.5}, "computes the size of a head"),
        ("bert", {"part": "hidden", "share": 0.5}, "computes the size of a head"),
        ("gemma2", {"part": "hidden", "share": 0.5}, "√hidden_size"),
        ("olmoe", {"part": "heads", "share": 0.5}, "cannot be cut so"),
        ("mixtral", {}, "prune_experts"),
        ("deepseek_v3", {"part": "heads"}, "without plain attention heads"),
        ("vit", {}, "compensate=false"),
        ("llama", {"importance": "ablation"}, "choose part heads or kv_groups"),
        ("llama", {"part": "hidden", "importance": "listed", "remove": "0:1 1:1 2:1"}, "choose activation"),
    ):  # fmt: skip
        with pytest.raises(CannotCompress, match=message):
            cut(tiny_model(family), **settings)
    assert all(torch.equal(before[name], p) for name, p in llama.model.named_parameters())


@pytest.mark.slow
def test_depth_width_mask_and_grid_are_one_recipe(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    steps = [
        {"method": "drop_layers", "settings": {**SMALL, "count": 1}},
        {"method": "prune_width", "settings": SMALL},
        {"method": "wanda", "settings": {**SMALL, "pattern": "2:4"}},
        {"method": "rtn", "settings": {"bits": 8, "scheme": "symmetric"}},
    ]
    made = compress(loaded, Recipe.parse({"steps": steps}), TEXT, tmp_path / "variant", silent)
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert made.proof.ties_kept
    assert made.saved.bytes == pytest.approx(made.saved.predicted_bytes, rel=0.02)
    assert made.proof.share_parameters < 1
