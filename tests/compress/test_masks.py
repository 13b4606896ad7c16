"""Magnitude, Wanda and SparseGPT on whole models: what is zero, what stays, what it weighs, what is refused."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.calibrate.matrices import matrices
from core.calibrate.windows import calibration_windows
from core.errors import BadSettings, CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.types import Documents, ModelRef, Result, silent
from tests.compress.making import apply, own_model, save
from tests.tiny import CORPUS, tiny_folder, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS * 4)
SMALL: dict[str, Any] = {"samples": 8, "sample_tokens": 32}


def pruned(loaded: LoadedModel, method: str, *, scratch: Path | None = None, **settings: Any) -> Result:
    chosen = get("compress", method)
    if method == "magnitude":
        return apply(loaded, method, **settings)
    result: Result = chosen.run(loaded, TEXT, silent, scratch, chosen.parse({**SMALL, **settings}))
    return result


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Every matrix inside the blocks, [O, I], an expert a matrix of its own."""
    return {m.label: m.read() for block in loaded.anatomy.blocks for m in matrices(loaded, block)}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("magnitude", "vit"),
        ("wanda", "gpt2"),
        ("wanda", "bert"),
        ("wanda", "mixtral"),
        ("sparsegpt", "granitemoe"),
    ],
)
def test_half_of_every_matrix_and_every_expert_goes_and_nothing_else(
    method: str, family: str, tmp_path: Path
) -> None:
    loaded, base = own_model(family, tmp_path), tiny_model(family)
    result = pruned(loaded, method)
    before = weights(base)
    for name, weight in weights(loaded).items():
        zeros = weight == 0
        if method == "sparsegpt":  # by blocks of columns over all rows
            assert all(int(part.sum()) == part.numel() // 2 for part in zeros.split(128, 1)), name
        else:  # by rows, and the rest as it was
            assert (zeros.sum(1) == weight.shape[1] // 2).all(), name
            assert torch.equal(weight[~zeros], before[name][~zeros]), name
    inside = {m.name for block in base.anatomy.blocks for m in matrices(base, block)}
    for name, parameter in base.model.named_parameters():
        assert name in inside or torch.equal(parameter, loaded.model.get_parameter(name)), name
    frame = result.frame
    touched = frame.loc[frame["touched"], "parameters_touched"].sum()
    changed = sum(
        int((loaded.model.get_parameter(n) != p).sum())
        for n, p in base.model.named_parameters()
        if n in inside
    )
    assert touched == changed
    assert len(result.frames["matrices"]) == len(before)


def test_the_update_keeps_the_model_closer_on_its_text_than_magnitude_does(tmp_path: Path) -> None:
    base = tiny_model("llama")
    ids = calibration_windows(base, TEXT, samples=8, sample_tokens=32, seed=0)
    moved = {}
    for method in ("magnitude", "sparsegpt"):
        loaded = own_model("llama", tmp_path / method)
        pruned(loaded, method, pattern="2:4")
        with torch.inference_mode():
            moved[method] = float((loaded.model(ids).logits - base.model(ids).logits).norm())
    assert moved["sparsegpt"] < 0.8 * moved["magnitude"]


def test_scope_model_takes_more_where_weights_are_smaller(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    small = matrices(loaded, loaded.anatomy.blocks[0])[0]
    small.write(small.read() / 100)
    pruned(loaded, "magnitude", scope="model", share=0.3)
    found = weights(loaded)
    assert (found[small.label] == 0).float().mean() > 0.99
    total = sum(w.numel() for w in found.values())
    assert sum(int((w == 0).sum()) for w in found.values()) == int(0.3 * total)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_zeros_stay_zero_on_a_grid_put_behind_the_mask(scheme: str, tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    pruned(loaded, "wanda", pattern="2:4")
    masked = {name: weight == 0 for name, weight in weights(loaded).items()}
    apply(loaded, "rtn", bits=4, scheme=scheme)
    for name, weight in weights(loaded).items():
        assert (weight[masked[name]] == 0).all(), name
        assert ((weight == 0).view(-1, 4).sum(1) >= 2).all(), name


def test_the_file_is_as_large_as_before_and_the_zip_is_as_told(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    result = pruned(loaded, "magnitude")
    saved = save(loaded, result, tmp_path / "variant")
    files = {"zipped_bytes_before": "base", "zipped_bytes": "variant"}
    sizes = {name: (tmp_path / folder / "model.safetensors").read_bytes() for name, folder in files.items()}
    assert saved.bytes == pytest.approx(len(sizes["zipped_bytes_before"]), rel=0.001)
    told = {metric.name: metric.value for metric in result.metrics}
    for name, content in sizes.items():
        assert told[name] == pytest.approx(len(zlib.compress(content, 6)), rel=0.02)
    assert any("as large as before" in note for note in result.notes)


def test_a_sampled_zip_size_holds_the_whole_one_in_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.reshape import zipped

    model = tiny_model("mixtral").model
    whole = zipped.zipped_bytes(model, "zipped")
    assert whole.low is None
    monkeypatch.setattr(zipped, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(zipped, "MOST_BLOCKS", 40)
    sampled = zipped.zipped_bytes(model, "zipped")
    assert sampled.n == 40
    assert sampled.low is not None
    assert sampled.high is not None
    assert 0.98 * sampled.low < whole.value < 1.02 * sampled.high


def test_a_stopped_step_goes_on_to_the_same_weights_and_report(tmp_path: Path) -> None:
    first, again = own_model("llama", tmp_path / "a"), own_model("llama", tmp_path / "b")
    one = pruned(first, "sparsegpt", scratch=tmp_path / "scratch")
    two = pruned(again, "sparsegpt", scratch=tmp_path / "scratch")  # all blocks are finished
    assert one.frame.equals(two.frame)
    assert one.frames["matrices"].equals(two.frames["matrices"])
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(again)[name])


def test_what_does_not_apply_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="no sparse file format is read by plain transformers"):
        get("compress", "wanda").parse({"format": "sparse"})
    folder = tiny_folder("llama", tmp_path / "odd")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 250
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    odd = open_model(ModelRef(str(folder)))
    with pytest.raises(CannotCompress, match="down_proj has 250; choose unstructured"):
        pruned(odd, "magnitude", pattern="2:4")
    packed = own_model("llama", tmp_path)
    apply(packed, "rtn")
    with pytest.raises(CannotCompress, match="quantize last"):
        pruned(packed, "magnitude")
