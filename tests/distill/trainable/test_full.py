"""Own parameters: which of them move, and that what is left is what a file holds."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.distill.trainable.prepare import prepare
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.targets import targets
from core.numerics.schemes import IntegerScheme
from core.quantize.grid import put_nearest
from core.types import ModelRef
from tests.tiny import tiny_folder


def settings(train: str, **changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "train": train,
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_targets": "all-linear",
            "seed": 0,
            **changes,
        }
    )


def opened(family: str, folder: Path) -> LoadedModel:
    """A tiny model of one's own, to be changed."""
    return open_model(ModelRef(str(tiny_folder(family, folder))))


def test_which_parameters_move(tmp_path: Path):
    loaded = opened("gpt2", tmp_path)
    everything = {name for name, _ in loaded.model.named_parameters()}
    moving = {
        train: {n for n, _ in prepare(loaded, settings(train)).named()} for train in ("all", "norms", "head")
    }
    assert moving["all"] == everything
    assert moving["norms"] == {n for n in everything if ".ln_" in n or n.endswith("bias")}
    # Tied: the head is the token embedding. The norm before it is behind the last layer, the position table is not.
    assert moving["head"] == {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    on = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert on == moving["head"], "what the last call did not name does not move"


def test_a_weight_on_a_grid_is_not_moved_off_it(tmp_path: Path):
    loaded = opened("llama", tmp_path)
    target = next(t for t in targets(loaded) if t.layout == "linear")
    put_nearest(loaded, target, IntegerScheme(4, 32, symmetric=False))
    with pytest.raises(CannotCompress, match="int4 g32 affine: with train=all"):
        prepare(loaded, settings("all"))
    assert prepare(loaded, settings("norms")).named()


def test_a_state_is_gone_back_to(tmp_path: Path):
    loaded = opened("llama", tmp_path)
    trainable = prepare(loaded, settings("norms"))
    kept = {name: tensor.clone() for name, tensor in trainable.state().items()}
    for _, parameter in trainable.named():
        parameter.data.add_(1.0)
    trainable.restore(kept)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in trainable.named())
    trainable.finish(loaded)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
