import math

import pytest
import torch

from core.errors import BadInput, Cancelled
from core.models.open import open_model
from core.probes import _replay, _replay_pass
from core.probes._patch_grid import PER_HEAD, node_of, replay_cost
from core.probes._recording import record
from core.probes._replay import Patch, last_residuals
from core.probes.activation_patching import ActivationPatchingSettings, activation_patching
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.induction import induction_model
from tests.references.slow_patching import slow_patched_logits, slow_states
from tests.tiny import DECODERS, tiny_folder, tiny_model

CLEAN = "a b c d e f g h i j k l m n o p q r"
CORRUPTED = "a b c d X f g h i j k l m n o p q X"
WORDS = {"target": "a", "distractor": "z"}


def run(loaded, clean=CLEAN, corrupted=CORRUPTED, progress=silent, **settings):
    parsed = ActivationPatchingSettings(corrupted=corrupted, **{**WORDS, **settings})
    return activation_patching(loaded, Prompt(clean), progress, parsed)


def brute_force(loaded, *, node: str, direction: str = "denoising", metric=None) -> list[float]:
    """The metric of every cell by one whole hooked forward each, in the frame's order."""
    ids = [loaded.tokenizer(text)["input_ids"] for text in (CLEAN, CORRUPTED)]
    source, base = ids if direction == "denoising" else ids[::-1]
    states = slow_states(loaded, source)
    a, b = (loaded.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS.values())
    metric = metric or (lambda logits: float(logits[a] - logits[b]))
    anatomy, n, width = loaded.anatomy, len(base), loaded.anatomy.head_dim
    values = []
    for layer in range(anatomy.n_layers):
        if node in PER_HEAD:
            heads = anatomy.n_kv_heads if node in "kv" else anatomy.n_heads
            cells = [(list(range(n)), head) for head in range(heads)]
        else:
            cells = [([position], None) for position in range(n)]
        for positions, head in cells:
            value = states[node_of(node)][layer][positions]
            if head is not None:
                value = value[:, head * width : (head + 1) * width]
            logits = slow_patched_logits(
                loaded, base, node=node_of(node), layer=layer, positions=positions, value=value, head=head
            )
            values.append(metric(logits[-1]))
    return values


