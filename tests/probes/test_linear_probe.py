"""Linear probes on models: texts read as if alone, planted labels found at their layer, controls that control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.capture import capture_residual
from core.errors import BadInput, SlimscopeError
from core.models.open import open_model
from core.probes._random_twin import random_twin
from core.probes._read_texts import read_texts
from core.probes._tokens import encode
from core.probes.linear_probe import LinearProbeSettings, linear_probe
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import FAMILIES, LAYERS, tiny_folder, tiny_model

PROMPT = Prompt("The capital of France")
TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]
TEXTS = [
    "The capital of France is Paris",
    "John gave a drink",
    "one two three",
    "seven",
    "print the index of Rome",
]
WORDS = ["France", "Italy", "Paris", "Rome", "John", "Mary", "store", "drink", "water", "degrees"]
WORDS += ["index", "token", "text", "stream", "capital"]


def labelled_file(tmp_path, rows):
    path = tmp_path / "set.tsv"
    path.write_text("\n".join(["text\tlabel\tgroup", *("\t".join(row) for row in rows)]), encoding="utf-8")
    return str(path)


def planted_rows():
    """The label is which of two words stands two tokens before the end; the group is the last word."""
    return [
        (f"{start} {middle} the {word}", label, word)
        for word in WORDS
        for middle, label in (("one", "a"), ("seven", "b"))
        for start in ("the", "of")
    ]


@pytest.mark.parametrize("position", ["last", "mean", "first"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_texts_in_batches_are_texts_alone(family, position):
    """Identity 23; also against each text's own captured stream."""
    loaded = tiny_model(family)
    together = read_texts(loaded, TEXTS, position=position, progress=silent, message="")
    for index, text in enumerate(TEXTS):
        encoded = encode(loaded, Prompt(text))
        with torch.inference_mode(), capture_residual(loaded) as residual:
            loaded.model(**encoded.inputs)
        ordinary = [p for p, n in enumerate(encoded.n_bytes) if n]
        averaged = ordinary[1:] or ordinary if loaded.family == "decoder" else ordinary
        rows = {"last": ordinary[-1:], "first": [0], "mean": averaged}[position]
        for layer, stream in enumerate(residual.values()):
            alone = stream[0, rows].mean(0)
            assert together[layer, index].numpy() == pytest.approx(
                alone.numpy(), abs=1e-5 * float(alone.abs().max() + 1)
            )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_word_before_the_last_is_read_after_attention_and_not_before(family, tmp_path):
    """At the embedding of the last token the label is not there; attention may bring it."""
    settings = LinearProbeSettings(data=labelled_file(tmp_path, planted_rows()), twin="none", l2=0.01)
    frame = linear_probe(tiny_model(family), PROMPT, silent, settings).frame
    assert frame["accuracy"].iloc[0] == pytest.approx(0.5, abs=0.05)
    assert frame["accuracy"].iloc[1:].max() > 0.8  # a random encoder brings it in part
    assert (frame["low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["high"]).all()
    assert frame["majority"].iloc[0] == 0.5
    assert frame["selectivity"].to_numpy() == pytest.approx(
        (frame["accuracy"] - frame["control_accuracy"]).to_numpy()
    )


def test_shuffled_labels_stay_at_chance(tmp_path):
    """Identity 16, on real vectors: chance ± 3 σ, and no flag."""
    settings = LinearProbeSettings(data=labelled_file(tmp_path, planted_rows()), twin="none")
    result = linear_probe(tiny_model("llama"), PROMPT, silent, settings)
    sigma = 0.5 / math.sqrt(len(planted_rows()))
    assert (result.frame["shuffled_accuracy"] - 0.5).abs().max() < 3 * sigma
    assert result.flags == ()


def test_groups_can_be_learned_by_heart_only_where_they_are_met(tmp_path):
    """A label that is the group's own, at random: the control task learns such labels, new groups cannot be told."""
    generator = np.random.default_rng(0)
    labels = dict(zip(WORDS, generator.permutation(["a", "b"] * 8)[: len(WORDS)].tolist(), strict=True))
    rows = [
        (f"{start} {word}", labels[word], word) for word in WORDS for start in ("the", "of", "one", "two")
    ]
    settings = LinearProbeSettings(data=labelled_file(tmp_path, rows), twin="none", l2=0.01)
    frame = linear_probe(tiny_model("llama"), PROMPT, silent, settings).frame
    assert frame["control_accuracy"].iloc[0] == 1, "the embedding is the word"
    assert frame["control_accuracy"].min() > 0.75
    assert frame["accuracy"].max() < 0.75
    assert frame["selectivity"].max() < 0


def test_a_copy_of_the_model_gives_the_same_numbers(tmp_path):
    """Identity 16: retention 1.0."""
    settings = LinearProbeSettings(data=labelled_file(tmp_path, planted_rows()), twin="none")
    copy = open_model(ModelRef(str(tiny_folder("llama", tmp_path / "copy"))))
    ours = linear_probe(tiny_model("llama"), PROMPT, silent, settings).frame
    assert linear_probe(copy, PROMPT, silent, settings).frame.equals(ours)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_twin_is_random_seeded_and_leaves_the_world_as_it_was(family):
    loaded = tiny_model(family)
    state = torch.random.get_rng_state()
    with (
        random_twin(loaded, seed=1) as one,
        random_twin(loaded, seed=1) as same,
        random_twin(loaded, seed=2) as two,
    ):
        weights = [dict(twin.model.named_parameters()) for twin in (loaded, one, same, two)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.model is not loaded.model
    assert one.fingerprint != loaded.fingerprint
    assert not one.model.training
    assert weights[0].keys() == weights[1].keys()
    name = next(name for name, weight in weights[0].items() if weight.ndim == 2)
    assert torch.equal(weights[1][name], weights[2][name])
    assert not torch.equal(weights[1][name], weights[3][name])
    assert not torch.equal(weights[1][name], weights[0][name])


@pytest.mark.parametrize("classifier", ["logistic", "ridge"])
def test_the_prompt_is_read_at_every_layer_and_token(classifier, tmp_path):
    settings = LinearProbeSettings(
        data=labelled_file(tmp_path, planted_rows()), classifier=classifier, twin="none", layer=1, l2=0.01
    )
    loaded = tiny_model("llama")
    prompt = Prompt("the seven the Paris")
    result = linear_probe(loaded, prompt, silent, settings)
    reading = result.frames["prompt"]
    assert len(reading) == (LAYERS + 1) * encode(loaded, prompt).n_tokens
    assert reading["score"].between(0, 1).all()
    assert result.frames["tokens"]["layer"].eq(1).all()
    assert result.provenance.exactness_gap < 1e-6
    last = result.frames["tokens"].iloc[-1]
    assert last["answer"] == "b", "a text of the training set is read right"


def test_too_few_shared_groups_make_a_weak_control(tmp_path):
    rows = [
        (f"the {word} {start}", "ab"[i % 2], f"{word} {start}")
        for i, word in enumerate(WORDS)
        for start in ("one", "two")
    ]
    settings = LinearProbeSettings(data=labelled_file(tmp_path, rows), twin="none")
    result = linear_probe(tiny_model("llama"), PROMPT, silent, settings)
    assert "weak_control" in result.flags
    assert any("selectivity says little" in note for note in result.notes)


def test_bad_input_is_refused(tmp_path):
    loaded = tiny_model("llama")
    with pytest.raises(BadInput, match="layer 9 does not exist"):
        linear_probe(loaded, PROMPT, silent, LinearProbeSettings(layer=9))
    rows = [(text, "a", group) for text, _, group in planted_rows()]
    with pytest.raises(BadInput, match="two classes"):
        linear_probe(loaded, PROMPT, silent, LinearProbeSettings(data=labelled_file(tmp_path, rows)))
    long = [(f"{text} {'one ' * 400}", label, group) for text, label, group in planted_rows()]
    with pytest.raises(BadInput, match=r"text 1 .*context"):
        linear_probe(loaded, PROMPT, silent, LinearProbeSettings(data=labelled_file(tmp_path, long)))


def test_a_model_that_is_not_finite_is_refused(tmp_path):
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path / "broken"))))
    with torch.no_grad():
        loaded.model.get_submodule(loaded.anatomy.blocks[1].path).mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(SlimscopeError, match="not finite"):
        linear_probe(loaded, PROMPT, silent, LinearProbeSettings(twin="none"))


def test_the_cost_grows_with_the_twin():
    method = get("probe", "linear_probe")
    assert method.cost is not None
    anatomy = tiny_model("llama").anatomy
    with_twin = method.cost(anatomy, 10, method.parse({}))
    without = method.cost(anatomy, 10, method.parse({"twin": "none"}))
    assert with_twin.forwards > without.forwards > 100
    assert with_twin.extra_bytes > without.extra_bytes
