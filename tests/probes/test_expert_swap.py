"""One token rerouted: the same as arguments changed by hand, and nothing when an expert takes its own place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import BadInput
from core.probes.expert_swap import ExpertSwapSettings, expert_swap
from core.types import Prompt, silent
from tests.references import slow_rerouting
from tests.tiny import MOE, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")


@pytest.mark.parametrize("family", MOE)
def test_every_swap_equals_the_arguments_changed_by_hand(family: str) -> None:
    loaded = tiny_model(family)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    layer = max(block.index for block in loaded.anatomy.blocks if block.is_moe)
    result = expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(layer=layer))
    assert result.provenance.exactness_gap == 0, "an expert in its own place changes nothing"
    whole = slow_rerouting.logits(loaded, ids)[-1]
    experts_TK, weights_TK = slow_rerouting.decisions(loaded, ids)[layer]
    slot = int(weights_TK[-1].argmax())
    swaps = result.frames["swaps"].set_index("expert")
    assert set(swaps.index) == {-1, *range(loaded.anatomy.n_experts)} - set(experts_TK[-1].tolist())
    for expert, row in swaps.iterrows():

        def edit(at: int, experts: torch.Tensor, weights: torch.Tensor, expert: int = expert) -> tuple:
            experts, weights = experts.clone(), weights.clone()
            if at == layer and expert >= 0:
                experts[-1, slot] = expert
            elif at == layer:
                weights[-1, slot] = 0
            return experts, weights

        expected = slow_rerouting.kl(whole, slow_rerouting.logits(loaded, ids, edit)[-1])
        assert row["kl_nats"] == pytest.approx(expected, abs=1e-6)
    assert swaps["kl_nats"].max() > 1e-4


@pytest.mark.parametrize("family", MOE)
def test_the_original_number_of_experts_is_no_change_and_others_are_their_configs(
    family: str, tmp_path: Path
) -> None:
    """Cut behind the first token, only it is left: then its number of experts is the whole model's."""
    loaded = tiny_model(family)
    first = loaded.tokenizer(PROMPT.text)["input_ids"][:1]
    counts = expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(position=0)).frames["counts"]
    by_k = counts.set_index("experts")["kl_nats"]
    assert by_k[loaded.anatomy.experts_per_token] == 0
    most = int(by_k.index.max())
    other = slow_rerouting.with_top_k(family, most, tmp_path)
    expected = slow_rerouting.kl(
        slow_rerouting.logits(loaded, first)[-1], slow_rerouting.logits(other, first)[-1]
    )
    assert by_k[most] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_with_k_only_the_last_token_is_rerouted(family: str) -> None:
    """The tokens before keep their experts: their routing under k would change what the last one attends to."""
    loaded = tiny_model(family)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    by_k = expert_swap(loaded, PROMPT, silent, ExpertSwapSettings()).frames["counts"].set_index("experts")
    whole = slow_rerouting.logits(loaded, ids)[-1]
    k = loaded.anatomy.experts_per_token
    assert by_k.loc[k, "kl_nats"] == 0
    if k == 1:
        pytest.skip("one expert is the fewest")
    blocks = [block.index for block in loaded.anatomy.blocks if block.is_moe]

    def alone(at: int, experts: torch.Tensor, weights: torch.Tensor) -> tuple:
        """Keep the best of the last token only, weighed as the router weighs one: read off a pass with k = 1."""
        experts, weights = experts.clone(), weights.clone()
        best = int(weights[-1].argmax())
        kept = weights[-1, best].clone()
        renormalized = abs(float(weights[-1].sum()) - 1) < 1e-5
        weights[-1] = 0
        weights[-1, best] = 1.0 if renormalized else kept
        return experts, weights

    if family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "jamba") and blocks:
        expected = slow_rerouting.kl(whole, slow_rerouting.logits(loaded, ids, alone)[-1])
        assert by_k.loc[1, "kl_nats"] == pytest.approx(expected, abs=1e-5)


def test_what_the_token_was_not_given_cannot_be_replaced_and_what_it_was_cannot_replace() -> None:
    loaded = tiny_model("mixtral")
    chosen = expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(layer=1)).frames["chosen"]
    given = chosen[chosen["layer"] == 1]["expert"].tolist()
    other = next(expert for expert in range(4) if expert not in given)
    with pytest.raises(BadInput, match=f"did not give this token expert {other}; it gave"):
        expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(layer=1, expert=other))
    with pytest.raises(BadInput, match=f"expert {given[0]} cannot take the place"):
        expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(layer=1, replacement=given[0]))
    with pytest.raises(BadInput, match="layer 7 routes nothing"):
        expert_swap(loaded, PROMPT, silent, ExpertSwapSettings(layer=7))
