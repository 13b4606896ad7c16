"""Losses on a model's inside against known answers, slow references and what models say of themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.capture import capture
from core.distill.features.attention_relations import AttentionRelations
from core.distill.features.expert_outputs import ExpertOutputs
from core.distill.features.feature_match import FeatureMatch, feature_match
from core.distill.features.hidden_states import HiddenStates
from core.distill.features.reading import ReadAttention, reading
from core.distill.features.router_match import RouterMatch
from core.distill.layer_map import LayerMap
from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.routing.lens import routed
from tests.distill.features.pairs import alone, batch, gradients, matched, packed, pair, text, twin
from tests.references import slow_features
from tests.tiny import tiny_model

FAMILIES = ("llama", "gemma2", "gpt_neox", "bert", "qwen3_moe", "deepseek_v3", "llama4")
SAME = LayerMap.even(3, 3)


def everything(student: LoadedModel, teacher: LoadedModel, *, second: bool = False) -> FeatureMatch:
    """All losses that apply; ``second``: in their other forms."""
    moe = float(bool(teacher.anatomy.n_experts))
    found = feature_match(
        student, teacher, SAME, hidden_weight=1.0, relation_weight=float(teacher.anatomy.has_heads),
        router_weight=moe, expert_weight=moe, hidden_loss="squared" if second else "cosine",
        relations="qq_kk_vv" if second else "attention_and_value",
        expert_loss="each" if second and teacher.anatomy.model_type != "llama4_text" else "together",
    )  # fmt: skip
    assert found is not None
    return found


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(family: str, second: bool) -> None:
    teacher = tiny_model(family)
    student = twin(teacher)
    student.model.requires_grad_(True)
    found = matched(everything(student, teacher, second=second), batch())
    assert abs(found.loss.item()) < 1e-5
    assert all(float(g.abs().max()) < 1e-4 for g in gradients(student, found))
    further, _ = pair(family)
    far = matched(everything(further, teacher, second=second), batch())
    assert all(value > 1e-3 for value in far.parts.values()), "the losses can be other than 0"
    assert max(float(g.abs().max()) for g in gradients(further, far)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "bert", "mixtral"])
def test_packed_is_the_sum_of_each_text_alone_and_padding_counts_nothing(family: str) -> None:
    student, teacher = pair(family)
    match = everything(student, teacher)
    parts = [alone(text(40, 1)), alone(text(9, 2))]  # longer than Mistral's window
    one_by_one = [matched(match, part) for part in parts]
    together = matched(match, packed(parts, padding=4))
    assert together.n == sum(found.n for found in one_by_one) == 39 + 8
    for name, value in together.parts.items():
        assert value == pytest.approx(sum(found.parts[name] for found in one_by_one), rel=1e-4), name


def test_prompt_tokens_are_read_and_not_counted() -> None:
    student, teacher = pair("llama")
    ids = text(12, 3)
    whole = matched(everything(student, teacher), alone(ids))
    answer = matched(everything(student, teacher), alone(ids, prompt=8))
    assert (whole.n, answer.n) == (11, 4)
    assert all(0 < answer.parts[name] < whole.parts[name] for name in whole.parts)
    match = feature_match(student, teacher, SAME, count="tokens", hidden_weight=1.0)
    assert match is not None
    assert matched(match, alone(ids, prompt=8)).n == 12


@pytest.mark.parametrize("kind", ["squared", "cosine"])
def test_hidden_states_are_compared_as_written_out(kind: str) -> None:
    student, teacher = pair("gpt2")
    layers = LayerMap.listed("0, 1, 1", 3, 3)
    match = FeatureMatch(
        student, teacher, [(HiddenStates(student, teacher, layers, kind=kind, projection_TS=None), 2.0)],
        count="targets",
    )  # fmt: skip
    of = alone(text(8, 4))
    found = matched(match, of)
    states = []
    for loaded in (student, teacher):
        with torch.no_grad():
            output = loaded.model(of.ids_BP, output_hidden_states=True, use_cache=False)
        blocks = [b.path for b in loaded.anatomy.blocks]
        with capture(loaded.model, blocks) as values, torch.no_grad():
            loaded.model(of.ids_BP, use_cache=False)
        assert torch.equal(
            output.hidden_states[1], values[blocks[0]]
        )  # transformers' own, but the last is normed there
        states.append([values[path][0, :-1].double().numpy() for path in blocks])
    slow = np.mean(
        [slow_features.hidden_loss(states[1][t], states[0][s], kind) for s, t in ((0, 0), (1, 1), (2, 2))]
    )
    assert found.parts["hidden"] == pytest.approx(slow, rel=1e-4)
    assert found.loss.item() == pytest.approx(2 * slow, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bert"])
def test_the_attention_that_is_compared_is_the_one_the_model_has(family: str) -> None:
    """The model's own patterns (eager attention) are the oracle: masks, scaling, soft caps, grouped heads."""
    student, teacher = pair(family)
    loss = AttentionRelations(student, teacher, SAME, kind="attention_and_value")
    of = alone(text(20, 5))
    found = matched(FeatureMatch(student, teacher, [(loss, 1.0)], count="tokens"), of)
    patterns, values = [], []
    for loaded, read in ((teacher, loss.twin), (student, loss.read)):
        kernel = loaded.model.config._attn_implementation
        loaded.model.set_attn_implementation("eager")
        with (
            torch.no_grad(),
            capture(loaded.model, [read.path], item=1) as pattern,
            reading(loaded, [read]) as heads,
        ):
            loaded.model(**of.inputs(loaded.family))
        loaded.model.set_attn_implementation(kernel)
        patterns.append(pattern[read.path][0].double().numpy())
        values.append(heads[read].value[0].double().numpy())
    attention = sum(
        slow_features.kl(t, s)
        for t_PQ, s_PQ in zip(*patterns, strict=True)
        for t, s in zip(t_PQ, s_PQ, strict=True)
    ) / len(patterns[0])
    causal, window = teacher.family == "decoder", teacher.anatomy.windows[-1]
    assert window == (16 if family == "gemma2" else None)
    value = slow_features.relation_loss(*values, list(range(20)), causal=causal, window=window)
    assert found.parts["relations"] == pytest.approx(attention + value, rel=1e-3)


