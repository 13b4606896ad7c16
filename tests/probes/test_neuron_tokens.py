"""A neuron's push on the vocabulary against what happens to the logits when the neuron is made to write more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.probes._tokens import encode
from core.probes.neuron_tokens import NeuronTokensSettings, neuron_tokens
from core.types import Prompt, Result, silent
from tests.references.slow_attribution import frozen_norm
from tests.tiny import DECODERS, MOE_DECODERS, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")


def run(loaded: LoadedModel, **settings: Any) -> Result:
    return neuron_tokens(loaded, PROMPT, silent, NeuronTokensSettings(**settings))


@pytest.mark.parametrize("family", DECODERS)
def test_the_push_is_the_neurons_direct_attribution(family: str) -> None:
    result = run(tiny_model(family), target=" the", distractor=" and", neurons=5)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-9
    assert len(result.frame) == 5
    sides = result.frames["tokens"].groupby("side")["push"]
    assert sides.min()["promotes"] > 0 > sides.max()["suppresses"]


def test_tokens_are_those_of_the_whole_vocabulary_by_hand() -> None:
    loaded = tiny_model("gpt2")
    result = run(loaded, layer=2, neuron=7, tokens=3)
    block = loaded.anatomy.blocks[2]
    final: dict[str, Any] = {}
    hook = loaded.model.get_submodule(block.path).register_forward_hook(
        lambda module, args, output: final.update(h=output)
    )
    with torch.inference_mode():
        loaded.model(**encode(loaded, PROMPT).inputs)
    hook.remove()
    weight_D = loaded.model.get_submodule(str(block.down)).weight[7].double()
    norm = loaded.model.get_submodule(str(loaded.anatomy.final_norm))
    normed_D = frozen_norm(norm, weight_D, final["h"][0, -1].double(), loaded.anatomy)
    unit_V = loaded.model.lm_head.weight.double() @ normed_D
    unit_V -= unit_V.mean()
    activation = result.frame["activation"].iloc[0]
    expected = (unit_V * activation).topk(3)
    tokens = result.frames["tokens"].query("side == 'promotes'")
    assert tokens["token_id"].tolist() == expected.indices.tolist()
    assert tokens["push"].tolist() == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert result.frame["promotes"].iloc[0].count("'") == 6


@pytest.mark.parametrize("family", MOE_DECODERS)
def test_an_expert_that_did_not_run_still_has_its_words(family: str) -> None:
    loaded = tiny_model(family)
    found = [run(loaded, layer=2, neuron=3, expert=expert).frame for expert in range(4)]
    idle = [frame["activation"].iloc[0] == 0 for frame in found]
    assert sum(idle) == 2, "each position chooses two of four experts"
    assert all(frame["promotes"].iloc[0] for frame in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "layer 3 does not exist: .* has 3, from 0 to 2"),
        ({"layer": 1, "neuron": 256}, "neuron 256 does not exist: layer 1 has 256"),
        ({"layer": 1, "expert": 4}, "expert 4 does not exist: layer 1 has 4"),
    ],
)
def test_a_neuron_that_does_not_exist_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(tiny_model("mixtral"), **settings)
