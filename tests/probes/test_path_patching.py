import pytest
import torch

from core.errors import BadInput
from core.models.open import open_model
from core.probes import path_patching as module
from core.probes._direct_path import hooked_path_logits, sent
from core.probes._recording import record
from core.probes.path_patching import PathPatchingSettings, path_patching
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.induction import induction_model
from tests.tiny import DECODERS, tiny_folder, tiny_model

CLEAN = "a b c d e f g h i j k l m n o p q r"
CORRUPTED = "a b c d X f g h i j k l m n o p q X"
INDUCTION = ("@ a b c d e a b c d", "@ a b c f e a b c d")


def run(loaded, clean=CLEAN, **settings):
    parsed = PathPatchingSettings(**{"corrupted": CORRUPTED, "target": "a", "distractor": "z", **settings})
    return path_patching(loaded, Prompt(clean), silent, parsed)


def by_hooks(loaded, receiver, senders) -> list[float]:
    """The metric of every path by whole forwards in which all else is held."""
    ids = [torch.tensor([loaded.tokenizer(text)["input_ids"]]) for text in (CLEAN, CORRUPTED)]
    a, z = (loaded.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "az")
    with torch.inference_mode():
        nodes = ("z", "attention_out", "mlp_out")
        source, base = (record(loaded, {"input_ids": tensor}, nodes) for tensor in ids)
        found = []
        for sender in senders:
            logits = hooked_path_logits(loaded, {"input_ids": ids[1]}, source, base, sender, receiver)
            found.append(float(logits[a] - logits[z]))
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_every_direct_effect_is_the_held_forward(family):
    loaded = tiny_model(family)
    result = run(loaded)
    senders = [(layer, head) for layer in range(3) for head in range(loaded.anatomy.n_heads)]
    assert result.frames["main"]["metric"].tolist() == pytest.approx(
        by_hooks(loaded, None, senders), abs=1e-4
    )
    assert result.frames["main"]["effect"].abs().max() > 0.01


@pytest.mark.parametrize("receiver", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "qwen3_moe"])
def test_every_path_into_a_head_is_the_held_forward(family, receiver):
    loaded = tiny_model(family)
    result = run(loaded, receiver=receiver, receiver_layer=2, receiver_head=3)
    head = 3 if receiver == "q" else loaded.anatomy.kv_head(3)
    senders = [(layer, index) for layer in range(2) for index in range(loaded.anatomy.n_heads)]
    expected = by_hooks(loaded, (2, receiver, head), senders)
    assert result.frames["main"]["metric"].tolist() == pytest.approx(expected, abs=1e-4)
    assert result.provenance.exactness_gap < 1e-4


def test_float64_is_exact_to_1e9(tmp_path):
    loaded = open_model(ModelRef(str(tiny_folder("gpt_neox", tmp_path))))
    loaded.model.double()
    for receiver in ("logits", "q", "v"):
        result = run(loaded, receiver=receiver, receiver_layer=2, receiver_head=1)
        assert result.provenance.exactness_gap < 1e-9


def test_what_a_sender_changes_sums_over_heads_to_the_attention_output():
    loaded = tiny_model("llama")
    ids = [torch.tensor([loaded.tokenizer(text)["input_ids"]]) for text in (CLEAN, CORRUPTED)]
    with torch.inference_mode():
        source, base = (record(loaded, {"input_ids": tensor}, ("z", "attention_out")) for tensor in ids)
        parts = [sent(loaded, source, base, (1, head)) for head in range(loaded.anatomy.n_heads)]
    whole = source.at("attention_out", 1) - base.at("attention_out", 1)
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-4)


def test_the_previous_token_head_tells_the_induction_head_by_its_key_alone():
    loaded = induction_model(40.0)
    clean, corrupted = INDUCTION
    effects = {}
    for receiver in ("q", "k", "v"):
        result = run(
            loaded, clean, corrupted=corrupted, target="e", distractor="f", receiver=receiver, receiver_layer=1,
            receiver_head=0,
        )  # fmt: skip
        effects[receiver] = result.frames["main"].set_index(["layer", "head"])["effect"]
    assert effects["k"][0, 0] == pytest.approx(1.0, abs=1e-4)
    assert effects["q"][0, 0] == pytest.approx(0.0, abs=1e-5)
    assert effects["v"][0, 0] == pytest.approx(0.0, abs=1e-5)
    assert effects["k"][0, 1] == pytest.approx(0.0, abs=1e-6)  # the dead head


def test_a_planted_fault_is_seen(monkeypatch):
    """Every change lands one position late: the printed gap shows it."""
    loaded = tiny_model("gpt2")
    settings = {"receiver": "logits"}
    assert run(loaded, **settings).provenance.exactness_gap < 1e-4
    monkeypatch.setattr(module, "sent", lambda *args: sent(*args).roll(1, 0))
    assert run(loaded, **settings).provenance.exactness_gap > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"receiver": "q", "receiver_layer": 0}, "at least 1"),
        ({"receiver": "q", "receiver_layer": 9}, "receiver_layer 9 does not exist"),
        ({"receiver": "q", "receiver_layer": 1, "sender_layer": 2, "sender_head": 0}, "layers run in order"),
        ({"sender_head": 99}, "sender_head 99 does not exist"),
        ({"corrupted": CLEAN}, "the same tokens"),
    ],
)
def test_bad_input_is_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        run(tiny_model("llama"), **settings)


def test_one_pair_is_one_row():
    result = run(
        tiny_model("llama"), receiver="v", receiver_layer=2, receiver_head=0, sender_layer=1, sender_head=2
    )
    assert len(result.frames["main"]) == 1


@pytest.mark.slow
def test_smollm2_paths_are_exact():
    loaded = open_model(ModelRef("demo:smollm2"))
    method = get("probe", "path_patching")
    for example in method.examples:
        result = method.run(loaded, example.prompt, silent, method.parse(dict(example.settings)))
        assert result.provenance.exactness_gap < 1e-4
        assert abs(result.metrics[2].value) > 0.05
