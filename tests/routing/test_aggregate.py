"""Counts over long text are the counts of every single decision, whatever the windows, batches and padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadInput, Cancelled
from core.models.loaded import LoadedModel
from core.routing import _tally, statistics
from core.routing import aggregate as aggregate_module
from core.routing.aggregate import COUNTS, Aggregates, aggregate, by_domain
from core.routing.discover import moe_layers
from core.routing.lens import Routed, routed
from core.routing.scores import distribution
from core.routing.trace import MAX_TOKENS, RoutingTrace, trace
from core.types import Documents
from tests.references.slow_lens import counts, expert_output
from tests.tiny import CORPUS, MOE, SHIMMED, tiny_model

TEXTS = (*CORPUS, CORPUS[2] + CORPUS[0], "x = 1\n")
DOCUMENTS = Documents("tiny corpus", "evaluation", TEXTS)
SEQ_LEN = 24


@pytest.fixture(params=(*MOE, *SHIMMED))
def moe(request: pytest.FixtureRequest) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_model(request.param)


def chunks(loaded: LoadedModel, limit: int = 10**9) -> list[tuple[int, list[int]]]:
    """(document, token ids) of every window, in order."""
    found = []
    for document, text in enumerate(TEXTS):
        ids = loaded.tokenizer(text)["input_ids"][:limit]
        limit -= len(ids)
        found += [(document, ids[first : first + SEQ_LEN]) for first in range(0, len(ids), SEQ_LEN)]
    return [chunk for chunk in found if chunk[1]]


def traces(loaded: LoadedModel) -> list[RoutingTrace]:
    return [trace(loaded, ids) for _, ids in chunks(loaded)]


def as_counter(counts_LX: np.ndarray) -> Counter[Any]:
    return Counter({tuple(place): int(counts_LX[tuple(place)]) for place in np.argwhere(counts_LX)})


def test_counts_are_those_of_every_decision_one_by_one(moe: LoadedModel):
    found = aggregate(moe, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN)
    experts_LTK = np.concatenate([part.experts_LTK for part in traces(moe)], axis=1)
    slow = counts(experts_LTK, range(len(found.layers)))
    assert found.n_tokens == experts_LTK.shape[1]
    assert as_counter(found.load_LE) == slow["load"]
    assert as_counter(found.coactivation_LEE) == slow["pairs"]
    assert as_counter(found.flow_LEE) == slow["flow"]


def assert_pair_identities(found: Aggregates) -> None:
    """Check 13 of the reference: symmetric, diagonal = load, row sums = k · load, trace = T · k, flow = T · k²."""
    k, n_tokens = found.top_k, found.n_tokens
    pairs_LEE = found.coactivation_LEE
    assert np.array_equal(pairs_LEE, pairs_LEE.swapaxes(1, 2))
    assert np.array_equal(np.diagonal(pairs_LEE, axis1=1, axis2=2), found.load_LE)
    assert np.array_equal(pairs_LEE.sum(2), k * found.load_LE)
    assert pairs_LEE.trace(axis1=1, axis2=2).tolist() == [n_tokens * k] * len(found.layers)
    assert found.load_LE.sum(1).tolist() == [n_tokens * k] * len(found.layers)
    assert found.first_LE.sum(1).tolist() == [n_tokens] * len(found.layers)
    assert found.flow_LEE.sum((1, 2)).tolist() == [n_tokens * k * k] * (len(found.layers) - 1) + [0]
    assert np.array_equal(found.flow_LEE[:-1].sum(2), k * found.load_LE[:-1])
    assert np.array_equal(found.flow_LEE[:-1].sum(1), k * found.load_LE[1:])


def test_pairs_and_flow_keep_their_identities(moe: LoadedModel):
    assert_pair_identities(aggregate(moe, DOCUMENTS, max_tokens=150, seq_len=SEQ_LEN))


def test_the_identity_check_can_fail(monkeypatch: pytest.MonkeyPatch):
    """Padding that is counted, as a hook without a mask would."""
    seen_by = aggregate_module.routed

    def unmasked(*args: Any, mask_BP: Any, **kwargs: Any) -> Any:
        return seen_by(*args, **kwargs)

    monkeypatch.setattr(aggregate_module, "routed", unmasked)
    with pytest.raises(AssertionError):
        assert_pair_identities(aggregate(tiny_model("mixtral"), DOCUMENTS, max_tokens=150, seq_len=SEQ_LEN))


def test_sums_do_not_depend_on_how_windows_share_a_batch(moe: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    together = aggregate(moe, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN)
    monkeypatch.setattr(aggregate_module, "BATCH_TOKENS", 1)
    alone = aggregate(moe, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN)
    for name in COUNTS:
        mine, theirs = getattr(together, name), getattr(alone, name)
        if mine is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, err_msg=name)


def test_weights_and_first_choices_and_entropy(moe: LoadedModel):
    found = aggregate(moe, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN)
    parts = traces(moe)
    for place in range(len(found.layers)):
        weight_E, first_E = np.zeros(found.n_experts), np.zeros(found.n_experts, dtype=int)
        for part in parts:
            np.add.at(weight_E, part.experts_LTK[place].ravel(), part.weights_LTK[place].ravel())
            for experts, weights in zip(part.experts_LTK[place], part.weights_LTK[place], strict=True):
                first_E[experts[weights.argmax()]] += 1
        np.testing.assert_allclose(found.weight_LE[place], weight_E, rtol=1e-4)
        assert found.first_LE[place].tolist() == first_E.tolist()
        entropies = np.concatenate([part.entropy_LT[place] for part in parts])
        assert found.entropy_sum_L[place] == pytest.approx(entropies.sum(), rel=1e-4)
        assert found.probability_LE[place].sum() == pytest.approx(found.n_tokens, rel=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_norms_give_reap_as_brute_force_does(family: str):
    """Σ g ‖f‖ / load is REAP's saliency, Σ ‖f‖ / load MAN's, Σ ‖f‖² / load MSAN's."""
    loaded = tiny_model(family)
    documents = Documents("short", "calibration", TEXTS[:1])
    found = aggregate(loaded, documents, max_tokens=16, norms=True)
    seen: list[Routed] = []
    ids = loaded.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :16]
    with torch.inference_mode(), routed(loaded, seen.append):
        loaded.model(input_ids=ids)
    for place, (layer, at) in enumerate(zip(moe_layers(loaded), seen, strict=True)):
        experts = loaded.model.get_submodule(layer.experts)
        sums = np.zeros((3, layer.n_experts))
        for token in range(len(at.hidden_TD)):
            for expert, weight in zip(
                at.experts_TK[token].tolist(), at.weights_TK[token].tolist(), strict=True
            ):
                norm = float(expert_output(experts, expert, at.hidden_TD[token]).norm())
                sums[:, expert] += norm, norm**2, weight * norm
        assert found.norm_sum_LE is not None
        np.testing.assert_allclose(found.norm_sum_LE[place], sums[0], rtol=1e-4)
        np.testing.assert_allclose(found.norm_sq_sum_LE[place], sums[1], rtol=1e-4)
        np.testing.assert_allclose(found.gated_norm_sum_LE[place], sums[2], rtol=1e-4)


