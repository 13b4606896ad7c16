"""A head for classes: the body stays bit for bit, what is new comes from the seed, plain transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.distill.heads import give_class_head
from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import tiny_folder


def opened(family: str, folder: Path) -> LoadedModel:
    return open_model(ModelRef(str(tiny_folder(family, folder))))


@pytest.mark.parametrize("family", ["bert", "smollm", "gpt2"])
def test_the_body_stays_and_the_head_is_the_seeds(family: str, tmp_path: Path) -> None:
    heads = []
    for number, seed in enumerate((0, 0, 1)):
        loaded = opened(family, tmp_path / str(number))
        body = {name: t.clone() for name, t in loaded.model.base_model.state_dict().items()}
        assert give_class_head(loaded, ["no", "yes", "maybe"], seed=seed) == ("no", "yes", "maybe")
        now = loaded.model.base_model.state_dict()
        assert all(torch.equal(now[name], before) for name, before in body.items())
        assert loaded.family == "classifier"
        assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
        assert loaded.runs_batches
        heads.append(loaded.model.get_submodule(loaded.anatomy.classifier or "").weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() == pytest.approx(0.02, rel=0.2)  # initializer_range
    loaded.model.save_pretrained(tmp_path / "saved")
    again = open_model(ModelRef(str(tmp_path / "saved")))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(again.model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_a_pooler_that_the_checkpoint_has_not_is_drawn(tmp_path: Path) -> None:
    folder = tiny_folder("bert", tmp_path / "m")
    loaded = open_model(ModelRef(str(folder)))
    loaded.model.pooler = None
    give_class_head(loaded, ["no", "yes"])
    weight = loaded.model.bert.pooler.dense.weight
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    assert not weight.is_meta


def test_known_classes_keep_their_head_and_order(tmp_path: Path) -> None:
    loaded = opened("bert_classifier", tmp_path / "m")
    model = loaded.model
    assert give_class_head(loaded, ["LABEL_2", "LABEL_0"]) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert give_class_head(loaded, ["1", "0"]) == ("0", "1", "2")
    assert loaded.model is model
    give_class_head(loaded, ["no", "yes"])
    assert loaded.model.config.num_labels == 2


def test_what_cannot_have_a_head_is_refused(tmp_path: Path) -> None:
    loaded = opened("bert", tmp_path / "bert")
    with pytest.raises(BadInput, match="1 different classes among 1"):
        give_class_head(loaded, ["only"])
    with pytest.raises(CannotCompress, match="reads no text"):
        give_class_head(opened("vit", tmp_path / "vit"), ["no", "yes"])
    with pytest.raises(CannotCompress, match="no sequence classifier of model type olmoe"):
        give_class_head(opened("olmoe", tmp_path / "olmoe"), ["no", "yes"])
