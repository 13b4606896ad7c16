"""Integrated gradients here against Captum's: equal baseline, rule and steps, in interleaved rounds.

Both give the completeness gap too. A ratio compares rows of one round, in this process' CPU time beside wall time: with
``--threads 1`` it is comparable on a busy machine too. The numbers must agree to 1e-5 of the difference they share out; that
says nothing about convergence, so the gap of both is printed. Needs ``captum`` (in the dev extra).
Run: ``python benchmarks/attribution.py [MODEL] [--steps N] [--rounds N] [--threads N]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from captum.attr import IntegratedGradients

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes._input_game import InputSettings, build_game
from core.probes._input_gradient import Points, StraightPath
from core.probes._path_integral import gauss_legendre
from core.types import ModelRef, Prompt

TEXT = "When Mary and John went to the store, John gave a drink to"
Row = Callable[[], tuple[list[float], float]]
"""Attributions per token, and the completeness gap."""


def main() -> None:
    """Print seconds, ratio to Captum and gap of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo:smollm2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = open_model(ModelRef.parse(arguments.model, device=arguments.device))
    rows = {"slimscope": _ours(loaded, arguments.steps)}
    for batch in (None, 10):
        rows[f"captum, batch {batch or arguments.steps}"] = _captum(loaded, arguments.steps, batch)
    reference, _ = rows["slimscope"]()
    for name, row in rows.items():
        found, gap = row()
        off = max(abs(a - b) for a, b in zip(found, reference, strict=True))
        print(f"{name:24} gap {gap:+.4f}  largest difference {off:.1e}  sum {sum(found):.4f}")
    wall: dict[str, list[float]] = {name: [] for name in rows}
    cpu: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, row in rows.items():
            started, used = time.perf_counter(), time.process_time()
            row()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    for name in rows:
        ratio = statistics.median(a / b for a, b in zip(wall[name], wall["slimscope"], strict=True))
        used = statistics.median(a / b for a, b in zip(cpu[name], cpu["slimscope"], strict=True))
        print(f"{name:24} {statistics.median(wall[name]):8.2f} s  wall × {ratio:.2f}  CPU × {used:.2f}")


def _ours(loaded: LoadedModel, steps: int) -> Row:
    with torch.no_grad():
        game = build_game(loaded, Prompt(TEXT), InputSettings(target=" Mary", distractor=" John"))

    def run() -> tuple[list[float], float]:
        points = Points(game, 0)
        with torch.no_grad():
            x_PD = points.stream(game.embeddings())
        path = StraightPath(game, points, torch.zeros_like(x_PD), x_PD)
        found = gauss_legendre(path.evaluate, path.value, steps)
        return found.value_P.tolist(), found.gap

    return run


def _captum(loaded: LoadedModel, steps: int, batch: int | None) -> Row:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    mary, john = (tokenizer(word)["input_ids"][0] for word in (" Mary", " John"))

    def forward(x_BPD: torch.Tensor) -> torch.Tensor:
        logits_BV = loaded.model(inputs_embeds=x_BPD, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits_BV[:, mary] - logits_BV[:, john]

    def run() -> tuple[list[float], float]:
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]], device=loaded.device)
        x = loaded.model.get_input_embeddings()(ids).detach()
        found, gap = IntegratedGradients(forward).attribute(
            x,
            torch.zeros_like(x),
            n_steps=steps,
            method="gausslegendre",
            internal_batch_size=batch,
            return_convergence_delta=True,
        )
        return found.sum(-1)[0].tolist(), float(gap)

    return run


if __name__ == "__main__":
    main()
