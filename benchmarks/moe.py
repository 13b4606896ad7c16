"""What watching a mixture of experts costs: capture against a plain forward, and counting a million tokens.

Two models: ``demo:moe`` (or a random one of its shape where it is not built), and a random one of 64 experts, 8 per
token. Rows of a model are timed in the same interleaved rounds on 2,048 tokens, and ratios compare rows of one round;
beside wall time stands this process' CPU time, which with one thread stays comparable on a busy machine. Memory is the
peak of resident memory while counting, above what the process held with the model opened and the text read.

Run: ``python benchmarks/moe.py [--tokens N] [--rounds N] [--aggregate N] [--threads N]``; with ``--aggregate 100000``
a tenth of the million is counted, and its time scaled.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.models.demo import DEMOS
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.routing._tally import Tally, Wanted
from core.routing.aggregate import aggregate
from core.routing.discover import moe_layers
from core.routing.lens import Change, Routed, routed
from core.text.documents import load_documents
from core.types import Documents, ModelRef

MILLION = 1_000_000
CONTEXT = 512
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""``demo:moe``'s."""
WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--aggregate", type=int, default=MILLION, help="tokens that are counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="slimscope-bench-") as folder:
        for name, source in _sources(Path(folder)).items():
            loaded = open_model(ModelRef(source))
            # Memory first: a peak that timing had reached already would hide it.
            counted = _counting(loaded, arguments.aggregate)
            rows += [{"model": name, **row} for row in (*_timed(loaded, arguments), *counted)]
    print(
        f"{arguments.tokens:,} tokens in rows of {CONTEXT}, medians of {arguments.rounds} rounds, {arguments.threads} threads, "
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(pd.DataFrame(rows).fillna("").to_string(index=False))


def _sources(folder: Path) -> dict[str, str]:
    """Name → model syntax of both models; random ones are written to ``folder``."""
    small = "demo:moe" if "moe" in DEMOS else str(_written(folder / "small", SHAPE))
    return {
        f"{'demo:moe' if small == 'demo:moe' else 'random, demo shape'} (16 experts, top 2)": small,
        "random (64 experts, top 8)": str(_written(folder / "wide", WIDE)),
    }


def _written(folder: Path, shape: dict[str, Any]) -> Path:
    """A random OLMoE of this shape, with a tokenizer of single bytes."""
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape)).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


# --- time ---------------------------------------------------------------------------------------------


def _timed(loaded: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to watch, against the plain forward of the same round."""
    batch = max(1, arguments.tokens // CONTEXT)
    vocab = loaded.anatomy.vocab_size
    ids_BP = torch.randint(
        0, vocab, (batch, arguments.tokens // batch), generator=torch.Generator().manual_seed(1)
    )
    ways = _ways(loaded, ids_BP)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    # Each round starts at another row, so that no row always follows the same one.
    orders = (tuple(ways)[first:] + tuple(ways)[:first] for first in itertools.cycle(range(len(ways))))
    with loaded.lock, torch.inference_mode():
        for order in itertools.islice(orders, arguments.rounds + 1):
            for name in order:
                times[name].append(_once(loaded, ids_BP, ways[name]()))
    plain, *others = ways
    warm = {name: found[1:] for name, found in times.items()}
    seconds = statistics.median(wall for wall, _ in warm[plain])
    rows: list[dict[str, Any]] = [{"measured": plain, "value": f"{1e3 * seconds:.0f} ms"}]
    for name in others:
        wall, cpu = (
            statistics.median(
                mine[i] / theirs[i] for mine, theirs in zip(warm[name], warm[plain], strict=True)
            )
            for i in (0, 1)
        )
        goal = "≤ 1.05" if name == "routing captured" else ""
        rows.append({"measured": name, "value": f"{cpu:.3f} × CPU time, {wall:.3f} × wall", "goal": goal})
    return rows


def _ways(loaded: LoadedModel, ids_BP: torch.Tensor) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    layers = moe_layers(loaded.model)
    decided: list[Routed] = []
    with torch.inference_mode(), routed(loaded, decided.append):
        loaded.model(input_ids=ids_BP, use_cache=False)
    replay = Change(replay={at.layer: (at.experts_TK, at.weights_TK) for at in decided})

    def captured() -> AbstractContextManager[None]:
        seen: list[Routed] = []
        return routed(loaded, seen.append)

    def counted() -> AbstractContextManager[None]:
        tally = Tally(layers, Wanted(norms=False, tokens=0, predicted=0, documents=0), loaded.model.device)
        tally.start(ids_BP.flatten(), torch.zeros_like(ids_BP).flatten(), ids_BP.numel())
        return routed(loaded, tally.observe)

    return {
        "plain forward": nullcontext,
        "routing captured": captured,
        "and counted": counted,
        "experts' norms captured": lambda: routed(loaded, lambda at: None, norms=True),
        "own routing replayed": lambda: routed(loaded, change=replay),
    }


def _once(
    loaded: LoadedModel, ids_BP: torch.Tensor, watching: AbstractContextManager[None]
) -> tuple[float, float]:
    """Wall and CPU seconds of one forward pass, opening and closing the lens included."""
    started, used = time.perf_counter(), time.process_time()
    with watching:
        loaded.model(input_ids=ids_BP, use_cache=False)
    return time.perf_counter() - started, time.process_time() - used


# --- memory -------------------------------------------------------------------------------------------


def _counting(loaded: LoadedModel, n_tokens: int) -> list[dict[str, Any]]:
    """Count a tenth of the tokens, then all of them: memory must not grow with the text."""
    documents = _text(loaded, n_tokens)
    before = _memory("VmRSS")
    rows: list[dict[str, Any]] = []
    for share, name in ((0.1, "tenth of them counted"), (1.0, f"{n_tokens:,} tokens counted")):
        _forget_peak()
        used = time.process_time()
        found = aggregate(loaded, documents, max_tokens=int(share * n_tokens))
        seconds = time.process_time() - used
        per_million = seconds * MILLION / found.n_tokens
        value = f"{_memory('VmHWM') - before:.0f} MB above the model, {per_million:.0f} s of CPU per million tokens"
        rows.append({"measured": name, "value": value, "goal": "< 300 MB" if share == 1 else ""})
    return rows


def _text(loaded: LoadedModel, n_tokens: int) -> Documents:
    """Domain text, repeated until it has enough tokens; repeats are the same strings and take no memory."""
    documents = load_documents("domains")
    n_once = sum(len(loaded.tokenizer(text)["input_ids"]) for text in documents.texts)
    return Documents(documents.name, documents.split, documents.texts * (1 + n_tokens // n_once))


def _memory(field: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _forget_peak() -> None:
    """Let the kernel start its peak (VmHWM) again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
