"""The probes of routing on tiny models of every family: against the decisions themselves, and with known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.compress.prune_experts import read_pairs
from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes._routed_text import Texts, find_texts, read_choices, token_passages
from core.probes._routing_report import count_choices, router_rows
from core.probes.expert_load import balance_by_layer
from core.probes.routing_margin import rounded_routers
from core.registry import get
from core.routing.discover import moe_layers
from core.routing.trace import trace
from core.types import ModelRef, Prompt, Result, silent
from tests.tiny import CORPUS, HEADLESS, MOE, SHIMMED, tiny_folder, tiny_model

PROBES = (
    "expert_load",
    "expert_domains",
    "routing_path",
    "expert_vocabulary",
    "expert_coactivation",
    "expert_flow",
    "expert_similarity",
    "routing_margin",
    "special_experts",
    "routing_shares",
    "dead_experts",
)
PROMPT = Prompt("one two three def add(left, right): return left + right")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small file of many short documents."""
    path: Path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [" ".join(CORPUS[(i + j) % 4] + f" Item {i * 7 + j}." for j in range(6)) for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two kinds of short text."""
    path: Path = tmp_path_factory.mktemp("labelled") / "kinds.tsv"
    rows = ["text\tlabel"]
    for i in range(24):
        rows.append(f"The store number {i} of Paris is open and sells a drink to Mary{i}\tprose")
        rows.append(f"def add{i}(left, right): return left * {i} + right{i}\tcode")
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def ask(probe: str, loaded: LoadedModel, prompt: Prompt = PROMPT, **settings: Any) -> Result:
    m = get("probe", probe)
    result: Result = m.run(loaded, prompt, silent, m.parse(settings))
    return result


def small(probe: str, text: str, labelled: str) -> dict[str, Any]:
    """Settings under which a probe takes a moment."""
    if probe == "routing_path":
        return {}
    if probe in ("expert_domains", "special_experts"):
        return {"data": labelled, "max_tokens": 512} | (
            {"permutations": 19} if probe == "expert_domains" else {}
        )
    return {"text": text, "max_tokens": 512}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("family", [*HEADLESS, *SHIMMED])
def test_families_that_the_registry_does_not_walk(family: str, probe: str, text: str, labelled: str):
    loaded = tiny_model(family)
    if probe == "expert_flow" and len(moe_layers(loaded)) == 1:
        with pytest.raises(BadInput, match="one MoE layer"):
            ask(probe, loaded, **small(probe, text, labelled))
        return
    result = ask(probe, loaded, **small(probe, text, labelled))
    for view in result.views:
        assert len(result.frames[view.frame]) <= 10_000
    gap = result.provenance.exactness_gap
    assert gap is None or gap < 1e-5


@pytest.mark.parametrize("family", [*MOE, *SHIMMED])
def test_what_is_counted_is_what_was_decided(family: str, text: str):
    loaded = tiny_model(family)
    texts = find_texts(loaded, PROMPT, text)
    choices = read_choices(loaded, texts, silent, max_tokens=400)
    assert choices.n_tokens == 400
    assert choices.n_documents == 7, "passages of 64 tokens, one of each document in turn"
    at = 0
    for document, ids in token_passages(loaded, texts, 400, 32):
        alone = trace(loaded, ids)
        span = slice(at, at + len(ids))
        assert (choices.document_T[span] == document).all()
        # Run side by side, sums round otherwise: a tie may fall the other way.
        same = (np.sort(choices.experts_LTK[:, span], -1) == np.sort(alone.experts_LTK, -1)).mean()
        assert same > 0.99
        at += len(ids)
    assert at == 400


def test_documents_take_turns_and_every_token_comes_once():
    loaded = tiny_model("olmoe")
    texts = Texts("made", ("one two three " * 60, "def add(left, right) " * 9, ""))
    found = list(token_passages(loaded, texts, 10_000, 32))
    assert [document for document, _ in found[:2]] == [0, 1]
    for document, written in enumerate(texts.texts):
        read = [id_ for at, ids in found if at == document for id_ in ids]
        assert read == loaded.tokenizer(written)["input_ids"]


def test_permuting_a_models_experts_permutes_its_loads(tmp_path: Path, text: str):
    loaded = open_model(ModelRef(str(tiny_folder("mixtral", tmp_path / "own"))))
    texts = find_texts(loaded, PROMPT, text)
    before = read_choices(loaded, texts, silent, max_tokens=600)
    order = torch.tensor([2, 0, 3, 1])
    for layer in moe_layers(loaded):
        for module in (layer.experts, layer.router):
            for parameter in loaded.model.get_submodule(module).parameters():
                parameter.data = parameter.data[order].clone()
    after = read_choices(loaded, texts, silent, max_tokens=600)
    here, there = count_choices(before).sum(0), count_choices(after).sum(0)
    assert np.abs(there - here[:, order.numpy()]).max() <= 2, "a tie in a margin may fall the other way"
    assert np.abs(there - here).max() > 20
    balance = [balance_by_layer(count_choices(each), each).to_numpy() for each in (before, after)]
    assert balance[0] == pytest.approx(balance[1], abs=0.02)


class TestSimilarity:
    def test_a_copy_has_cosine_one_in_every_sense(self, tmp_path: Path, text: str):
        loaded = open_model(ModelRef(str(tiny_folder("olmoe", tmp_path / "own"))))
        layer = moe_layers(loaded)[1]
        for path in (layer.experts, layer.router):
            for parameter in loaded.model.get_submodule(path).parameters():
                if len(parameter) == layer.n_experts:
                    parameter.data[3] = parameter.data[1]
        result = ask("expert_similarity", loaded, text=text, layer=layer.layer, max_tokens=600)
        best = result.frames["ranked"].iloc[0]
        assert best["pair"] == "E1 + E3"
        assert best[["outputs", "weights", "router_rows"]].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
        others = result.frames["ranked"].iloc[1:]
        assert others[["outputs", "weights"]].abs().max(axis=None) < 0.5
        assert {m.name: m.value for m in result.metrics}["near_duplicates"] == 1

    @pytest.mark.parametrize("family", MOE)
    def test_outputs_add_up_to_what_the_module_gives(self, family: str, text: str):
        result = ask("expert_similarity", tiny_model(family), text=text, max_tokens=256)
        assert result.provenance.exactness_gap is not None
        assert result.provenance.exactness_gap < 1e-5


class TestShares:
    @pytest.mark.parametrize("family", [*MOE, *SHIMMED])
    def test_shares_of_a_block_sum_to_its_update(self, family: str, text: str):
        loaded = tiny_model(family)
        result = ask("routing_shares", loaded, text=text, max_tokens=300)
        assert result.provenance.exactness_gap is not None
        assert result.provenance.exactness_gap < 1e-5
        sums = result.frame.groupby("layer")["share"].sum()
        assert sums.to_numpy() == pytest.approx(1, abs=1e-5)
        moe = {layer.layer: layer for layer in moe_layers(loaded)}
        for block, parts in result.frame.groupby("layer")["part"]:
            layer = moe.get(block)
            expected = {"attention", "dense MLP"} if layer is None else {"attention", "routed experts"}
            assert set(parts) == expected | ({"shared expert"} if layer and layer.shared else set())

    def test_a_silenced_shared_expert_writes_nothing(self, tmp_path: Path, text: str):
        loaded = open_model(ModelRef(str(tiny_folder("qwen2_moe", tmp_path / "own"))))
        layer = moe_layers(loaded)[0]
        loaded.model.get_submodule(layer.shared).down_proj.weight.data.zero_()
        frame = ask("routing_shares", loaded, text=text, max_tokens=300).frame
        rows = frame[frame["layer"] == layer.layer].set_index("part")
        assert rows.loc["shared expert", "size"] == 0
        assert rows.loc["routed experts", "share_of_mlp"] == pytest.approx(1, abs=1e-6)


class TestMargin:
    def test_margin_is_the_distance_of_the_k_th_logit_to_the_next(self, text: str):
        loaded = tiny_model("mixtral")
        result = ask("routing_margin", loaded, text="", layer=0)
        seen = []
        router = loaded.model.get_submodule(moe_layers(loaded)[0].router)
        rows = router_rows(loaded, moe_layers(loaded)[0])
        hook = router.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 128)))
        loaded.model(
            **{
                k: v
                for k, v in loaded.tokenizer(PROMPT.text, return_tensors="pt").items()
                if k != "token_type_ids"
            }
        )
        hook.remove()
        ranked = (seen[0] @ rows.T).sort(-1, descending=True).values
        expected = (ranked[:, 1] - ranked[:, 2]).detach().double().numpy()
        row = result.frames["layers"].iloc[0]
        assert row["p50"] == pytest.approx(np.median(expected), rel=1e-4)
        assert row["p5"] == pytest.approx(np.quantile(expected, 0.05), rel=1e-3)

    def test_fewer_bits_flip_more_and_small_margins_flip_first(self, text: str):
        loaded = tiny_model("olmoe")
        tables = {
            bits: ask("routing_margin", loaded, text=text, max_tokens=1024, bits=bits) for bits in (2, 4, 8)
        }
        flipped = {bits: result.frames["layers"]["flipped_share"].iloc[0] for bits, result in tables.items()}
        assert flipped[2] > flipped[4] > flipped[8]
        assert tables[4].frames["layers"]["flips_told"].iloc[0] > 0.8
        curve = tables[4].frames["flips"]
        assert curve["flipped_share"].iloc[0] > 5 * curve["flipped_share"].iloc[-1]
        assert curve["tokens"].sum() == 1024
        assert (curve["high"] > curve["flipped_share"] - 1e-12).all()
        assert curve["high"].iloc[-1] > 0, "no flip among some hundred tokens is not never"

    def test_routers_are_put_back_to_the_bit_even_after_an_error(self):
        loaded = tiny_model("olmoe")
        own = [router_rows(loaded, layer).detach().clone() for layer in moe_layers(loaded)]

        def fail() -> None:
            with rounded_routers(loaded, 2) as largest:
                assert largest > 0
                assert not torch.equal(router_rows(loaded, moe_layers(loaded)[0]), own[0])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        for layer, before in zip(moe_layers(loaded), own, strict=True):
            assert torch.equal(router_rows(loaded, layer), before)


def test_path_names_the_experts_that_were_called():
    loaded = tiny_model("qwen3_moe")
    result = ask("routing_path", loaded, position=3, layer=2)
    seen = trace(loaded, PROMPT.text)
    assert sorted(result.frames["main"]["layer"].unique()) == [0, 2]
    path = result.frames["path"]
    for place, layer in enumerate(seen.layers):
        rows = path[path["layer"] == layer]
        assert sorted(rows["expert"]) == sorted(seen.experts_LTK[place, 3].tolist())
        assert rows["weight"].is_monotonic_decreasing
        best = seen.experts_LTK[place, 3, seen.weights_LTK[place, 3].argmax()]
        assert rows["expert"].iloc[0] == best
    with pytest.raises(BadInput, match="position 400"):
        ask("routing_path", loaded, position=400)
    with pytest.raises(BadInput, match=r"layer 1 routes nothing; its MoE layers are 0, 2"):
        ask("routing_path", loaded, layer=1)


def test_a_super_expert_is_found_and_its_list_is_taken_by_prune_experts(tmp_path: Path, labelled: str):
    loaded = open_model(ModelRef(str(tiny_folder("olmoe", tmp_path / "own"))))
    layer = moe_layers(loaded)[0]
    loaded.model.get_submodule(layer.experts).down_proj.data[2] *= 1000
    result = ask("special_experts", loaded, data=labelled, max_tokens=512)
    cells = result.frames["main"]
    assert cells[cells["kind"].str.contains("super")][["layer", "expert"]].to_numpy().tolist() == [[0, 2]]
    protect = result.frames["protect"]["protect"].iloc[0]
    assert 2 in read_pairs(protect, moe_layers(loaded))[0]
    assert any(protect in note for note in result.notes)


def test_a_labelled_file_of_ones_own_is_read_by_domain(labelled: str):
    result = ask("expert_domains", tiny_model("olmoe"), data=labelled, max_tokens=1024, permutations=19)
    assert set(result.frames["divergence"]["domain"]) == {"prose", "code"}
    assert result.frames["layers"]["nmi"].max() > 0
    shares = result.frames["domains"].groupby("domain")["share"].sum()
    assert shares.to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("probe", ["expert_load", "dead_experts", "expert_coactivation", "expert_flow"])
def test_a_prompt_alone_is_counted_without_intervals_and_says_so(probe: str):
    result = ask(probe, tiny_model("olmoe"), text="")
    assert "One text says nothing about others" in result.notes[0]
    assert all(metric.low is None for metric in result.metrics)


@pytest.mark.parametrize(
    ("probe", "settings", "said"),
    [
        ("expert_load", {"layer": 9}, "layer 9 routes nothing"),
        ("expert_vocabulary", {"expert": 77}, "expert 77 does not exist"),
        ("expert_vocabulary", {"min_count": 900}, "no token is seen 900 times"),
        ("expert_load", {"text": "nonsense"}, "give pydoc"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(probe: str, settings: dict[str, Any], said: str, text: str):
    with pytest.raises(BadInput, match=said):
        ask(probe, tiny_model("olmoe"), **({"text": text, "max_tokens": 128} | settings))