def test_relations_of_minilm_v2_are_those_written_out_and_need_no_equal_heads() -> None:
    student, teacher = pair("llama")[0], tiny_model("qwen3")  # heads of 32 and 64
    loss = AttentionRelations(student, teacher, SAME, kind="qq_kk_vv", relation_heads=4)
    of = alone(text(9, 6))
    found = matched(FeatureMatch(student, teacher, [(loss, 1.0)], count="tokens"), of)
    read = {}
    for loaded, which in ((teacher, loss.twin), (student, loss.read)):
        with torch.no_grad(), reading(loaded, [which]) as heads:
            loaded.model(**of.inputs("decoder"))
        read[loaded.anatomy.model_type] = heads[which]
    slow = 0.0
    for name in ("query", "key", "value"):
        cut = []
        for model_type in ("qwen3", "llama"):
            x_HPK = getattr(read[model_type], name)[0].double().numpy()
            side_by_side = np.concatenate(list(x_HPK), axis=1)
            cut.append(np.stack(np.split(side_by_side, 4, axis=1)))
        slow += slow_features.relation_loss(*cut, list(range(9)), causal=True)
    assert found.parts["relations"] == pytest.approx(slow, rel=1e-4)
    assert (
        AttentionRelations(student, teacher, SAME, kind="qq_kk_vv").n_relation_heads == 2
    )  # the teacher's k/v heads


def test_routers_are_compared_over_all_experts_by_their_own_rule() -> None:
    for family, by_sigmoid in (("mixtral", False), ("deepseek_v3", True)):
        student, teacher = pair(family)
        of = alone(text(6, 7))
        match = FeatureMatch(student, teacher, [(RouterMatch(student, teacher, SAME), 1.0)], count="tokens")
        found = matched(match, of)
        logits: list[list[np.ndarray]] = []
        for loaded in (teacher, student):
            seen: list[np.ndarray] = []
            with (
                torch.no_grad(),
                routed(loaded, lambda r, seen=seen: seen.append(r.logits_TE.double().numpy())),
            ):
                loaded.model(of.ids_BP)
            logits.append(seen)
        slow = []
        for t_TE, s_TE in zip(*logits, strict=True):
            if by_sigmoid:
                t, s = (1 / (1 + np.exp(-z)) for z in (t_TE, s_TE))
                slow.append(float((t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))).sum()))
            else:
                rows = zip(t_TE, s_TE, strict=True)
                slow.append(
                    sum(slow_features.kl(slow_features.softmax(t), slow_features.softmax(s)) for t, s in rows)
                )
        assert found.parts["routers"] == pytest.approx(np.mean(slow), rel=1e-4)


