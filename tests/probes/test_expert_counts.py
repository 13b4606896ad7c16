"""What the probes of routing make of decisions that are known: no model, only arrays with a known answer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from core.probes._clustered import GROUPS, jackknife_half, ratio_half
from core.probes._domain_table import DomainTable
from core.probes._routed_text import Choices, Texts
from core.probes._routing_report import (
    Counted,
    conservation_gap,
    count_choices,
    counted_by,
    shown_layers,
    text_flags,
)
from core.probes.dead_experts import MEAN, dead_curve
from core.probes.expert_coactivation import pair_counts, ranked_pairs
from core.probes.expert_domains import domain_map, layer_table
from core.probes.expert_flow import edge_table, flow_by_group
from core.probes.expert_load import balance_by_layer, load_map
from core.probes.expert_vocabulary import Vocabulary
from core.probes.routing_margin import told_by_margin
from core.probes.special_experts import Committee, expert_table, protect_list
from core.routing import statistics
from tests.references.slow_routing import auc_by_hand, dead_by_hand, flow_by_hand, pairs_by_hand

DOMAINS = 4


def random_choices(
    n_layers: int = 3,
    n_experts: int = 8,
    top_k: int = 2,
    tokens_each: int = 30,
    documents: int = 16,
    seed: int = 0,
) -> Choices:
    """Uneven random decisions; every slot of a token is another expert."""
    generator = np.random.default_rng(seed)
    n = tokens_each * documents
    liking = generator.gumbel(size=(n_layers, n, n_experts)) + generator.normal(size=(n_layers, 1, n_experts))
    experts = np.argsort(-liking, axis=-1)[..., :top_k].astype(np.int16)
    return chosen(experts, np.repeat(np.arange(documents), tokens_each), n_experts, seed)


def chosen(experts_LTK: Any, document_T: Any, n_experts: int, seed: int = 0) -> Choices:
    generator = np.random.default_rng(seed)
    weights = -np.sort(
        -generator.dirichlet(np.ones(experts_LTK.shape[2]), size=experts_LTK.shape[:2]), axis=-1
    )
    n_layers, n, top_k = experts_LTK.shape
    return Choices(
        layers=tuple(range(1, n_layers + 1)),
        n_experts=n_experts,
        top_k=top_k,
        experts_LTK=np.asarray(experts_LTK, dtype=np.int16),
        weights_LTK=weights.astype(np.float32),
        document_T=np.asarray(document_T),
        ids_T=generator.integers(0, 20, size=n),
        predicted_T=None,
    )


def oracle_choices(confusion: float = 0.0) -> tuple[Choices, Texts]:
    """Every document is of one domain, and its tokens go to that domain's expert."""
    generator = np.random.default_rng(1)
    labels = np.tile(np.arange(DOMAINS), 16)
    document_T = np.repeat(np.arange(len(labels)), 20)
    expert_T = labels[document_T]
    wrong_T = generator.random(len(expert_T)) < confusion
    expert_T = np.where(wrong_T, generator.integers(0, DOMAINS, len(expert_T)), expert_T)
    texts = Texts("oracle", tuple(map(str, labels)), tuple(f"domain {label}" for label in labels))
    return chosen(expert_T[None, :, None], document_T, DOMAINS), texts


