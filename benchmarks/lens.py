"""How much looking inside costs: residual capture against a plain forward, and the logit lens end to end.

Every row is timed in the same interleaved rounds, so that a noisy neighbour slows all rows alike; ratios compare rows
of one round. Beside wall time stands this process' CPU time: with ``--threads 1`` it is comparable on a busy machine
too, where threads that wait for each other make wall times meaningless (the inspector works in another process,
so its row has none). Run: ``python benchmarks/lens.py [MODEL] [--tokens N] [--rounds N] [--threads N]``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from core.capture import capture_residual
from core.inspector import Inspector
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes.logit_lens import LogitLensSettings, logit_lens
from core.types import ModelRef, Prompt, silent

TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. The capital of France is Paris, and the "
    "capital of Italy is Rome. Water boils at one hundred degrees, and freezes at zero. A transformer reads tokens, "
    "adds to the residual stream, and predicts the next token of the text that it has seen so far. "
)


def main() -> None:
    """Print one table: seconds per row, and each row's ratio to the plain forward of the same round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo:smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # the inspector's child inherits it
    torch.set_num_threads(arguments.threads)
    ref = ModelRef.parse(arguments.model)
    loaded = open_model(ref)
    prompt = _prompt(loaded, arguments.tokens)
    inspector = Inspector()
    inspector.open(ref)
    rows = _rows(loaded, prompt, inspector, ref)
    for run in rows.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in rows}
    cpu: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    inspector.close()
    print(
        f"{ref}, {arguments.tokens} tokens, {arguments.threads} threads, {arguments.rounds} rounds, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(_table(wall, cpu).to_string(float_format=lambda value: f"{value:.3f}"))


def _prompt(loaded: LoadedModel, n_tokens: int) -> Prompt:
    """A prompt of exactly ``n_tokens`` tokens."""
    words = itertools.cycle(TEXT.split())
    text = next(words)
    while len(loaded.tokenizer(text)["input_ids"]) < n_tokens:
        text += " " + next(words)
    while len(loaded.tokenizer(text)["input_ids"]) > n_tokens:
        text = text[:-1]
    return Prompt(text)


def _rows(
    loaded: LoadedModel, prompt: Prompt, inspector: Inspector, ref: ModelRef
) -> dict[str, Callable[[], object]]:
    inputs = {"input_ids": torch.tensor([loaded.tokenizer(prompt.text)["input_ids"]])}
    fresh = (Prompt(prompt.text[:-1] + ending) for ending in itertools.cycle("abcdefghijklmnopqrstuvwxyz"))

    def capture_all() -> None:
        with torch.inference_mode(), capture_residual(loaded):
            loaded.model(**inputs, use_cache=False)

    def lens(**settings: Any) -> Callable[[], object]:
        parsed = LogitLensSettings(**settings)
        return lambda: logit_lens(loaded, prompt, silent, parsed)

    return {
        "plain forward": lambda: _forward(loaded, inputs),
        "forward, all residuals captured": capture_all,
        "naive lens: log_softmax and topk per layer": lambda: _naive_lens(loaded, inputs),
        "logit lens, exact float32 kernels": lens(fp32_path="exact"),
        "logit lens": lens(),
        "logit lens, bfloat16 preview": lens(unembedding_precision="bfloat16"),
        # Another last letter each time, so that no answer is a kept one.
        "logit lens through the inspector": lambda: inspector.probe("logit_lens", ref, next(fresh)),
    }


def _forward(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(**inputs, use_cache=False).logits
    return logits


def _naive_lens(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> None:
    """The lens as it is usually written."""
    model, anatomy = loaded.model, loaded.anatomy
    norm, head = model.get_submodule(anatomy.final_norm), model.get_submodule(anatomy.unembedding)
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        final = torch.log_softmax(output.logits, -1)
        for hidden in output.hidden_states[:-1]:
            log_p = torch.log_softmax(head(norm(hidden)), -1)
            log_p.topk(5)
            -(log_p.exp() * log_p).sum(-1)
            (final.exp() * (final - log_p)).sum(-1)


def _table(wall: dict[str, list[float]], cpu: dict[str, list[float]]) -> pd.DataFrame:
    """Medians, best values, and ratios to the plain forward: of wall time per round, and of best CPU times."""
    plain = "plain forward"
    return pd.DataFrame(
        {
            name: {
                "wall_s": statistics.median(values),
                "best_wall_s": min(values),
                "wall_ratio": statistics.median(v / p for v, p in zip(values, wall[plain], strict=True)),
                "best_cpu_s": min(cpu[name]),
                "cpu_ratio": min(cpu[name]) / min(cpu[plain]),
            }
            for name, values in wall.items()
        }
    ).T


if __name__ == "__main__":
    main()
