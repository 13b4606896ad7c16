"""Slow, obvious versions of the probes: one layer, one position, one head at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch

from core.models.loaded import LoadedModel


def lens_by_hand(loaded: LoadedModel, ids: list[int]) -> list[list[dict[str, Any]]]:
    """Per layer and position: probabilities, entropy, KL to the last layer, rank of the next token.

    Residuals come from transformers' own ``output_hidden_states``, whose last entry is already normed; everything
    after the unembedding is plain float64 algebra over the whole vocabulary.
    """
    model, anatomy = loaded.model, loaded.anatomy
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        layers = []
        for layer, hidden in enumerate(output.hidden_states):
            is_last = layer == anatomy.n_layers
            normed = hidden if is_last else model.get_submodule(anatomy.final_norm)(hidden)
            logits = model.get_submodule(anatomy.unembedding)(normed)[0].double()
            if anatomy.logit_softcap is not None:
                logits = anatomy.logit_softcap * torch.tanh(logits / anatomy.logit_softcap)
            layers.append(torch.log_softmax(logits, -1))
    final = layers[-1]
    return [[_cell(log_p[p], final[p], ids, p) for p in range(len(ids))] for log_p in layers]


def _cell(log_p: torch.Tensor, log_final: torch.Tensor, ids: list[int], position: int) -> dict[str, Any]:
    p = log_p.exp()
    cell: dict[str, Any] = {
        "entropy_nats": -float(sum(a * b for a, b in zip(p.tolist(), log_p.tolist(), strict=True))),
        "kl_to_final_nats": float(
            sum(math.exp(b) * (b - a) for a, b in zip(log_p.tolist(), log_final.tolist(), strict=True))
        ),
        "p_top1": float(p.max()),
        "top1_id": int(p.argmax()),
    }
    if position + 1 < len(ids):
        target = ids[position + 1]
        cell["p_target"] = float(p[target])
        cell["rank_of_target"] = 1 + sum(value > float(log_p[target]) for value in log_p.tolist())
    return cell


def surprisal_by_hand(loaded: LoadedModel, ids: list[int]) -> list[float]:
    """Nats of each token but the first, from one separate forward pass per prefix."""
    costs = []
    with torch.inference_mode():
        for end in range(1, len(ids)):
            logits = loaded.model(torch.tensor([ids[:end]]), use_cache=False).logits[0, -1].double()
            costs.append(float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([ids[end]]))))
    return costs


def head_scores_by_hand(pattern: list[list[float]], ids: list[int]) -> dict[str, float]:
    """The scores of one causal head without a window, each a loop over queries."""
    n = len(ids)
    entropy = [-sum(w * math.log(w) for w in row if w > 0) for row in pattern]
    induction, duplicate = [], []
    for query in range(n):
        copies = [key for key in range(query) if ids[key] == ids[query]]
        if copies:
            duplicate.append(sum(pattern[query][key] for key in copies))
        successors = [key + 1 for key in copies if key + 1 < query]
        if successors:
            induction.append(sum(pattern[query][key] for key in successors))
    return {
        "entropy_nats": _mean(entropy),
        "entropy_share": _mean([entropy[q] / math.log(q + 1) for q in range(1, n)]),
        "previous_token_share": _mean([pattern[q][q - 1] for q in range(1, n)]),
        "first_token_share": _mean([pattern[q][0] for q in range(1, n)]),
        "self_share": _mean([pattern[q][q] for q in range(n)]),
        "induction_score": _mean(induction),
        "duplicate_token_score": _mean(duplicate),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