class TestLoad:
    def test_counts_are_conserved_and_a_lost_one_is_seen(self):
        choices = random_choices()
        load = count_choices(choices).sum(0)
        assert (load.sum(-1) == choices.n_tokens * choices.top_k).all()
        assert conservation_gap(load, choices) == 0
        load[0, 0] -= 1
        assert conservation_gap(load, choices) > 0

    def test_permuting_experts_permutes_loads_and_leaves_every_balance_alone(self):
        choices = random_choices()
        new_name = np.random.default_rng(3).permutation(choices.n_experts)
        renamed = chosen(new_name[choices.experts_LTK], choices.document_T, choices.n_experts)
        before, after = (balance_by_layer(count_choices(each), each) for each in (choices, renamed))
        assert before.to_numpy() == pytest.approx(after.to_numpy(), rel=1e-12)
        here, there = (count_choices(each).sum(0) for each in (choices, renamed))
        assert (there[:, new_name] == here).all()
        assert not (here == there).all(), "the permutation moved nothing: this test could not fail"

    def test_even_router_is_balanced_and_one_expert_alone_is_not(self):
        even = chosen(np.tile(np.arange(8), 60)[None, :, None], np.repeat(np.arange(16), 30), 8)
        table = balance_by_layer(count_choices(even), even).iloc[0]
        assert (table["cv"], table["max_violation"], table["gini"]) == pytest.approx((0, 0, 0), abs=1e-12)
        assert table["effective_experts"] == pytest.approx(8)
        alone = chosen(np.zeros((1, 480, 1)), np.repeat(np.arange(16), 30), 8)
        table = balance_by_layer(count_choices(alone), alone).iloc[0]
        assert table["cv"] == pytest.approx(7**0.5)
        assert (table["max_violation"], table["effective_experts"]) == pytest.approx((7, 1))
        assert table["never_chosen"] == 7

    def test_chance_alone_gives_the_imbalance_it_is_said_to(self):
        generator = np.random.default_rng(0)
        drawn = [
            float(
                statistics.cv(
                    np.bincount(np.argsort(generator.random((400, 16)), 1)[:, :2].ravel(), minlength=16)
                )
            )
            for _ in range(300)
        ]
        choices = random_choices(n_layers=1, n_experts=16, tokens_each=25)
        said = balance_by_layer(count_choices(choices), choices)["cv_of_chance"].iloc[0]
        assert np.sqrt(np.mean(np.square(drawn))) == pytest.approx(said, rel=0.05)

    def test_one_document_has_no_interval(self):
        prompt = random_choices(documents=1)
        table = balance_by_layer(count_choices(prompt), prompt)
        assert table["cv"].notna().all()
        assert table[["cv_low", "cv_high"]].isna().all(axis=None)
        assert load_map(count_choices(prompt), prompt)[["low", "high"]].isna().all(axis=None)
        assert text_flags(random_choices(documents=1, tokens_each=10)) == ("few_tokens",)
        assert text_flags(random_choices()) == ()

    def test_large_models_are_drawn_quickly_and_within_the_cells(self):
        choices = random_choices(n_layers=48, n_experts=128, top_k=8, tokens_each=64, documents=64)
        load = count_choices(choices)
        took = []
        for _ in range(3):
            started = time.process_time()
            frames = load_map(load, choices), balance_by_layer(load, choices)
            took.append(time.process_time() - started)
        assert len(frames[0]) == 48 * 128
        assert min(took) < 0.1, took
        for n_layers, n_experts in ((48, 128), (61, 256), (94, 128), (60, 384)):
            shown = shown_layers(range(n_layers), n_experts)
            assert len(shown) * n_experts <= 10_000
            assert shown[0] == 0


class TestIntervals:
    def test_share_covers_the_truth_when_tokens_of_a_document_are_alike(self):
        generator = np.random.default_rng(0)
        inside_documents = inside_tokens = 0
        for _ in range(400):
            own = generator.beta(2, 6, size=24)
            hits = generator.binomial(50, own)
            share = Counted.share(hits, np.full(24, 50))
            inside_documents += abs(share.value - 0.25) <= share.half
            naive = 1.96 * np.sqrt(share.value * (1 - share.value) / (24 * 50))
            inside_tokens += abs(share.value - 0.25) <= naive
        assert 0.92 <= inside_documents / 400 <= 0.98
        assert inside_tokens / 400 < 0.7, "if tokens were independent, documents would not be needed"

    def test_jackknife_of_a_mean_is_students_interval(self):
        counts = np.random.default_rng(0).poisson(9, size=(20, 3)).astype(float)
        trials = np.ones((20, 1))
        both = np.concatenate([counts, trials], axis=1)
        half = jackknife_half(both, lambda x: x[..., :-1] / x[..., -1:])
        assert half == pytest.approx(ratio_half(counts, trials), rel=1e-9)

    def test_documents_are_dealt_to_at_most_so_many_groups(self):
        choices = random_choices(documents=100, tokens_each=5)
        counts = count_choices(choices)
        assert len(counts) == GROUPS
        assert (counts.sum(0) == counted_by(choices.experts_LTK, choices.document_T * 0, 1, 8)[0]).all()


