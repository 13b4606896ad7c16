"""What looking inside costs on SmolLM2: exact patch grids against one forward per cell, and three promises beside them.

Grids of 30 layers × 16 positions (or × 9 heads) on prompt pairs that differ from their first token (early) and only
near their end (late). The other ways give the same numbers, checked in the same run: plain hooks on the model, one
forward per cell or one per layer with all its cells as a batch, and TransformerLens and nnsight in both forms where
they are installed. One forward per cell is timed on ``--cells`` cells spread over the grid and scaled to all of it.
Wall time is compared, and this process' CPU time: with ``--threads 1`` that stays comparable on a busy machine.

Run: ``python benchmarks/inspection.py [--pairs N] [--cells N] [--threads N]``. Not named after what it inspects with:
a script called inspect.py would hide Python's own module of that name.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import pandas as pd
import torch

from core.capture import capture_residual
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes._node_gradients import node_gradients
from core.probes._patch_grid import Grid, PatchSettings, node_of, open_grid
from core.probes.logit_lens import LogitLensSettings, logit_lens
from core.types import ModelRef, Prompt, silent

NAMES = ("Mary", "John", "Tom", "James", "Paul", "Mark", "Sarah", "Anna", "Peter", "David", "Jack")
OPENINGS = ("Then", "After", "While", "Since", "Once")
NODES = ("residual", "attention_out", "mlp_out", "head")
Timed = tuple[float, float]
"""(wall seconds, CPU seconds)."""


def main() -> None:
    """Print the ratios of every way to fill a grid, then the single promises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2, help="prompt pairs, at most 10")
    parser.add_argument(
        "--cells", type=int, default=24, help="cells timed of the forms that run one forward each"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="our grid is timed this often, the median is kept"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = open_model(ModelRef("demo:smollm2"))
    lens_mb = _lens_memory(loaded)
    print(
        f"demo:smollm2, {arguments.threads} threads, {arguments.pairs} prompt pairs, one-forward-per-cell forms timed on "
        f"{arguments.cells} cells and scaled, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for early in (True, False):
        rows = [
            _measure(loaded, pair, node, arguments)
            for pair in _pairs(early=early)[: arguments.pairs]
            for node in (NODES if pair == _pairs(early=early)[0] else ("residual",))
        ]
        kind = "differ from the first token" if early else "differ late"
        print(f"\nPrompts that {kind}: times the wall time (CPU time) of our exact grid, medians over pairs")
        print(_table(rows).to_string())
    print(f"\nall residuals captured: {_capture_ratio(loaded):.3f} × a plain forward (CPU time, 64 tokens)")
    print(f"attribution patching, all 480 cells: {_attribution_forwards(loaded):.1f} forwards (CPU time)")
    print(f"logit lens over 2,048 tokens: {lens_mb:.0f} MB above the peak of a plain forward")


def _pairs(*, early: bool) -> list[tuple[str, PatchSettings]]:
    """Ten prompts of 16 tokens; the corrupted one gives the drink to the other name, or also opens otherwise."""
    found = []
    for number, (a, b) in enumerate(itertools.pairwise(NAMES)):
        story = f"{a} and {b} went to the store last Friday, "
        opening = OPENINGS[number % len(OPENINGS)] if early else "When"
        corrupted = f"{opening} {story}{a} gave a drink to"
        settings = PatchSettings(corrupted=corrupted, target=f" {a}", distractor=f" {b}")
        found.append((f"When {story}{b} gave a drink to", settings))
    return found


def _measure(
    loaded: LoadedModel, pair: tuple[str, PatchSettings], node: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Ours and every other way on one pair: times the same work, and the largest difference of the numbers."""
    text, settings = pair[0], pair[1].model_copy(update={"node": node})

    def ours() -> tuple[Grid, torch.Tensor]:
        with torch.inference_mode():
            grid = open_grid(loaded, Prompt(text), settings)
            return grid, torch.tensor(grid.exact(grid.cells))

    grid, values = ours()
    assert node == "head" or grid.pair.n_tokens == 16
    own = [_timed(ours) for _ in range(arguments.rounds)]
    mine = (statistics.median(w for w, _ in own), statistics.median(c for _, c in own))
    row: dict[str, Any] = {"node": node, "cells": len(grid.cells), "ours_s": mine[0], "ours_cpu_s": mine[1]}
    step = max(1, len(grid.cells) // arguments.cells)
    some = list(range(0, len(grid.cells), step))
    for name, way in _ways(loaded, grid, node).items():
        indices, scale = (
            (some, len(grid.cells) / len(some)) if "per cell" in name else (list(range(len(grid.cells))), 1.0)
        )
        with torch.inference_mode():
            way(indices[:1])  # warm
            found: list[torch.Tensor] = []
            wall, cpu = _timed(lambda way=way, indices=indices, found=found: found.append(way(indices)))  # type: ignore[misc]
        row[name] = (wall * scale / mine[0], cpu * scale / mine[1])
        row[f"{name}: max difference"] = float((found[0].double() - values[indices]).abs().max())
    return row


def _ways(loaded: LoadedModel, grid: Grid, node: str) -> dict[str, Callable[[list[int]], torch.Tensor]]:
    """Name → a function from indices of cells to the metric of each."""
    ways: dict[str, Callable[[list[int]], torch.Tensor]] = {
        "hooks, one forward per cell": lambda indices: torch.cat(
            [_hooked(loaded, grid, node, [index]) for index in indices]
        ),
        "hooks, one forward per layer": lambda indices: torch.cat(
            [_hooked(loaded, grid, node, part) for part in _by_layer(grid, indices)]
        ),
    }
    if node != "residual":
        return ways
    for make in (_transformer_lens, _nnsight):
        with suppress(ImportError):
            name, run = make(grid)
            ways[f"{name}, one forward per cell"] = lambda indices, run=run: torch.cat(
                [run([i]) for i in indices]
            )  # type: ignore[misc]
            ways[f"{name}, one forward per layer"] = lambda indices, run=run: torch.cat(  # type: ignore[misc]
                [run(part) for part in _by_layer(grid, indices)]
            )
    return ways


def _by_layer(grid: Grid, indices: list[int]) -> list[list[int]]:
    """Indices in order, one list per layer."""
    return [list(part) for _, part in itertools.groupby(indices, key=lambda index: grid.cells[index].layer)]


def _hooked(loaded: LoadedModel, grid: Grid, node: str, indices: list[int]) -> torch.Tensor:
    """Whole forwards of one batch, each row with one cell of the same layer written by a hook."""
    cells = [grid.cells[index] for index in indices]
    block = loaded.anatomy.blocks[cells[0].layer]
    width = loaded.anatomy.head_dim
    patches = [grid.patch(cell) for cell in cells]

    def write(state: torch.Tensor) -> torch.Tensor:
        new = state.clone()
        for row, patch in enumerate(patches):
            columns = slice(patch.head * width, (patch.head + 1) * width) if node == "head" else slice(None)
            new[row, patch.start : patch.stop, columns] = patch.value
        return new

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (write(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": write(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

    path = {
        "residual": block.path,
        "head": block.o,
        "attention_out": block.attention_write,
        "mlp_out": block.mlp_write,
    }
    module = loaded.model.get_submodule(path[node])
    if node in ("residual", "head"):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    ids = grid.base_inputs["input_ids"].expand(len(cells), -1)
    logits = loaded.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    handle.remove()
    return grid.metric.of_logits(logits)


def _transformer_lens(grid: Grid) -> tuple[str, Callable[[list[int]], torch.Tensor]]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = _bridge(TransformerBridge)

    def run(indices: list[int]) -> torch.Tensor:
        cells = [grid.cells[index] for index in indices]
        rows, positions = torch.arange(len(cells)), torch.tensor([cell.start for cell in cells])
        values = torch.cat([grid.patch(cell).value for cell in cells])

        def hook(state: torch.Tensor, hook: Any) -> torch.Tensor:
            state = state.clone()
            state[rows, positions] = values
            return state

        name = f"blocks.{cells[0].layer}.hook_in"
        if name not in bridge.hook_dict:
            name = f"blocks.{cells[0].layer}.hook_resid_pre"
        ids = grid.base_inputs["input_ids"].expand(len(cells), -1)
        return grid.metric.of_logits(bridge.run_with_hooks(ids, fwd_hooks=[(name, hook)])[:, -1])

    return "TransformerLens", run


def _nnsight(grid: Grid) -> tuple[str, Callable[[list[int]], torch.Tensor]]:
    from nnsight import LanguageModel

    loaded = _copy_for("nnsight")
    wrapped = LanguageModel(loaded.model, tokenizer=loaded.tokenizer)

    def run(indices: list[int]) -> torch.Tensor:
        cells = [grid.cells[index] for index in indices]
        rows, positions = torch.arange(len(cells)), torch.tensor([cell.start for cell in cells])
        values = torch.cat([grid.patch(cell).value for cell in cells])
        layer = cells[0].layer
        ids = grid.base_inputs["input_ids"].expand(len(cells), -1).contiguous()
        with wrapped.trace(ids):
            wrapped.model.layers[layer].input[rows, positions] = values
            logits = wrapped.lm_head.output[:, -1].save()
        return grid.metric.of_logits(logits)

    return "nnsight", run


@cache
def _bridge(kind: Any) -> Any:
    """TransformerLens around a model of its own, wrapped once."""
    loaded = _copy_for("TransformerLens")
    return kind.boot_transformers(
        str(loaded.folder),
        hf_model=loaded.model,
        tokenizer=loaded.tokenizer,
        device="cpu",
        dtype=torch.float32,
    )


@cache
def _copy_for(library: str) -> LoadedModel:
    """A model of its own: TransformerLens replaces modules of the one it is given."""
    return open_model(ModelRef("demo:smollm2"))


def _timed(run: Callable[[], object]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One line per node and way: ratios to ours as medians over pairs, the largest difference over all."""
    lines = []
    for node in NODES:
        of_node = [row for row in rows if row["node"] == node]
        wall, cpu = (statistics.median(row[name] for row in of_node) for name in ("ours_s", "ours_cpu_s"))
        lines.append((node, "ours, exact grid", f"{wall:.2f} s", f"{cpu:.2f} s", ""))
        for way in (name for name, value in of_node[0].items() if isinstance(value, tuple)):
            ratios = [statistics.median(row[way][n] for row in of_node) for n in (0, 1)]
            gap = max(row[f"{way}: max difference"] for row in of_node)
            lines.append((node, way, f"{ratios[0]:.1f} ×", f"({ratios[1]:.1f} ×)", f"{gap:.1e}"))
    return pd.DataFrame(lines, columns=["node", "way", "wall", "CPU", "max difference"]).set_index("node")


def _inputs(n_tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(100, 40_000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


def _capture_ratio(loaded: LoadedModel) -> float:
    """CPU time of a forward that captures every residual stream, over a plain one; median of interleaved rounds."""
    inputs = _inputs(64)

    def plain() -> None:
        loaded.model(**inputs, use_cache=False)

    def captured() -> None:
        with capture_residual(loaded):
            loaded.model(**inputs, use_cache=False)

    with torch.inference_mode():
        plain()
        return statistics.median(_timed(captured)[1] / _timed(plain)[1] for _ in range(15))


def _attribution_forwards(loaded: LoadedModel) -> float:
    """CPU time of recording both runs and taking one gradient, in forwards of the same prompt."""
    text, settings = _pairs(early=True)[0]

    def whole() -> None:
        with torch.inference_mode():
            grid = open_grid(loaded, Prompt(text), settings)
        node_gradients(loaded, grid.base_inputs, node_of(settings.node), grid.metric.of_logits)

    inputs = _inputs(16)

    def forward() -> None:
        with torch.inference_mode():
            loaded.model(**inputs, use_cache=False)

    whole()
    return statistics.median(_timed(whole)[1] / _timed(forward)[1] for _ in range(9))


def _lens_memory(loaded: LoadedModel) -> float:
    """Peak memory of the lens over 2,048 tokens above the peak of a plain forward over them, MB; asked first of all."""
    inputs = _inputs(2048)
    with torch.inference_mode():
        loaded.model(**inputs, use_cache=False, logits_to_keep=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = " the" * 2048
    logit_lens(loaded, Prompt(words), silent, LogitLensSettings(positions=0, layer_stride=10))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
