"""What each way of having fewer experts costs ``demo:moe``, overall and by domain, and whom a calibration spares.

    python benchmarks/expert_methods.py [--documents 12] [--shares 0.25 0.5] [--only WORD]

Every method takes the same calibration text (all domains in turn) and is measured on the same evaluation documents:
loss added in nats per token, every domain with equal weight, with a 95 % interval from a bootstrap over documents that
is paired with the whole model. ``random`` is the mean of five draws. NAEE tries every set of experts, which is feasible
for two of sixteen (120 sets) only; there its layer-output change is the lower bound of every other choice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from core.errors import CannotCompress
from core.evaluate._domain_loss import Scores, mean_loss, nll_by_domain, paired
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import methods
from core.text.documents import load_documents
from core.text.domains import documents_by_domain
from core.types import Documents, ModelRef, Result, silent

MODEL = "demo:moe"
SEEDS = range(5)
CALIBRATION_TOKENS = 32_768
CRITERIA = ("frequency", "ean", "reap", "man", "msan", "aimer")
ORACLE = 2
"""Experts removed of sixteen where all 120 sets can be tried."""


def main() -> None:
    """Measure and print the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=12, help="evaluation documents of each domain")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.25, 0.5], help="shares of the experts to remove"
    )
    parser.add_argument("--only", default="", help="only methods whose name holds this word; no matrix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = opened()
    base = nll_by_domain(whole.model, whole.tokenizer, n_documents=options.documents)
    n_tokens = sum(tokens for rows in base.values() for _, tokens in rows)
    print(f"{MODEL}: {mean_loss(base):.3f} nats per token on {n_tokens:,.0f} tokens\n", flush=True)
    everything = load_documents("domains", split="calibration")
    for share in options.shares:
        print(f"### {share:.0%} of the experts removed: loss added, nats per token\n")
        print_head("method", list(base))
        randoms = [
            lost("prune_experts", everything, base, share=share, criterion="random", seed=seed)
            for seed in SEEDS
        ]
        overall = [mean_loss(scores) - mean_loss(base) for scores in randoms]
        spread = f"{min(overall):+.3f} to {max(overall):+.3f} over {len(SEEDS)} draws"
        pooled = {name: np.mean([scores[name] for scores in randoms], axis=0).tolist() for name in base}
        print_row("random", pooled, base, spread)
        for name, method, settings in variants(share):
            if options.only not in name:
                continue
            try:
                scores = lost(method, everything, base, **settings)
            except CannotCompress as error:
                print(f"| {name} | cannot be: {error} |", flush=True)
                continue
            below = float(np.mean(overall)) < mean_loss(scores) - mean_loss(base)
            print_row(name + (" (worse than random)" if below else ""), scores, base)
        print()
    if not options.only:
        oracle(everything, base)
        matrix(base)


def opened() -> LoadedModel:
    """A fresh copy of the model, to be cut."""
    return open_model(ModelRef.parse(MODEL))


def variants(share: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, method and settings of everything that takes away this share of the experts."""
    for criterion in CRITERIA:
        yield f"prune, {criterion}", "prune_experts", {"criterion": criterion, "share": share}
    yield "merge, REAM", "merge_experts", {"scheme": "ream", "share": share}
    yield "merge, HC-SMoE", "merge_experts", {"scheme": "hc_smoe", "share": share}
    if "novice_experts" in methods("compress"):
        yield "novice, MoNE", "novice_experts", {"share": share}


def changed(method: str, calibration: Documents, **settings: Any) -> tuple[LoadedModel, Result]:
    """The model after one method, and what the method said."""
    loaded = opened()
    found = methods("compress")[method]
    if method == "prune_experts":
        settings = {"calibration_tokens": CALIBRATION_TOKENS, "compare_tokens": 0, **settings}
    return loaded, found.run(loaded, calibration, silent, found.parse(settings))


def lost(method: str, calibration: Documents, base: Scores, **settings: Any) -> Scores:
    """The evaluation documents' losses after one method."""
    loaded, _ = changed(method, calibration, **settings)
    return measured(loaded, base)


def measured(loaded: LoadedModel, base: Scores) -> Scores:
    """Losses on the documents that ``base`` was measured on."""
    return nll_by_domain(loaded.model, loaded.tokenizer, n_documents=max(map(len, base.values())))


def print_head(first: str, domains: list[str]) -> None:
    """The head of a table by domain."""
    print(f"| {first} | overall (95 %) | " + " | ".join(domains) + " |")
    print("|---|---|" + "---|" * len(domains))


def print_row(name: str, scores: Scores, base: Scores, spread: str = "") -> None:
    """One row: what was added overall with its interval, and in every domain with its own."""
    cells = [f"{mean_loss(scores) - mean_loss(base):+.3f} ({spread})"] if spread else [added(scores, base)]
    cells += [added({domain: scores[domain]}, {domain: base[domain]}) for domain in base]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def added(scores: Scores, base: Scores) -> str:
    """Loss added, and its paired interval."""
    interval = paired(scores, base, lambda after_R, before_R: after_R - before_R)
    said = f"{mean_loss(scores) - mean_loss(base):+.3f}"
    return said if interval.low is None else f"{said} ({interval.low:+.3f} to {interval.high:+.3f})"


def oracle(calibration: Documents, base: Scores) -> None:
    """Two of sixteen experts: every criterion's change of the layers' outputs against the best of all sets."""
    print(
        f"### {ORACLE} of 16 experts removed: change of the layers' outputs on calibration text, and loss added\n"
    )
    print("| criterion | change by layer | best of all sets | random sets | loss added (95 %) |")
    print("|---|---|---|---|---|")
    for criterion in ("naee", "reap", "man", "frequency", "aimer", "random"):
        loaded, result = changed(
            "prune_experts", calibration, criterion=criterion, count=ORACLE, compare_tokens=2048
        )
        layers = result.frames["layers"]
        cells = [
            " ".join(f"{v:.3f}" for v in layers[key]) for key in ("change", "change_best", "change_random")
        ]
        print(
            f"| {criterion} | " + " | ".join(cells) + f" | {added(measured(loaded, base), base)} |",
            flush=True,
        )
    print()


def matrix(base: Scores) -> None:
    """Half the experts by REAP calibrated on one domain (row): loss added on each (column)."""
    print(
        "### Half the experts removed by REAP, calibrated on the row's domain: loss added on the column's\n"
    )
    print_head("calibrated on", list(base))
    own, other = [], []
    for domain, documents in documents_by_domain(split="calibration").items():
        scores = lost("prune_experts", documents, base, share=0.5, criterion="reap")
        print_row(domain, scores, base)
        for name in base:
            gap = mean_loss({name: scores[name]}) - mean_loss({name: base[name]})
            (own if name == domain else other).append(gap)
    print(f"\nMean on the own domain {np.mean(own):+.3f}, on others {np.mean(other):+.3f} nats per token.\n")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
