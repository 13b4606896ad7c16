"""Class lens: the last layer is the model's own answer, the others a forward pass cut short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import BadInput, CannotMeasure
from core.probes._image import encode_image
from core.probes.class_lens import ClassLensSettings, class_lens
from core.types import Prompt, silent
from tests.colour_vit import colour_vit, painted
from tests.tiny import tiny_model

DIGIT = Prompt(image="digits:7")


def test_the_last_layer_is_the_models_answer_bit_for_bit() -> None:
    loaded = tiny_model("vit")
    result = class_lens(loaded, DIGIT, silent, ClassLensSettings())
    assert result.provenance.exactness_gap == 0
    with torch.inference_mode():
        logits = loaded.model(**encode_image(loaded, DIGIT).inputs).logits[0]
    last = result.frames["classes"].query("layer == 3")
    assert torch.equal(torch.tensor(last["logit"].to_numpy()), logits)
    assert result.frame["kl_to_final_nats"].iloc[-1] == 0
    assert result.frame["rank_of_target"].iloc[-1] == 1


def test_each_layer_equals_the_model_cut_after_it() -> None:
    loaded = tiny_model("vit")
    frame = class_lens(loaded, DIGIT, silent, ClassLensSettings(target="6")).frame
    model = loaded.model
    with torch.inference_mode():
        hidden = model(**encode_image(loaded, DIGIT).inputs, output_hidden_states=True).hidden_states
    for layer in range(loaded.anatomy.n_layers):
        logits = model.classifier(model.vit.layernorm(hidden[layer][0, 0].double().float())).double()
        p = torch.softmax(logits, -1)
        row = frame.iloc[layer]
        assert row["p_target"] == pytest.approx(float(p[6]), abs=1e-6)
        assert row["entropy_nats"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
        assert row["rank_of_target"] == 1 + int((logits > logits[6]).sum())


def test_the_colour_is_known_only_after_the_layer_that_looks(tmp_path: Path) -> None:
    image = painted(tmp_path / "picture.png", {6: (0, 255, 0), 1: (255, 0, 0)})
    frame = class_lens(colour_vit(6), Prompt(image=image), silent, ClassLensSettings(target="green")).frame
    assert frame["p_target"].iloc[0] == pytest.approx(1 / 3, abs=1e-6)
    assert frame["answer"].iloc[1] == "green"


def test_few_classes_keep_the_followed_one() -> None:
    found = class_lens(tiny_model("vit"), DIGIT, silent, ClassLensSettings(target="9", classes=2)).frames[
        "classes"
    ]
    assert found["class"].nunique() == 2
    assert "LABEL_9" in set(found["class"])


def test_text_and_unknown_classes_are_refused() -> None:
    with pytest.raises(BadInput, match="reads no text"):
        class_lens(tiny_model("vit"), Prompt("a text"), silent, ClassLensSettings())
    with pytest.raises(BadInput, match="no class of this model"):
        class_lens(tiny_model("vit"), DIGIT, silent, ClassLensSettings(target="cat"))


def test_a_classifier_that_reads_more_than_the_class_token_has_no_lens() -> None:
    with pytest.raises(CannotMeasure, match="no unembedding"):
        class_lens(tiny_model("dinov2_registers"), DIGIT, silent, ClassLensSettings())