def test_each_expert_is_compared_on_the_tokens_of_its_twin() -> None:
    """The routing lens, which reads experts otherwise, is the oracle."""
    teacher = tiny_model("mixtral")
    student = twin(teacher)  # but for the experts of the last block, so that both models route alike
    of = alone(text(6, 8))
    loss = ExpertOutputs(student, teacher, SAME, kind="each", projection_TS=None)
    last = student.model.get_submodule(student.anatomy.blocks[-1].experts)
    with torch.no_grad():
        last.down_proj.add_(
            0.05 * torch.randn(last.down_proj.shape, generator=torch.Generator().manual_seed(1))
        )
    found = matched(FeatureMatch(student, teacher, [(loss, 1.0)], count="tokens"), of)
    seen: list[list] = [[], []]
    for place, loaded in enumerate((teacher, student)):
        with torch.no_grad(), routed(loaded, seen[place].append, outputs=True):
            loaded.model(of.ids_BP)
    theirs, ours = seen[0][-1], seen[1][-1]
    assert torch.equal(theirs.experts_TK, ours.experts_TK)
    error_TK = (ours.outputs_TKD - theirs.outputs_TKD).square().sum(-1) / theirs.outputs_TKD.square().sum(-1)
    share_TK = theirs.weights_TK / theirs.weights_TK.sum(-1, keepdim=True)
    assert found.parts["experts"] == pytest.approx(float((share_TK * error_TK).sum()) / 3, rel=1e-4)
    assert found.parts["experts"] > 0.01


def test_reading_changes_nothing_and_leaves_nothing_behind() -> None:
    loaded = tiny_model("gemma2")
    attention = loaded.model.get_submodule(loaded.anatomy.blocks[1].attention)
    config, of = attention.config, batch()
    with torch.no_grad():
        before = loaded.model(**of.inputs("decoder")).logits
        with reading(loaded, [ReadAttention(loaded.anatomy.blocks[1].attention)]):
            assert torch.equal(before, loaded.model(**of.inputs("decoder")).logits)
        with (
            pytest.raises(RuntimeError, match="in the middle"),
            reading(loaded, [ReadAttention(loaded.anatomy.blocks[1].attention)]),
        ):
            raise RuntimeError("in the middle")
    assert attention.config is config


def test_recomputed_activations_give_the_same_gradient() -> None:
    student, teacher = pair("llama")
    match = everything(student, teacher, second=True)
    plain = gradients(student, matched(match, batch()))
    student.model.train()
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(student, matched(match, batch()))
    assert len(plain) == len(again) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_what_cannot_be_matched_is_refused_with_what_to_do() -> None:
    llama, mixtral, dense = tiny_model("llama"), tiny_model("mixtral"), twin(tiny_model("llama"))
    for settings, models, message in (
        ({"router_weight": 1.0}, (dense, llama), "router_weight=0"),
        ({"expert_weight": 1.0}, (dense, llama), "hidden_weight"),
        (
            {"relation_weight": 1.0},
            (tiny_model("deepseek_v3"), tiny_model("deepseek_v3")),
            "relation_weight=0",
        ),
        (
            {"relation_weight": 1.0, "relations": "qq_kk_vv", "relation_heads": 3},
            (dense, llama),
            "a divisor of 64",
        ),
        ({"router_weight": 1.0}, (tiny_model("deepseek_v3"), mixtral), "nothing says which is which"),
    ):
        with pytest.raises(BadInput, match=message):
            feature_match(*models, SAME, **settings)
    assert feature_match(dense, llama, SAME) is None
