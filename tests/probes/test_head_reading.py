"""A head's QK and OV reading: identity 13, brute force over whole matrices, and a model whose circuits are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes import _head_circuit as circuit
from core.probes._head_on_prompt import observe
from core.probes._tokens import encode
from core.probes.head_reading import HeadReadingSettings, head_reading
from core.types import ModelRef, Prompt, Result, silent
from tests.induction import induction_model, repeated_prompt
from tests.references.slow_heads import (
    composition_by_hand,
    cut_value,
    unembedding_directions,
    write_of,
)
from tests.tiny import DECODERS, tiny_folder, tiny_model

PROMPT = Prompt("John gave Mary a drink, and John gave Mary a transformer that reads one two three")


def read(loaded: LoadedModel, **settings: object) -> Result:
    return head_reading(loaded, PROMPT, silent, HeadReadingSettings.model_validate(settings))


@pytest.mark.parametrize("family", DECODERS)
def test_rebuilt_scores_are_the_models_own(family: str) -> None:
    loaded = tiny_model(family)
    for layer in range(loaded.anatomy.n_layers):
        result = read(loaded, layer=layer, head=1)
        assert result.provenance.exactness_gap == pytest.approx(0, abs=5e-6)
        assert all(not frame.isna().any().any() for frame in result.frames.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "opt"])
def test_rebuilt_scores_in_float64(family: str, tmp_path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    loaded.model.double()
    with torch.inference_mode():
        seen = observe(loaded, encode(loaded, PROMPT), layer=1, head=2, source="stream")
    # Softmax is float32 in these models, whatever the weights: the sum of heads is only as exact as it is.
    assert seen.scores_gap == pytest.approx(0, abs=1e-12)
    assert seen.heads_gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "mistral"])
def test_a_wrong_key_value_grouping_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model(family)
    monkeypatch.setattr(Anatomy, "kv_head", lambda self, head: (head + 1) % self.n_kv_heads)
    assert read(loaded, layer=1).provenance.exactness_gap > 0.1


def test_a_wrong_rotation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = circuit._rotated
    monkeypatch.setattr(circuit, "_rotated", lambda x, cos, sin: rotated(x, cos.roll(1, -1), sin.roll(1, -1)))
    assert read(tiny_model("llama"), layer=1).provenance.exactness_gap > 1e-3


def test_a_dropped_softcap_or_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("gemma2")
    for change in ({"attention_softcap": 2.0},):
        other = dataclasses.replace(loaded, anatomy=dataclasses.replace(loaded.anatomy, **change))
        assert read(other, layer=1).provenance.exactness_gap > 1e-3
    monkeypatch.setattr(loaded.model.model.layers[1].self_attn, "scaling", 1.0)
    # The model itself now uses another scale; the rebuilt scores follow it, so they still agree.
    assert read(loaded, layer=1).provenance.exactness_gap < 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_head_writes_is_its_direct_effect_on_the_logits(family: str) -> None:
    """Σ weight · logit over sources is the head's own output through frozen norms and unembedding, by brute force."""
    loaded = tiny_model(family)
    model, anatomy = loaded.model, loaded.anatomy
    layer, head = 1, 2
    ids = encode(loaded, PROMPT).ids
    result = read(loaded, layer=layer, head=head, top_k=10)
    block = anatomy.blocks[layer]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda m, args, output, name=name: seen.update(
                {name: output if torch.is_tensor(output) else output[0]}
            )
        )
        for name, path in (("v", block.v), ("o", block.o), ("end", anatomy.blocks[-1].path))
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        written = write_of(loaded, block, cut_value(loaded, seen["v"], head), head)[0]
        if anatomy.norm_place == "sandwich":
            norm = model.get_submodule(block.attention_write)
            fed = seen["o"].reshape(-1, anatomy.d_model)[-1]
            written = written * (norm(fed) / fed).double()
        end = seen["end"].reshape(-1, anatomy.d_model)[-1].double()
        final = model.get_submodule(anatomy.final_norm)
        centred = end - end.mean() if isinstance(final, torch.nn.LayerNorm) else end
        sigma = (
            centred.square().mean() + getattr(final, "eps", getattr(final, "variance_epsilon", 0))
        ).sqrt()
        logits = written @ unembedding_directions(loaded).T / sigma
        logits = logits / getattr(model.config, "logits_scaling", 1.0)  # Granite
    logits = logits - logits.mean(-1, keepdim=True)
    sources = result.frames["sources"].set_index("source").sort_index()
    own = logits[torch.arange(len(ids)), torch.tensor(ids)]
    assert sources["own_logit"].to_numpy() == pytest.approx(own.numpy(), rel=1e-3, abs=2e-4)
    assert sources["promoted_logit"].to_numpy() == pytest.approx(logits.max(-1).values.numpy(), rel=1e-3)
    assert sources["suppressed_logit"].to_numpy() == pytest.approx(logits.min(-1).values.numpy(), rel=1e-3)
    assert sources["own_rank"].to_numpy() == pytest.approx((logits > own[:, None]).sum(-1).numpy() + 1, abs=1)
    promoted = result.frames["promoted"].query("source == 3")["logit"].to_numpy()
    assert promoted == pytest.approx(logits[3].topk(10).values.numpy(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_composition_equals_whole_matrices(family: str) -> None:
    loaded = tiny_model(family)
    found = read(loaded, layer=2, head=3).frames["composition_map"].set_index(["layer", "head"])
    for earlier in ((0, 0), (1, 2)):
        expected = composition_by_hand(loaded, earlier, (2, 3))
        row = found.loc[earlier]
        assert {part: row[f"{part}_composition"] for part in "qkv"} == pytest.approx(expected, rel=1e-4)


def test_the_induction_head_reads_as_one() -> None:
    length = 5
    prompt = repeated_prompt(length)
    result = head_reading(induction_model(40.0), prompt, silent, HeadReadingSettings(layer=1, head=0))
    sources = result.frames["sources"]
    # Its write is one ±1 pair: logit 8.71697 on its own token, 0 elsewhere, above a mean of 1/17 of it.
    assert sources["own_logit"].to_numpy() == pytest.approx(2 / math.sqrt(8 / 152 + 1e-5) * 16 / 17, rel=1e-5)
    assert (sources["own_rank"] == 1).all()
    assert (sources["promoted"] == sources["source_token"]).all()
    assert sources.iloc[0]["source"] == length + 1, (
        "the last token's earlier copy is followed by this position"
    )
    pairs = result.frames["pairs"].head(length)
    assert (pairs["query"] - pairs["key"]).tolist() == [length - 1] * length
    assert pairs["score"].to_numpy() == pytest.approx(40, rel=1e-4)
    composed = result.frames["composition"].iloc[0]
    assert composed["name"] == "L0H0", "it reads what the previous-token head wrote"
    assert composed["k_composition"] == pytest.approx(1 / math.sqrt(17), rel=1e-5)
    assert composed["q_composition"] == pytest.approx(0, abs=1e-9)
    metrics = {metric.name: metric.value for metric in result.metrics}
    assert metrics["ov_copying"] == pytest.approx(1)


def test_the_embedding_alone_is_read_without_what_was_added() -> None:
    loaded = induction_model(40.0)
    settings = HeadReadingSettings(layer=0, head=0, source="embedding")
    result = head_reading(loaded, repeated_prompt(4), silent, settings)
    assert result.frames["sources"]["promoted_logit"].to_numpy() == pytest.approx(0, abs=1e-6), (
        "it writes where the unembedding does not look"
    )
    assert "composition" not in result.frames


def test_pairs_leave_the_first_position_out_only_when_asked() -> None:
    loaded = tiny_model("llama")
    assert (read(loaded).frames["pairs"]["key"] > 0).all()
    with_first = read(loaded, skip_first=False, pairs=200).frames["pairs"]
    assert (with_first["key"] == 0).any()
    assert (with_first["key"] <= with_first["query"]).all()
    assert np.all(np.diff(with_first["above_row_mean"]) <= 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer": 3}, "layer 3 does not exist"),
        ({"head": 4}, "head 4 does not exist"),
        ({"query": 400}, "query 400 does not exist"),
    ],
)
def test_what_does_not_exist_is_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read(tiny_model("llama"), **settings)