class TestDomains:
    def test_oracle_router_is_told_wholly_and_shuffled_labels_not(self):
        choices, texts = oracle_choices()
        table = DomainTable.of(choices, texts, count="first")
        row = layer_table(table, permutations=99, seed=0).iloc[0]
        assert row["nmi"] == pytest.approx(1)
        assert row["nmi_shuffled"] < 0.1
        assert row["p_value"] == pytest.approx(0.01)
        assert row["mean_divergence"] == pytest.approx(1), "no two domains share an expert"
        cells = domain_map(table).set_index(["domain", "expert"])["specialisation"]
        for number, domain in enumerate(table.domains):
            assert cells[domain].to_numpy() == pytest.approx(np.eye(DOMAINS)[number] * DOMAINS)

    def test_router_that_ignores_the_domain_is_not_told(self):
        p_values = []
        for seed in range(20):
            choices, texts = oracle_choices(confusion=1.0)
            shuffled = Texts(
                "shuffled",
                texts.texts,
                tuple(np.random.default_rng(seed).permutation(np.array(texts.labels))),
            )
            row = layer_table(
                DomainTable.of(choices, shuffled, count="first"), permutations=39, seed=seed
            ).iloc[0]
            assert row["nmi"] < 0.02
            p_values.append(row["p_value"])
        assert np.mean(np.array(p_values) <= 0.05) <= 0.2

    def test_confusion_lowers_it(self):
        values = []
        for confusion in (0.0, 0.3, 0.7):
            choices, texts = oracle_choices(confusion)
            values.append(DomainTable.of(choices, texts, count="all").information().value[0])
        assert values == sorted(values, reverse=True)
        assert values[2] < 0.3


class TestPairs:
    def test_pairs_equal_those_counted_by_hand(self):
        choices = random_choices(top_k=3)
        pairs = pair_counts(choices, 1).sum(0)
        by_hand = pairs_by_hand(choices.experts_LTK[1])
        assert {(i, j): int(n) for (i, j), n in np.ndenumerate(pairs) if n} == dict(by_hand)
        assert (pairs == pairs.T).all()
        assert (pairs.sum(1) == choices.top_k * pairs.diagonal()).all()
        assert np.trace(pairs) == choices.n_tokens * choices.top_k

    def test_lift_of_a_random_choice_is_that_of_chance(self):
        generator = np.random.default_rng(0)
        experts = np.argsort(generator.random((1, 20_000, 6)), axis=-1)[..., :3]
        choices = chosen(experts, np.repeat(np.arange(20), 1000), 6)
        table = ranked_pairs(pair_counts(choices, 0), choices, 5.0)
        chance = statistics.lift_by_chance(6, 3)
        assert table["lift"].mean() == pytest.approx(chance, rel=0.01)
        assert ((table["lift_low"] <= chance) & (chance <= table["lift_high"])).mean() >= 0.8

    def test_flow_equals_that_counted_by_hand_by_count_and_weight(self):
        choices = random_choices()
        for weighted in (False, True):
            here_w, there_w = (
                choices.weights_LTK[at] if weighted else np.ones_like(choices.weights_LTK[at])
                for at in (0, 1)
            )
            flow = flow_by_group(choices, 0, weighted=weighted).sum(0)
            by_hand = flow_by_hand(choices.experts_LTK[0], choices.experts_LTK[1], here_w, there_w)
            for pair, value in np.ndenumerate(flow):
                assert value == pytest.approx(by_hand[pair], rel=1e-5)
        counted = flow_by_group(choices, 0, weighted=False)
        assert counted.sum() == choices.n_tokens * choices.top_k**2
        edges = edge_table(counted, (1, 2))
        assert edges.groupby("source")["p_target"].sum().to_numpy() == pytest.approx(1)
        assert edges["weight"].is_monotonic_decreasing


