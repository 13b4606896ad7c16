"""How much of what the profiler reports is the profiler? Three checks on this machine, printed as one card.

A profiler is a measuring instrument, so it is measured like one:

1. *Bias.* The same prefill and decode steps are timed by a bare loop around ``time.perf_counter`` in another fresh
   process. The ratio of the medians should be 1: the loop between two samples (reading counters, keeping records)
   lies outside the timed regions and must not leak into them.
2. *Repeatability.* The whole measurement is repeated; the medians' spread should be no wider than the intervals.
3. *The float32 path.* The same model with ``fp32_path`` exact and auto, in the same session: what oneDNN is worth.

    python benchmarks/profiling.py [--model demo:smollm2] [--tier rapid] [--repeats 3]

The model is any causal language model that Slimscope opens. Progress goes to standard error, a human-readable card to standard
output, and the last line of that is one JSON document. Run it on a quiet machine: flags are printed, and a flagged
ratio says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from core.models.open import local_folder
from core.profile.fresh import child_environment
from core.profile.runtimes.torch_eager import TorchEagerSettings, run
from core.types import ModelRef, Result

HEADLINES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_ms",
    "tpot_ms",
    "load_ms",
    "peak_memory_bytes",
)

BARE_LOOP = """
import json, sys, time, numpy, torch, transformers
folder, prompt_tokens, new_tokens, threads, seed = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
ids = numpy.random.default_rng(seed).integers(0, model.config.vocab_size, (1, prompt_tokens))
ids, prefill, decode = torch.from_numpy(ids), [], []
with torch.inference_mode():
    for _ in range(12):
        start = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        prefill.append((time.perf_counter() - start) * 1e3)
        for _ in range(new_tokens):
            start = time.perf_counter()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            decode.append((time.perf_counter() - start) * 1e3)
print(json.dumps({"ttft_ms": prefill[4:], "tpot_ms": decode[4 * new_tokens:]}))
"""


def main() -> None:
    """Run the three checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="demo:smollm2", help="a causal language model (default: %(default)s)"
    )
    parser.add_argument("--tier", choices=["rapid", "quick", "full"], default="rapid")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = local_folder(ModelRef.parse(args.model), progress=report)
    exact = TorchEagerSettings(tier=args.tier, fp32_path="exact")

    # Interleaved, so that a machine that slowly changes does not favour one of the three.
    bare, repeats, fast = [], [], []
    for _ in range(args.repeats):
        bare.append(bare_loop(folder, exact))
        repeats.append(run(folder, report, exact))
        fast.append(run(folder, report, exact.model_copy(update={"fp32_path": "auto"})))
    card = {
        "profiler_over_bare_loop": {
            name: middle([headline(r, name) for r in repeats]) / middle([b[name] for b in bare])
            for name in ("ttft_ms", "tpot_ms")
        },
        "spread_over_repeats": {name: spread([headline(r, name) for r in repeats]) for name in HEADLINES},
        "interval_half_width": {
            name: middle([half_width(r, name) for r in repeats]) for name in HEADLINES[:4]
        },
        "auto_over_exact": {
            name: middle([headline(r, name) for r in fast]) / middle([headline(r, name) for r in repeats])
            for name in HEADLINES[:2]
        },
        "auto": {name: middle([headline(r, name) for r in fast]) for name in HEADLINES},
        "exact": {name: middle([headline(r, name) for r in repeats]) for name in HEADLINES},
        "seconds_per_measurement": middle([r.provenance.seconds for r in [*repeats, *fast]]),
        "fp32_path": fast[0].provenance.conditions["fp32_path"],
        "flags": sorted({flag for r in [*repeats, *fast] for flag in r.flags}),
        "protocol": repeats[0].provenance.protocol,
    }
    for title, value in card.items():
        print(f"{title:26}", show(value))
    print(json.dumps(card))


def bare_loop(folder: Path, settings: TorchEagerSettings) -> dict[str, float]:
    """Median times of the same work in a loop with nothing around it, milliseconds."""
    numbers = (settings.prompt_tokens, settings.new_tokens, settings.n_threads, settings.seed)
    said = subprocess.run(
        [sys.executable, "-c", BARE_LOOP, str(folder), *map(str, numbers)],
        env=os.environ | child_environment(settings.n_threads),
        stdout=subprocess.PIPE,
        check=True,
    )
    return {name: middle(values) for name, values in json.loads(said.stdout).items()}


def headline(result: Result, name: str) -> float:
    """One metric's value."""
    return next(metric.value for metric in result.metrics if metric.name == name)


def half_width(result: Result, name: str) -> float:
    """Half the width of a metric's interval, as a share of its value; infinite where there is none."""
    found = next(metric for metric in result.metrics if metric.name == name)
    if found.low is None or found.high is None:
        return float("inf")
    return (found.high - found.low) / 2 / found.value


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Highest less lowest, as a share of the median."""
    return (max(values) - min(values)) / middle(values)


def show(value: object) -> str:
    """A value for people."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {number:,.3f}" for name, number in value.items())
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def report(done: float, total: float, message: str) -> None:
    """Progress to standard error."""
    print(f"\r{done:6.0f} / {total:.0f} s  {message:<70}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
