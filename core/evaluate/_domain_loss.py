"""Loss by domain of the text every machine has, document by document, and paired intervals of what a change adds.

Every domain weighs the same. Legend: B windows, P positions, V vocabulary, D domains, U documents, R draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.evaluate._intervals import Bootstrap, Interval
from core.lazy import torch
from core.text.domains import documents_by_domain

LENGTH = 256
"""Tokens predicted in one window; windows see nothing of each other."""
BATCH = 16
DRAWS = 2000
Floats = NDArray[np.float64]
Scores = dict[str, list[list[float]]]
"""By domain, for each document: summed nats, and the number of tokens they are of."""


def nll_by_domain(model: Any, tokenizer: Any, *, n_documents: int | None = None) -> Scores:
    """Next-token loss of every evaluation document, cut into windows of 256 tokens that see nothing of each other."""
    found: Scores = {}
    for domain, documents in documents_by_domain().items():
        windows, owners = [], []
        for number, text in enumerate(documents.texts[:n_documents]):
            ids = tokenizer(text, verbose=False).input_ids
            for start in range(0, len(ids) - 1, LENGTH):
                windows.append(ids[start : start + LENGTH + 1])
                owners.append(number)
        sums = np.zeros((max(owners) + 1, 2))
        for start in range(0, len(windows), BATCH):
            some = windows[start : start + BATCH]
            nats, counts = _window_losses(model, some)
            np.add.at(sums, owners[start : start + BATCH], np.stack([nats, counts], 1))
        found[domain] = [[round(nats, 4), int(count)] for nats, count in sums]
    return found


def _window_losses(model: Any, windows: list[list[int]]) -> tuple[Floats, Floats]:
    longest = max(map(len, windows))
    ids_BP = torch.tensor([one + [0] * (longest - len(one)) for one in windows])
    targets_BP = torch.tensor([one[1:] + [-100] * (longest - len(one)) for one in windows])
    with torch.inference_mode():
        logits_BPV = model(
            ids_BP[:, :-1], use_cache=False
        ).logits  # padding is on the right, so nobody sees it
        losses_BP = torch.nn.functional.cross_entropy(
            logits_BPV.transpose(1, 2), targets_BP, reduction="none"
        )
    return losses_BP.sum(1).double().numpy(), (targets_BP >= 0).sum(1).double().numpy()


def mean_loss(scores: Scores) -> float:
    """Nats per token, every domain with equal weight."""
    return float(np.mean([np.sum(rows, 0)[0] / np.sum(rows, 0)[1] for rows in scores.values()]))


def paired(scores: Scores, reference: Scores, statistic: Callable[[Floats, Floats], Floats]) -> Interval:
    """95 % interval of ``statistic(loss [R], reference loss [R])`` under one resampling of documents for both."""
    tokens_DU, nats_DU, reference_DU = _by_document(scores, reference)

    def losses(counts_RU: NDArray[np.int64], sums_DU: Floats) -> Floats:
        means_R: Floats = ((counts_RU @ sums_DU.T) / (counts_RU @ tokens_DU.T)).mean(1)
        return means_R

    bootstrap = Bootstrap(tokens_DU.shape[1], draws=DRAWS, seed=0, unit="documents, each within its domain")
    each = [Bootstrap(len(rows), draws=DRAWS, seed=seed) for seed, rows in enumerate(scores.values())]
    bootstrap.counts_RD = np.concatenate([one.counts_RD for one in each], axis=1)
    return bootstrap.of(lambda counts: statistic(losses(counts, nats_DU), losses(counts, reference_DU)))


def _by_document(scores: Scores, reference: Scores) -> tuple[Floats, Floats, Floats]:
    """Tokens, nats and reference nats as [D, U]: a document of another domain is a zero."""
    n_documents = sum(map(len, scores.values()))
    sums = np.zeros((3, len(scores), n_documents))
    u = 0
    for d, name in enumerate(scores):
        for (nats, tokens), (reference_nats, _) in zip(scores[name], reference[name], strict=True):
            sums[:, d, u] = tokens, nats, reference_nats
            u += 1
    return sums[0], sums[1], sums[2]
