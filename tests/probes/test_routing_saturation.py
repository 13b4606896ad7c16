"""Router saturation: 1 against itself, k / E between unrelated routers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import BadInput
from core.models.open import open_model
from core.probes.routing_saturation import STORED, RoutingSaturationSettings, routing_saturation
from core.types import ModelRef, Prompt, Result, silent
from tests.tiny import MOE, tiny_folder, tiny_model

FEW = 256


def asked(family: str, *checkpoints: Path) -> Result:
    settings = RoutingSaturationSettings(checkpoints=", ".join(map(str, checkpoints)), max_tokens=FEW)
    return routing_saturation(tiny_model(family), Prompt("unread"), silent, settings)


@pytest.mark.parametrize("family", MOE)
def test_the_same_weights_are_settled(family: str, tmp_path: Path) -> None:
    found = asked(family, tiny_folder(family, tmp_path / "same"))
    assert (found.frame["saturation"] == 1).all()
    assert found.provenance.exactness_gap == 0


def test_unrelated_routers_share_k_of_e(tmp_path: Path) -> None:
    others = [tiny_folder("olmoe", tmp_path / str(seed), seed=seed) for seed in range(1, 7)]
    found = asked("olmoe", *others)
    frame = found.frame
    earlier = frame[frame["checkpoint"] != str(tiny_model("olmoe").ref)]
    assert earlier["saturation"].mean() == pytest.approx(frame["by_chance"][0], abs=0.12)
    last = frame[frame["checkpoint"] == str(tiny_model("olmoe").ref)]
    assert (last["saturation"] == 1).all()


def test_decisions_written_down_in_training_are_read_as_they_are(tmp_path: Path) -> None:
    folder = tiny_folder("olmoe", tmp_path / "model")
    experts = np.zeros((3, 3, 8, 2), dtype=np.uint8)
    experts[:] = [0, 1]
    experts[0, 0] = [2, 3]  # the first checkpoint's first layer chose two others throughout
    experts[0, 1, :4] = [1, 3]  # its second layer one other, for half of the tokens
    np.savez(
        folder / STORED,
        experts_CLTK=experts,
        steps_C=np.array([1, 10, 100]),
        progress_C=np.array([0.01, 0.1, 1.0]),
        token_ids_T=np.arange(8),
        domains=np.array(["a", "b"]),
        window=np.array(4),
    )
    loaded = open_model(ModelRef.parse(str(folder)))
    found = routing_saturation(loaded, Prompt("unread"), silent, RoutingSaturationSettings())
    assert found.frame["saturation"].tolist() == [0.0, 0.75, 1.0, *[1.0] * 6]
    assert found.frame["checkpoint"][0] == "1% (step 1)"
    assert found.metrics[0].value == pytest.approx(1.75 / 3)


def test_a_model_without_stored_decisions_says_what_to_do() -> None:
    with pytest.raises(
        BadInput, match=r"name earlier checkpoints of it in\s+`checkpoints`, or open demo:moe"
    ):
        routing_saturation(tiny_model("olmoe"), Prompt("unread"), silent, RoutingSaturationSettings())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"checkpoint .*llama: .* dense"):
        asked("olmoe", tiny_folder("llama", tmp_path / "llama"))
    with pytest.raises(BadInput, match=r"checkpoint .*nothing cannot be opened"):
        asked("olmoe", tmp_path / "nothing")
