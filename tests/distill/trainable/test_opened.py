"""A variant that was opened from disk is trained on with the codes of its file."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.distill.trainable.prepare import prepare
from core.errors import CannotCompress
from core.models.open import open_model
from core.saving.layout import file_tensors
from core.types import ModelRef
from tests.compress.making import apply, own_model, save


@pytest.mark.parametrize("family", ["smollm", "mixtral"])
def test_it_goes_on_with_the_codes_of_its_file(family: str, tmp_path: Path):
    loaded = own_model(family, tmp_path)
    result = apply(loaded, "rtn", bits=4)
    save(loaded, result, tmp_path / "variant")
    opened = open_model(ModelRef(str(tmp_path / "variant")))
    trainable = prepare(opened, SimpleNamespace(train="scales_and_norms"))
    for name, parameter in trainable.named():
        if name.endswith(".scale"):
            parameter.data += 0.1
    trainable.before_forward()
    trainable.finish(opened)
    save(opened, result, tmp_path / "trained")
    before, after = file_tensors(loaded), file_tensors(opened)
    codes = [name for name in before if name.endswith("_packed")]
    assert codes
    assert all(torch.equal(before[name], after[name]) for name in codes)
    scales = [name for name in before if name.endswith("_scale")]
    factors = torch.cat([(after[n].float() / before[n].float()).flatten() for n in scales])
    torch.testing.assert_close(factors, torch.full_like(factors, 1.1052), rtol=2e-3, atol=0)
    again = dict(open_model(ModelRef(str(tmp_path / "trained"))).model.named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in opened.model.named_parameters())


def test_a_changed_one_is_dense(tmp_path: Path):
    loaded = own_model("llama", tmp_path)
    save(loaded, apply(loaded, "rtn", bits=4), tmp_path / "variant")
    opened = open_model(ModelRef(str(tmp_path / "variant")))
    opened.model.model.layers[0].mlp.up_proj.weight.data.neg_()  # as an earlier step of the recipe may
    with pytest.raises(CannotCompress, match="nothing of this one is"):
        prepare(opened, SimpleNamespace(train="scales_and_norms"))
    assert prepare(opened, SimpleNamespace(train="all")).named()
