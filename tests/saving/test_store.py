"""What is written reloads to the same weights, in the bytes that were predicted, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.targets import targets
from core.quantize.grid import put
from core.registry import get
from core.saving.proof import _options, _probe_inputs, auto_class
from core.saving.report import table
from core.saving.store import predicted_bytes, save_variant
from core.types import Documents, ModelRef, silent
from tests.compress.making import apply, own_model, save
from tests.tiny import CORPUS, FUSED_ON_DISK, PACKABLE, tiny_folder

INT8: dict[str, Any] = {"bits": 8, "group_size": "channel", "scheme": "symmetric"}
INT4: dict[str, Any] = {"bits": 4}
INT3: dict[str, Any] = {"bits": 3, "group_size": "64", "embedding_bits": 16}
INT2: dict[str, Any] = {"bits": 2, "group_size": "32", "scheme": "symmetric", "embedding_bits": 2}


def reloaded(loaded: LoadedModel, folder: Path) -> Any:
    model, report = getattr(transformers, auto_class(loaded)).from_pretrained(
        folder, output_loading_info=True, **_options(loaded)
    )
    assert not any(report.values()), report
    return model.eval()


def assert_same(loaded: LoadedModel, folder: Path) -> None:
    again = reloaded(loaded, folder)
    parameters = dict(again.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameters[name], parameter), name
        assert parameters[name].dtype == parameter.dtype, name
    for name, source in loaded.model.all_tied_weights_keys.items():
        assert again.get_parameter(name) is again.get_parameter(source)
    inputs = _probe_inputs(loaded)
    with torch.inference_mode():
        assert torch.equal(again(**inputs)[0], loaded.model(**inputs)[0])


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("settings", [INT8, INT4], ids=["int8", "int4"])
def test_every_family_reloads_bit_for_bit(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    result = apply(loaded, "rtn", **settings)
    saved = save(loaded, result, tmp_path / "variant")
    assert_same(loaded, tmp_path / "variant")
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=0.02)
    assert saved.bytes == (tmp_path / "variant/model.safetensors").stat().st_size


@pytest.mark.parametrize("family", FUSED_ON_DISK)
def test_experts_stored_as_one_tensor_are_refused_before_anything_is_written(
    family: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    result = apply(loaded, "rtn", **INT4)
    with pytest.raises(CannotCompress, match=r"stores all experts of a layer in one tensor.* choose cast"):
        save(loaded, result, tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


@pytest.mark.parametrize("settings", [INT3, INT2], ids=["int3", "int2"])
@pytest.mark.parametrize("family", ["smollm", "llama", "mixtral", "gpt2"])
def test_odd_widths_reload_too(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    saved = save(loaded, apply(loaded, "rtn", **settings), tmp_path / "variant")
    assert_same(loaded, tmp_path / "variant")
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=0.02)


@pytest.mark.parametrize("family", ["smollm", "bert", "vit", "olmoe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_reload_in_their_dtype(family: str, dtype: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    saved = save(loaded, apply(loaded, "cast", dtype=dtype), tmp_path / "variant")
    assert saved.format == dtype
    assert_same(loaded, tmp_path / "variant")
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=0.02)


@pytest.mark.parametrize("family", ["smollm", "mixtral"])
def test_cast_then_rtn_keeps_the_rest_in_16_bits(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    apply(loaded, "cast")
    save(loaded, apply(loaded, "rtn", bits=4), tmp_path / "variant")
    assert_same(loaded, tmp_path / "variant")
    assert reloaded(loaded, tmp_path / "variant").dtype is torch.bfloat16


def test_a_tied_tensor_is_in_the_file_once(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    save(loaded, apply(loaded, "rtn", **INT8), tmp_path / "variant")
    with safe_open(tmp_path / "variant/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight_packed" in names
    assert not any(name.startswith("lm_head") for name in names)


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    result = apply(loaded, "rtn", **INT4)
    inputs = _probe_inputs(loaded)
    with torch.inference_mode():
        before = loaded.model(**inputs)[0].clone()
        save(loaded, result, tmp_path / "variant")
        assert torch.equal(loaded.model(**inputs)[0], before)


def test_smaller_bits_are_smaller_files(tmp_path: Path) -> None:
    sizes = []
    for bits in (8, 4, 3, 2):
        loaded = own_model("llama", tmp_path / str(bits))
        apply(loaded, "rtn", bits=bits)
        sizes.append(predicted_bytes(loaded))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_companion_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    loaded = own_model("bert", tmp_path)
    base = tmp_path / "base"
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    (base / "pytorch_model.bin").write_bytes(b"never copied")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    saved = save(loaded, apply(loaded, "cast"), tmp_path / "variant")
    assert {"1_Pooling/config.json", "tokenizer.json", "config.json", "recipe.json", "slimscope.json"} <= set(
        saved.files
    )
    assert not {"pytorch_model.bin", "model.safetensors.index.json"} & set(saved.files)
    assert json.loads((tmp_path / "variant/config.json").read_text())["dtype"] == "bfloat16"


def test_a_disk_without_room_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = own_model("llama", tmp_path)
    result = apply(loaded, "cast")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000)
    )
    with pytest.raises(CannotCompress, match=r"has 0 MB free but this needs \d+ MB"):
        save(loaded, result, tmp_path / "variants/one")
    assert list((tmp_path / "variants").iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_disk_that_fills_while_writing_leaves_nothing(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def fill(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise failure

    loaded = own_model("llama", tmp_path)
    result = apply(loaded, "cast")
    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    with pytest.raises(CannotCompress, match="became full while writing; nothing was kept"):
        save(loaded, result, tmp_path / "variants/one")
    assert list((tmp_path / "variants").iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    (tmp_path / "variant").mkdir()
    with pytest.raises(CannotCompress, match="exists already"):
        save(loaded, apply(loaded, "cast"), tmp_path / "variant")


def test_what_nothing_packed_is_stored_as_the_base_stores_it_where_that_loses_nothing(tmp_path: Path) -> None:
    folder = tiny_folder("olmoe", tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    loaded = open_model(ModelRef(str(folder)))
    assert loaded.dtype == "float32"
    norm, other = loaded.model.model.norm.weight, loaded.model.model.layers[0].input_layernorm.weight
    norm.data[3] = 1 / 3  # no float16
    rows = [
        put(loaded, target, None, loaded.model.get_parameter(target.name).data) for target in targets(loaded)
    ]
    saved = save_variant(loaded, tmp_path / "variant", frame=table(rows), provenance={"recipe": {}})
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=1e-3)
    assert saved.bytes == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)
    assert saved.format == "float16"
    with safe_open(tmp_path / "variant/model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert stored.pop("model.norm.weight") is torch.float32
    assert set(stored.values()) == {torch.float16}
    assert other.dtype is torch.float32
    assert_same(loaded, tmp_path / "variant")


@pytest.mark.parametrize("method", ["rtn", "expert_bits"])
def test_a_base_in_16_bits_keeps_its_dtype_beside_packed_weights(method: str, tmp_path: Path) -> None:
    folder = tiny_folder("olmoe", tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    loaded = open_model(ModelRef(str(folder)))
    if method == "rtn":
        result = apply(loaded, "rtn", bits=4)
    else:
        chosen = get("compress", method)
        text = Documents("corpus", "calibration", CORPUS)
        result = chosen.run(loaded, text, silent, chosen.parse({"calibration_tokens": 64}))
    save(loaded, result, tmp_path / "variant")
    assert_same(loaded, tmp_path / "variant")