@pytest.mark.parametrize("node", ["residual", "attention_out", "mlp_out", "head", "q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "olmoe"])
def test_every_cell_is_the_brute_force_value(family: str, node: str):
    loaded = tiny_model(family)
    result = run(loaded, node=node)
    assert result.frame["metric"].tolist() == pytest.approx(brute_force(loaded, node=node), abs=1e-4)
    assert result.frame["effect"].abs().max() > 0.01  # the comparison is of something
    assert result.provenance.exactness_gap < 1e-4


def test_noising_patches_the_clean_run():
    loaded = tiny_model("qwen3")
    result = run(loaded, direction="noising")
    frame = result.frame
    expected = brute_force(loaded, node="residual", direction="noising")
    assert frame["metric"].tolist() == pytest.approx(expected, abs=1e-4)
    assert frame["effect"].tolist() == pytest.approx((1 - frame["recovered"]).tolist(), abs=1e-6)


def test_probability_and_kl_are_measured_on_the_whole_vocabulary():
    loaded = tiny_model("mistral")
    clean_ids = torch.tensor([loaded.tokenizer(CLEAN)["input_ids"]])
    with torch.inference_mode():
        log_p = torch.log_softmax(loaded.model(clean_ids).logits[0, -1].double(), -1)
    target = int(log_p.argmax())
    kl = brute_force(
        loaded,
        node="residual",
        metric=lambda z: float((log_p.exp() * (log_p - torch.log_softmax(z.double(), -1))).sum()),
    )
    found = run(loaded, metric="kl", target="")
    assert found.frame["metric"].tolist() == pytest.approx(kl, abs=1e-4)
    assert found.metrics[0].value == pytest.approx(0, abs=1e-6)  # KL of the clean prompt to itself
    p = brute_force(loaded, node="residual", metric=lambda z: float(torch.softmax(z.double(), -1)[target]))
    found = run(loaded, metric="probability", target="")
    assert found.frame["metric"].tolist() == pytest.approx(p, abs=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_patching_all_positions_of_one_layer_recovers_everything(family: str):
    loaded = tiny_model(family)
    ids = [torch.tensor([loaded.tokenizer(text)["input_ids"]]) for text in (CLEAN, CORRUPTED)]
    with torch.inference_mode():
        clean, corrupted = (record(loaded, {"input_ids": tensor}) for tensor in ids)
        rows = [(Patch(layer, "residual", 0, clean.at("residual", layer)),) for layer in range(4)]
        found = last_residuals(loaded, corrupted, rows)
        untouched = [(Patch(layer, "residual", 0, corrupted.at("residual", layer)),) for layer in range(4)]
        same = last_residuals(loaded, corrupted, untouched)
    torch.testing.assert_close(found, clean.at("residual", 3)[-1].expand(4, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(same, corrupted.at("residual", 3)[-1].expand(4, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_float64_is_exact_to_1e9(family: str, tmp_path):
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    loaded.model.double()
    for node in ("residual", "head"):
        result = run(loaded, node=node)
        assert result.provenance.exactness_gap < 1e-9
        ids = [loaded.tokenizer(text)["input_ids"] for text in (CLEAN, CORRUPTED)]
        assert result.metrics[0].value == pytest.approx(plain_metric(loaded, ids[0]), abs=1e-9)
        assert result.frame["metric"].tolist() == pytest.approx(brute_force(loaded, node=node), abs=1e-9)


def plain_metric(loaded, ids: list[int]) -> float:
    a, b = (loaded.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS.values())
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits[0, -1]
    return float(logits[a] - logits[b])


def test_cells_before_the_first_difference_have_no_effect():
    frame = run(tiny_model("llama")).frame
    before = frame["position"] < frame.loc[frame["token"] != frame["corrupted_token"], "position"].min()
    assert before.any()
    assert (frame.loc[before, "effect"] == 0).all()


def test_the_induction_head_carries_all_and_dead_heads_nothing():
    clean, corrupted = "@ a b c d e a b c d", "@ a b c d f a b c d"
    result = run(induction_model(40.0), clean, corrupted, node="head", target="e", distractor="f")
    effect = result.frame.set_index(["layer", "head"])["effect"]
    assert effect[1, 0] == pytest.approx(1.0, abs=1e-5)
    assert effect[0, 1] == pytest.approx(0.0, abs=1e-6)
    assert effect[1, 1] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics[0].value == pytest.approx(2 / math.sqrt(8 / 152 + 1e-5), abs=1e-4)
    assert result.frames["ranked"].loc[0, ["layer", "head"]].tolist() == [1, 0]


def test_the_values_alone_move_the_token_in_the_induction_model():
    clean, corrupted = "@ a b c d e a b c d", "@ a b c d f a b c d"
    found = {
        node: run(induction_model(40.0), clean, corrupted, node=node, target="e", distractor="f")
        for node in ("q", "k", "v")
    }
    effect = {
        node: result.frame.set_index(["layer", "head"])["effect"][1, 0] for node, result in found.items()
    }
    assert effect["v"] == pytest.approx(1.0, abs=1e-5)  # what is written differs
    assert effect["q"] == pytest.approx(0.0, abs=1e-5)  # where it looks does not
    assert effect["k"] == pytest.approx(0.0, abs=1e-5)


def test_small_batches_give_the_same_numbers(monkeypatch):
    loaded = tiny_model("llama")
    expected = run(loaded, node="head").frame["metric"]
    again = run(loaded, node="head").frame["metric"]
    assert again.tolist() == expected.tolist()
    monkeypatch.setattr(_replay, "TOKENS_AT_ONCE", 1)
    assert run(loaded, node="head").frame["metric"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_cancelled_run_leaves_the_model_as_it_was():
    loaded = tiny_model("llama")
    kernel = loaded.model.config._attn_implementation
    ids = torch.tensor([loaded.tokenizer(CLEAN)["input_ids"]])
    before = loaded.model(ids).logits

    def cancel(done, total, message):
        if done > 0:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        run(loaded, progress=cancel)
    assert loaded.model.config._attn_implementation == kernel
    assert torch.equal(loaded.model(ids).logits, before)


def planted(fault: str, monkeypatch) -> None:
    """Break the replay the way it would be written wrong."""
    make = _replay_pass.at_positions
    attend = _replay_pass.ReplayPass.attend
    by_row = _replay_pass._by_row
    if fault == "positions off by one":
        monkeypatch.setattr(_replay_pass, "at_positions", lambda v, p: make(v, (p - 1).clamp(min=0)))
    elif fault == "sliding window forgotten":

        def no_window(self, layer, kernel, module, q, k, v, mask, arguments):
            full = torch.full_like(self._base.masks[layer], torch.finfo(q.dtype).min).triu(1)
            object.__setattr__(self._base, "masks", (full,) * len(self._base.masks))
            return attend(self, layer, kernel, module, q, k, v, mask, arguments)

        monkeypatch.setattr(_replay_pass.ReplayPass, "attend", no_window)
    elif fault == "key heads swapped":
        monkeypatch.setattr(
            _replay_pass, "_by_row", lambda x, n: by_row(x.flip(0) if x.shape[0] == 2 else x, n)
        )
    elif fault == "queries changed too late":
        write = _replay_pass.ReplayPass._write
        monkeypatch.setattr(
            _replay_pass.ReplayPass,
            "_write",
            lambda self, layer, node, state, **kw: (
                None if node == "q" else write(self, layer, node, state, **kw)
            ),
        )


@pytest.mark.parametrize(
    ("fault", "family", "node"),
    [
        ("positions off by one", "llama", "residual"),
        ("sliding window forgotten", "gemma2", "residual"),
        ("key heads swapped", "llama", "residual"),
        ("queries changed too late", "llama", "q"),
    ],
)
def test_a_planted_fault_is_seen_by_brute_force_and_by_the_printed_gap(fault, family, node, monkeypatch):
    loaded = tiny_model(family)
    expected = brute_force(loaded, node=node)
    assert run(loaded, node=node).frame["metric"].tolist() == pytest.approx(expected, abs=1e-4)
    planted(fault, monkeypatch)
    broken = run(loaded, node=node)
    assert broken.frame["metric"].tolist() != pytest.approx(expected, abs=1e-3)
    if node == "residual":
        assert broken.provenance.exactness_gap > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"corrupted": ""}, "no corrupted prompt"),
        ({"corrupted": CLEAN}, "the same tokens"),
        ({"corrupted": CORRUPTED + " s t"}, "part at token"),
        ({"distractor": "a"}, "both 'a'"),
        ({"target": "xyzxyz"}, "tokens"),
        ({"node": "head", "position": 999}, "position 999 does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(settings, said):
    with pytest.raises(BadInput, match=said):
        run(tiny_model("llama"), **{"corrupted": CORRUPTED, **settings})


def test_a_gap_of_nothing_is_refused():
    clean, corrupted = "@ a b c d e a b c d", "@ a b c g e a b c d"
    with pytest.raises(BadInput, match="nothing to recover"):
        run(induction_model(40.0), clean, corrupted, target="o", distractor="p")


def test_misaligned_prompts_name_both_tokenizations():
    with pytest.raises(BadInput, match=r"clean has \d+ tokens \(.*\), corrupted \d+ tokens|corrupted \d+ \("):
        run(tiny_model("llama"), corrupted=CORRUPTED + " s")


def test_an_encoder_is_refused_by_its_needs():
    method = get("probe", "activation_patching")
    with pytest.raises(BadInput, match="needs decoder"):
        method.refuse_if(tiny_model("bert").missing_needs(method.needs), "this model")


def test_every_example_parses_and_the_cost_is_told():
    method = get("probe", "activation_patching")
    anatomy = tiny_model("llama").anatomy
    for example in method.examples:
        settings = method.parse(dict(example.settings))
        assert replay_cost(anatomy, 16, settings).forwards > 5


@pytest.mark.slow
def test_smollm2_does_each_example_and_the_replay_is_exact():
    loaded = open_model(ModelRef("demo:smollm2"))
    method = get("probe", "activation_patching")
    for example in method.examples:
        result = method.run(loaded, example.prompt, silent, method.parse(dict(example.settings)))
        clean, corrupted, strongest = (metric.value for metric in result.metrics)
        assert clean > 1 > -1 > corrupted, example.title  # it really does the task, both ways
        assert abs(strongest) > 0.5, example.title
        assert result.provenance.exactness_gap < 1e-4