def test_tables_by_token_by_prediction_and_by_document(moe: LoadedModel):
    found = aggregate(
        moe, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN, vocabulary=True, predicted=True, by_document=True
    )
    shape = (len(found.layers), moe.anatomy.vocab_size, found.n_experts)
    token_LVE, predicted_LVE = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)
    document_ULE = np.zeros((len(TEXTS), len(found.layers), found.n_experts), dtype=int)
    n_ties = 0
    for document, ids in chunks(moe):
        with torch.inference_mode():
            best_TK = moe.model(input_ids=torch.tensor([ids])).logits[0].topk(2)
        next_T = best_TK.indices[:, 0].numpy()
        n_ties += int((best_TK.values.diff(dim=-1).abs() < 1e-4).sum())
        part = trace(moe, ids)
        for place in range(len(found.layers)):
            for token, experts in enumerate(part.experts_LTK[place]):
                token_LVE[place, ids[token], experts] += 1
                predicted_LVE[place, next_T[token], experts] += 1
                document_ULE[document, place, experts[part.weights_LTK[place, token].argmax()]] += 1
    assert np.array_equal(found.token_expert_LVE, token_LVE)
    # A tie of the two best logits may fall either way in another batch, and moves its slots once.
    assert n_ties <= 2
    moved = np.abs(found.predicted_expert_LVE - predicted_LVE).sum()
    assert moved <= 2 * n_ties * found.top_k * len(found.layers)
    assert np.array_equal(found.first_by_document_ULE, document_ULE)


def test_reading_stops_at_the_wanted_number_of_tokens():
    loaded = tiny_model("mixtral")
    found = aggregate(loaded, DOCUMENTS, max_tokens=41, seq_len=SEQ_LEN, by_document=True)
    assert found.n_tokens == 41
    last = max(document for document, _ in chunks(loaded, limit=41))
    assert found.first_by_document_ULE.shape[0] == last + 1


def test_domains_add_up_to_the_whole():
    loaded = tiny_model("qwen2_moe")
    groups = {
        "first": Documents("a", "evaluation", TEXTS[:2]),
        "rest": Documents("b", "evaluation", TEXTS[2:]),
    }
    parts = by_domain(loaded, groups, max_tokens=10**6, seq_len=SEQ_LEN, norms=True, by_document=True)
    whole = aggregate(
        loaded, DOCUMENTS, max_tokens=10**6, seq_len=SEQ_LEN, norms=True, vocabulary=True, by_document=True
    )
    summed = parts["first"] + parts["rest"]
    assert summed.n_tokens == whole.n_tokens
    for name in (*COUNTS, "first_by_document_ULE"):
        mine, theirs = getattr(summed, name), getattr(whole, name)
        if name in ("token_expert_LVE", "predicted_expert_LVE"):
            assert mine is None
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, err_msg=name)


