"""An opened variant's codes, read back from its file, are those that were written; changed weights have none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.open import open_model
from core.models.targets import targets
from core.numerics.integer import quantize
from core.numerics.packed import PackedExperts, PackedTensor, narrow_rows
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.quantize.grid import put
from core.saving.layout import file_tensors
from core.saving.report import table
from core.saving.reread import reread
from core.types import ModelRef, Provenance, Result
from tests.compress.making import apply, own_model, save

STEPS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "affine groups and a float8 table": ("smollm", [("rtn", {"bits": 3})]),
    "one grid, tied table and Conv1D": (
        "gpt2",
        [("rtn", {"bits": 4, "embedding_bits": 4, "scheme": "symmetric"})],
    ),
    "fused experts": ("mixtral", [("rtn", {"bits": 4})]),
    "float8 by row": ("llama", [("fp8", {})]),
    "microscaling after a cast": ("llama", [("cast", {}), ("mxfp", {})]),
    "nvfp4": ("llama", [("nvfp4", {})]),
}


@pytest.mark.rotating
@pytest.mark.parametrize("case", STEPS)
def test_codes_and_scales_come_back(case: str, tmp_path: Path) -> None:
    family, steps = STEPS[case]
    loaded = own_model(family, tmp_path)
    for method, settings in steps:
        result = apply(loaded, method, **settings)
    save(loaded, result, tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant"), dtype="stored"))
    assert again.packed == {}
    again.packed = reread(again)
    assert again.packed.keys() == loaded.packed.keys()
    for module, packed in again.packed.items():
        assert packed.schemes == loaded.packed[module].schemes
        assert packed.product_dtype == loaded.packed[module].product_dtype
    written, once_more = file_tensors(loaded), file_tensors(again)
    assert written.keys() == once_more.keys()
    different = [name for name in written if not torch.equal(written[name], once_more[name])]
    # Norms of a file in 16 bits are written narrow where that holds them, so they may differ in dtype.
    assert not [name for name in different if not torch.equal(written[name].float(), once_more[name].float())]


def test_experts_of_two_forms_come_back(tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    rows = []
    for target in targets(loaded):
        weight = loaded.model.get_parameter(target.name).data
        packed = None
        if target.layout == "experts":
            ones = torch.ones(*weight.shape[:-1], 1, dtype=torch.bfloat16)
            fine = PackedTensor(weight.to(torch.bfloat16), ones, None, FloatScheme("bfloat16"))
            packed = PackedExperts((fine, narrow_rows(weight, FloatScheme("float8_e4m3fn"))), (1, 0, 1, 1))
        rows.append(put(loaded, target, packed, weight))
    save(loaded, Result({"main": table(rows)}, (), (), Provenance("by hand")), tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    found = reread(again)
    assert found.keys() == loaded.packed.keys()
    assert all(isinstance(packed, PackedExperts) for packed in found.values())
    assert {packed.choice_E.count(packed.choice_E[0]) for packed in found.values()} == {3}


def test_several_widths_come_back_as_they_are_multiplied(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    rows = []
    for target in targets(loaded):
        weight, bits = loaded.model.get_parameter(target.name).data, 3 if "mlp" in target.name else 5
        grid = IntegerScheme(bits, 32, symmetric=True)
        linear = target.layout == "linear" and target.layer is not None
        rows.append(put(loaded, target, quantize(weight, grid) if linear else None, weight))
    save(loaded, Result({"main": table(rows)}, (), (), Provenance("by hand")), tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    found = reread(again)
    assert {module: packed.schemes for module, packed in found.items()} == {
        module: packed.schemes for module, packed in loaded.packed.items()
    }
    assert {packed.product_dtype for packed in found.values()} == {torch.float32}


def test_a_changed_weight_has_no_codes(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    assert reread(loaded) == {}
    save(loaded, apply(loaded, "rtn", bits=4), tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    assert reread(again)
    again.model.model.layers[1].mlp.up_proj.weight.data[0, 0] *= 1.5
    assert reread(again) == {}
