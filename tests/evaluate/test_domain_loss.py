"""Loss by domain: against a token-by-token reference, and paired intervals with known answers."""

from __future__ import annotations

import pytest
import torch

from core.evaluate._domain_loss import LENGTH, mean_loss, nll_by_domain, paired
from core.text.domains import documents_by_domain
from tests.tiny import tiny_model


def test_every_document_is_scored_as_if_alone_window_by_window() -> None:
    loaded = tiny_model("olmoe")
    found = nll_by_domain(loaded.model, loaded.tokenizer, n_documents=2)
    assert set(found) == set(documents_by_domain())
    ids = loaded.tokenizer(documents_by_domain()["json"].texts[1])["input_ids"]
    nats, scored = 0.0, 0
    for start in range(0, len(ids) - 1, LENGTH):
        window = ids[start : start + LENGTH + 1]
        with torch.inference_mode():
            log_p = loaded.model(torch.tensor([window])).logits[0].log_softmax(-1)
        nats -= sum(float(log_p[i, window[i + 1]]) for i in range(len(window) - 1))
        scored += len(window) - 1
    assert found["json"][1][1] == scored == len(ids) - 1
    assert found["json"][1][0] == pytest.approx(nats, rel=1e-4)


def test_domains_weigh_the_same_however_long_they_are() -> None:
    assert mean_loss({"a": [[10.0, 10]], "b": [[3000.0, 1000]]}) == pytest.approx(2.0)


def test_a_constant_difference_has_an_interval_of_a_point() -> None:
    reference = {name: [[float(n * (n % 3 + 1)), n] for n in range(5, 15)] for name in "ab"}
    worse = {name: [[nats + 0.5 * n, n] for nats, n in rows] for name, rows in reference.items()}
    interval = paired(worse, reference, lambda after, before: after - before)
    assert interval.low == pytest.approx(0.5)
    assert interval.high == pytest.approx(0.5)
    same = paired(reference, reference, lambda after, before: after / before)
    assert (same.low, same.high) == (1.0, 1.0)


def test_documents_are_drawn_within_their_domain() -> None:
    """A domain of one document keeps it in every draw, so that its loss is never undefined."""
    scores = {"a": [[10.0, 10]], "b": [[float(n), 1] for n in range(9)]}
    interval = paired(scores, scores, lambda after, _: after)
    assert interval.low is not None
    assert interval.low < mean_loss(scores) < interval.high