def test_progress_may_stop_it_and_the_model_stays_whole():
    loaded = tiny_model("olmoe")
    told: list[tuple[float, float]] = []

    def stop(done: float, total: float, message: str) -> None:
        told.append((done, total))
        raise Cancelled

    with pytest.raises(Cancelled):
        aggregate(loaded, DOCUMENTS, stop, max_tokens=1000, seq_len=SEQ_LEN)
    assert len(told) == 1
    assert aggregate(loaded, DOCUMENTS, max_tokens=30).n_tokens == 30


@pytest.mark.parametrize(
    ("said", "how"),
    [("no tokens", {"documents": Documents("nothing", "evaluation", ("",))}), ("MiB", {"vocabulary": True})],
)
def test_what_cannot_be_counted_is_refused(said: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aggregate_module, "MAX_TABLE_BYTES", 1000)
    with pytest.raises(BadInput, match=said):
        aggregate(tiny_model("mixtral"), **{"documents": DOCUMENTS, "max_tokens": 50, **how})


def test_a_dense_model_is_refused():
    with pytest.raises(BadInput, match="dense"):
        aggregate(tiny_model("llama"), DOCUMENTS, max_tokens=10)
    with pytest.raises(BadInput, match="dense"):
        trace(tiny_model("llama"), "one two three")


# --- traces -------------------------------------------------------------------------------------------


def test_margin_is_the_gap_of_sorted_logits_where_logits_decide(moe: LoadedModel):
    seen: list[Routed] = []
    ids = moe.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.inference_mode(), routed(moe, seen.append):
        moe.model(input_ids=ids)
    found = trace(moe, TEXTS[1])
    for place, (layer, at) in enumerate(zip(moe_layers(moe), seen, strict=True)):
        ranked_TE = at.logits_TE.float().sort(-1, descending=True).values
        if layer.rule == "sigmoid_bias_renorm":
            assert np.isnan(found.margin_LT[place]).all()
        else:
            gap_T = ranked_TE[:, layer.top_k - 1] - ranked_TE[:, layer.top_k]
            np.testing.assert_allclose(found.margin_LT[place], gap_T, rtol=1e-4, atol=1e-5)
        shares_TE = distribution(layer.rule, at.logits_TE)
        by_statistics = statistics.entropy(shares_TE.numpy())
        np.testing.assert_allclose(found.entropy_LT[place], by_statistics, rtol=1e-4)


def test_a_trace_names_its_tokens():
    loaded = tiny_model("mixtral")
    found = trace(loaded, "Paris is")
    assert "".join(found.texts) == "Paris is"
    assert found.token_ids_T.tolist() == loaded.tokenizer("Paris is")["input_ids"]
    assert found.experts_LTK.shape == (3, len(found.texts), 2)
    assert found.experts_LTK.dtype == np.int16


def test_a_model_does_not_drift_from_itself(moe: LoadedModel):
    first, second = trace(moe, TEXTS[0]), trace(moe, TEXTS[0])
    overlap_LT = statistics.overlap_at_k(first.experts_LTK, second.experts_LTK)
    assert (overlap_LT == 1).all()
    dense = [
        statistics.dense_weights(part.experts_LTK, part.weights_LTK, part.n_experts)
        for part in (first, second)
    ]
    assert not statistics.weight_drift(*dense).any()


def test_another_models_routing_does_drift(own_copy: Callable[..., LoadedModel]):
    first, second = trace(tiny_model("mixtral"), TEXTS[0]), trace(own_copy("mixtral", seed=1), TEXTS[0])
    assert statistics.overlap_at_k(first.experts_LTK, second.experts_LTK).mean() < 0.8


@pytest.mark.parametrize(
    ("said", "text"), [("empty", ""), ("more than the", [5] * (MAX_TOKENS + 1)), ("256", [5] * 257)]
)
def test_a_text_without_or_with_too_many_tokens_is_refused(said: str, text: Any):
    with pytest.raises(BadInput, match=said):
        trace(tiny_model("mixtral"), text)


def test_the_tally_keeps_no_decision():
    """What it holds after a call does not grow with the call."""
    loaded = tiny_model("mixtral")
    layers = moe_layers(loaded)
    tally = _tally.Tally(layers, _tally.Wanted(norms=False, tokens=0, predicted=0, documents=0), "cpu")
    sizes = []
    for n in (10, 200):
        ids = torch.full((1, n), 7)
        tally.start(ids[0], torch.zeros(n, dtype=torch.long), n)
        with torch.inference_mode(), routed(loaded, tally.observe):
            loaded.model(input_ids=ids)
        sizes.append(sum(part.nbytes for part in tally.sums.values()))
    assert sizes[0] == sizes[1]
