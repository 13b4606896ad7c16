"""The parts of a logit add up to it, equal the slow reference, and are known on the induction model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import BadInput, CannotMeasure
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.probes import _logit_split
from core.probes import _residual_parts as parts_module
from core.probes.direct_logit_attribution import (
    DirectLogitAttributionSettings,
    direct_logit_attribution,
)
from core.types import Prompt, Result, silent
from tests.compress.making import apply, own_model
from tests.induction import EPSILON, D, induction_model, repeated_prompt
from tests.references.slow_attribution import parts_by_hand
from tests.tiny import DECODERS, MOE_DECODERS, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
DENSE = [family for family in DECODERS if family not in MOE_DECODERS]


def run(loaded: LoadedModel, prompt: Prompt = PROMPT, **settings: Any) -> Result:
    return direct_logit_attribution(loaded, prompt, silent, DirectLogitAttributionSettings(**settings))


def in_float64(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model).double()
    if loaded.anatomy.n_experts:
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return dataclasses.replace(loaded, model=model)


def contributions(result: Result) -> dict[str, float]:
    return dict(zip(result.frame["component"], result.frame["contribution"], strict=True))


@pytest.mark.parametrize("family", DECODERS)
def test_parts_sum_to_the_models_own_logit(family: str) -> None:
    loaded = tiny_model(family)
    with torch.inference_mode():
        ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
        logits_V = loaded.model(ids).logits[0, -1].double()
    cap = loaded.anatomy.logit_softcap
    if cap is not None:
        logits_V = cap * torch.atanh(logits_V / cap)
    result = run(loaded)
    assert result.frame["contribution"].sum() == pytest.approx(float(logits_V.max()), abs=1e-5)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-5
    a, b = loaded.tokenizer(" the and")["input_ids"]
    against = run(loaded, target=" the", distractor=" and")
    assert against.frame["contribution"].sum() == pytest.approx(float(logits_V[a] - logits_V[b]), abs=1e-5)
    mean = run(loaded, target=" the", relative_to="vocabulary_mean")
    if cap is None:
        assert mean.frame["contribution"].sum() == pytest.approx(
            float(logits_V[a] - logits_V.mean()), abs=1e-5
        )
    assert mean.provenance.exactness_gap < 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_parts_sum_exactly_in_double_precision(family: str) -> None:
    loaded = in_float64(tiny_model(family))
    for settings in ({}, {"target": " the", "distractor": " and"}, {"position": 0}):
        gap = run(loaded, **settings).provenance.exactness_gap
        assert gap is not None
        assert gap < 1e-9


@pytest.mark.parametrize("family", DENSE)
def test_every_head_and_mlp_equals_the_slow_reference(family: str) -> None:
    loaded = in_float64(tiny_model(family))
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    head = loaded.model.get_submodule(loaded.anatomy.unembedding)
    a, b = loaded.tokenizer(" the and")["input_ids"]
    expected = parts_by_hand(loaded, ids, head.weight[a] - head.weight[b])
    found = contributions(run(loaded, target=" the", distractor=" and"))
    # RMS norms round to float32 inside even in a float64 model: the reference does not.
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-6)
    biases = {name for name in found if "bias" in name}
    others = {"token embedding", "position embedding"} | biases
    assert set(found) - set(expected) <= others
    has_bias = {"qwen2": set(), "gpt2": {"L0 attention bias"}, "opt": {"final norm's bias"}}
    assert has_bias.get(family, set()) <= biases


@pytest.mark.parametrize("family", DECODERS)
def test_neurons_sum_to_their_mlp(family: str) -> None:
    loaded = in_float64(tiny_model(family))
    result = run(loaded, top_neurons=1000)
    mlp = result.frames["layers"].query("kind == 'MLP'")["contribution"].sum()
    neurons = result.frames["neurons"]
    assert neurons["contribution"].abs().is_monotonic_decreasing
    if family == "llama":  # 3 layers × 256 neurons and no bias: all are shown
        assert neurons["contribution"].sum() == pytest.approx(mlp, abs=1e-12)
    if family in MOE_DECODERS:
        assert neurons["component"].str.contains("E").any()


def test_induction_head_writes_the_whole_answer() -> None:
    length = 12
    loaded = induction_model(40.0)
    for position in range(length + 1, 2 * length):
        result = run(loaded, repeated_prompt(length), position=position)
        assert contributions(result)["L1H0"] == pytest.approx(2 / (8 / D + EPSILON) ** 0.5, abs=2e-6)
        assert result.frame["component"].iloc[0] == "L1H0"
        assert result.frame["share"].iloc[0] == pytest.approx(1, abs=1e-6)
        assert (result.frame["contribution"].iloc[1:].abs() < 1e-6).all()
        assert result.provenance.exactness_gap < 1e-6


def test_weights_and_hooks_are_left_alone(tmp_path: Path) -> None:
    loaded = own_model("gemma2", tmp_path)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    run(loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


def test_a_softcap_is_said_and_the_logit_before_it_split() -> None:
    result = run(tiny_model("gemma2"))
    assert any("the logit before the cap is split" in note for note in result.notes)
    assert not any("cap" in note for note in run(tiny_model("llama")).notes if "tanh" in note)


def test_a_logit_scale_is_part_of_every_contribution(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    plain = contributions(run(loaded, target=" the"))
    scaled = dataclasses.replace(loaded, anatomy=dataclasses.replace(loaded.anatomy, logit_scale=0.25))
    found = contributions(run(scaled, target=" the"))
    assert found == pytest.approx({name: value / 4 for name, value in plain.items()})


def test_a_compressed_variant_is_split_as_exactly(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    apply(loaded, "rtn")
    assert run(loaded).provenance.exactness_gap < 1e-5


def test_bfloat16_is_split_too_and_says_what_it_misses(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    loaded.model.bfloat16()
    result = run(loaded)
    assert 1e-3 < result.provenance.exactness_gap < 0.1
    assert any("bfloat16 rounds every addition" in note for note in result.notes)


def test_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contributions(run(tiny_model("llama")))
    monkeypatch.setattr("core.probes._norm_fold.CHUNK_ELEMENTS", 1000)
    assert contributions(run(tiny_model("llama"))) == pytest.approx(whole, abs=1e-12)


# --- planted faults: each must be seen ------------------------------------------------------------------


class _NextGroup(Anatomy):
    """An anatomy whose query heads read the key/value head after their own."""

    def kv_head(self, head: int) -> int:
        return (super().kv_head(head) + 1) % self.n_kv_heads


def test_a_shifted_key_value_head_is_seen_by_the_reference() -> None:
    loaded = tiny_model("llama")
    fields = {field.name: getattr(loaded.anatomy, field.name) for field in dataclasses.fields(Anatomy)}
    shifted = dataclasses.replace(loaded, anatomy=_NextGroup(**fields))
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    head = loaded.model.get_submodule(loaded.anatomy.unembedding)
    found = contributions(run(loaded, target=" the"))
    wrong = parts_by_hand(shifted, ids, head.weight[loaded.tokenizer(" the")["input_ids"][0]])
    assert abs(found["L2H0"] - wrong["L2H0"]) > 1e-2


@pytest.mark.parametrize(("family", "offset"), [("gemma2", 0.0), ("llama", 1.0)])
def test_a_wrong_norm_offset_is_refused(family: str, offset: float) -> None:
    loaded = tiny_model(family)
    wrong = dataclasses.replace(loaded, anatomy=dataclasses.replace(loaded.anatomy, norm_offset=offset))
    with pytest.raises(CannotMeasure, match="is not γ"):
        run(wrong)


@pytest.mark.parametrize("family", MOE_DECODERS)
def test_gate_and_up_swapped_opens_the_gap(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts_module.weighted_neurons

    class Swapped:
        def __init__(self, experts: Any) -> None:
            self.gate_up_proj = torch.cat(experts.gate_up_proj.chunk(2, dim=1)[::-1], dim=1)
            self.act_fn, self.is_transposed = experts.act_fn, False

    monkeypatch.setattr(
        _logit_split, "weighted_neurons", lambda experts, routed: right(Swapped(experts), routed)
    )
    assert run(tiny_model(family)).provenance.exactness_gap > 1e-3


def test_a_silenced_expert_opens_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts_module.weighted_neurons
    monkeypatch.setattr(
        _logit_split,
        "weighted_neurons",
        lambda *given: right(*given) * torch.tensor([[0.0], [1.0]]),
    )
    assert run(tiny_model("mixtral")).provenance.exactness_gap > 1e-3


def test_a_sandwich_read_before_its_after_norm_opens_the_gap() -> None:
    loaded = tiny_model("gemma2")
    pre = dataclasses.replace(loaded, anatomy=dataclasses.replace(loaded.anatomy, norm_place="pre"))
    assert run(pre).provenance.exactness_gap > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": 900}, r"position 900 does not exist: the prompt has \d+ tokens"),
        ({"target": "zebra"}, "and a target is one"),
        ({"target": " the", "distractor": " the"}, "their difference is 0"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(tiny_model("llama"), **settings)