class TestDead:
    def test_curve_is_the_mean_over_orders_and_ends_at_what_is_dead(self):
        choices = random_choices(n_layers=2, documents=5, tokens_each=6, n_experts=12)
        curve = dead_curve(choices, orders=3000, seed=0)
        mean = curve[curve["series"] == MEAN].set_index("tokens")["never_chosen_share"]
        generator = np.random.default_rng(1)
        for n in (1, 4, 13):
            by_hand = [
                dead_by_hand(
                    choices.experts_LTK, choices.document_T, generator.permutation(5).tolist(), n, 12
                )
                for _ in range(400)
            ]
            at = mean.index[np.abs(mean.index - n).argmin()]
            assert at == n
            assert mean[n] == pytest.approx(np.mean(by_hand), abs=0.02)
        dead = (count_choices(choices).sum(0) == 0).mean()
        assert mean.iloc[-1] == pytest.approx(dead)
        assert mean.is_monotonic_decreasing


class TestVocabulary:
    def test_expert_per_token_is_full_specialisation_and_shuffling_loses_it(self):
        choices = random_choices(n_layers=1, n_experts=5, top_k=1, tokens_each=100)
        bound = chosen((choices.ids_T % 5)[None, :, None], choices.document_T, 5)
        vocabulary = Vocabulary.of(bound, choices.ids_T, min_count=10)
        assert vocabulary.specialisation().value[0] == pytest.approx(1)
        lost = vocabulary.shuffled(np.random.default_rng(0)).specialisation().value[0]
        assert 1 / 5 < lost < 0.5
        assert (vocabulary.seen_GV.sum(0) == np.bincount(choices.ids_T)).all()
        routed = vocabulary.routed_GVE(0).sum(0)
        assert (routed == np.eye(5, dtype=int)[np.arange(20) % 5] * vocabulary.seen_GV.sum(0)[:, None]).all()

    def test_rare_tokens_are_left_out(self):
        choices = random_choices(n_layers=1)
        ids = np.where(np.arange(choices.n_tokens) < 9, 99, 1)
        assert Vocabulary.of(choices, ids, min_count=10).token_V.tolist() == [1]


def test_auc_is_the_share_of_ordered_pairs():
    generator = np.random.default_rng(0)
    margin, flipped = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.3
    assert told_by_margin(margin, flipped) == pytest.approx(auc_by_hand(margin, flipped))
    assert told_by_margin(np.arange(10.0), np.arange(10) < 4) == 1
    assert np.isnan(told_by_margin(margin, np.zeros(60, bool)))


def test_committee_is_who_serves_every_domain_and_its_list_can_be_pasted():
    labels = np.tile(np.arange(DOMAINS), 12)
    document_T = np.repeat(np.arange(len(labels)), 40)
    generator = np.random.default_rng(0)
    # Slot 1: expert 0 for all. Slot 2: the domain's own expert, 1 to 4. Experts 5 to 7 never.
    own = 1 + labels[document_T]
    experts = np.stack([np.zeros_like(own), np.where(generator.random(len(own)) < 0.9, own, 1)], axis=-1)
    choices = chosen(experts[None], document_T, 8)
    texts = Texts("made", tuple(map(str, labels)), tuple(map(str, labels)))
    committee = Committee.of(DomainTable.of(choices, texts, count="weight"), 0.95, 0)
    assert np.flatnonzero(committee.member_LE[0]).tolist() == [0]
    assert committee.certainty_LE[0, 0] == 1
    weight = choices.weights_LTK[0]
    first = np.mean(
        [weight[labels[document_T] == d, 0].sum() / weight[labels[document_T] == d].sum() for d in range(4)]
    )
    assert committee.mass_L[0] == pytest.approx(first, rel=1e-6)
    row = committee.frame(choices).iloc[0]
    assert row["low"] <= row["routing_weight_share"] <= row["high"]
    cells = expert_table(choices, count_choices(choices).sum(0), committee, None)
    assert cells[cells["kind"] == "dead"]["expert"].tolist() == [5, 6, 7]
    assert protect_list(cells) == "1:0"
