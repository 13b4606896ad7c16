"""Our GPTQ against the textbook's, at equal calibration: seconds, processor time, peak memory, loss of the layers.

    python benchmarks/gptq.py [--model demo:smollm2] [--samples 128] [--sample-tokens 512] [--bits 4] [--threads 2] [--prefix]

Every row is a fresh process on the same windows, grids (affine, groups of 32, scales from the original weights),
damping 0.01 and order of inputs (falling Σx²). Time is that of the quantization; opening the model is left out.

* ``ours``: ``quantize_blocks`` with default settings, as the gptq step runs it.
* ``textbook``: as the authors published it (https://github.com/IST-DASLab/gptq): blocks in order, their inputs kept; one
  window at a time; each linear layer with an XᵀX of its own, also where layers read the same inputs; each weight by
  itself, column by column in runs of 128; then each window once more through the quantized block.
* ``textbook, prefix`` (``--prefix``): the same without keeping anything between blocks: for each block every window runs
  from the embedding to that block, as an implementation on hooks of the whole model does.

``layer loss`` is Σ over matrices of ‖X (Ŵ - W)ᵀ‖² per token, each implementation's on the inputs that it saw.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from core.calibrate.windows import calibration_windows
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.numerics.integer import code_range, quantize
from core.numerics.schemes import IntegerScheme
from core.quantize.blocks import quantize_blocks
from core.quantize.grid import GridSettings, assign
from core.quantize.stacks import GptqOptions
from core.text.documents import load_documents
from core.types import ModelRef, silent

DAMPING, RUN = 0.01, 128


def main() -> None:
    """Measure each implementation in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2", help="a dense decoder of linear layers")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens per window")
    parser.add_argument("--bits", type=int, default=4, help="bits per code")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--prefix", action="store_true", help="also the textbook without kept inputs")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options)))
        return
    names = ["textbook", "ours", *(["textbook, prefix"] if options.prefix else [])]
    size = f"{options.samples} × {options.sample_tokens} tokens"
    print(f"{options.model}, {options.bits} bits, {size}, {options.threads} threads\n")
    print("| implementation | wall s | of textbook's | processor s | of textbook's | peak MB | layer loss |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        row = rows[name] = in_fresh_process(name)
        wall, cpu = (
            f"{row[key]:.1f} | {row[key] / rows['textbook'][key]:.2f}" for key in ("wall_s", "cpu_s")
        )
        print(f"| {name} | {wall} | {cpu} | {row['peak_mb']:.0f} | {row['loss']:.4g} |", flush=True)
    print(
        f"\nThe model's weights are {row['base_mb']:.0f} MB in float32; a process that has only opened it peaked at "
        f"{row['open_mb']:.0f} MB."
    )


def in_fresh_process(name: str) -> dict[str, Any]:
    """One row, measured alone."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, and say what it took."""
    torch.set_num_threads(options.threads)
    loaded = open_model(ModelRef.parse(options.model))
    open_mb = peak_mb()
    text = load_documents("domains", split="calibration")
    windows = calibration_windows(
        loaded, text, samples=options.samples, sample_tokens=options.sample_tokens, seed=0
    )
    settings = GridSettings(bits=options.bits)
    base_mb = loaded.nbytes / 1e6
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        if name == "ours":
            how = GptqOptions(DAMPING, act_order=True, fit_grid=False)
            _, lines = quantize_blocks(
                loaded, windows, assign(loaded, settings), how, progress=silent, scratch=None
            )
            loss = sum(line["loss"] for line in lines)
        else:
            loss = textbook(loaded, windows, settings.grid, prefix="prefix" in name)
    return {
        "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_mb": peak_mb(),
        "base_mb": base_mb, "open_mb": open_mb, "loss": loss,
    }  # fmt: skip


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# --- the textbook -------------------------------------------------------------------------------------


class Seen(Exception):
    """Ends a forward pass at the block that is looked at."""


def textbook(loaded: LoadedModel, windows: torch.Tensor, scheme: IntegerScheme, *, prefix: bool) -> float:
    """Quantize every linear layer of every block; the total loss per token."""
    blocks = [loaded.model.get_submodule(block.path) for block in loaded.anatomy.blocks]
    total, kept = 0.0, None
    for block in blocks:
        calls = inputs_of(loaded, block, windows) if prefix or kept is None else kept
        layers = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        grams = {n: torch.zeros(m.in_features, m.in_features) for n, m in layers.items()}

        def add(name: str, x: torch.Tensor, grams: dict[str, torch.Tensor] = grams) -> None:
            x = x.flatten(0, -2).float()
            grams[name] += x.T @ x

        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in layers.items()]
        for hidden, arguments in calls:
            block(hidden, **arguments)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            total += quantize_layer(layer, grams[name], scheme) / windows.numel()
        if not prefix:
            kept = [(block(hidden, **arguments), arguments) for hidden, arguments in calls]
    return total


def inputs_of(
    loaded: LoadedModel, block: Any, windows: torch.Tensor
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What a block is called with, by a forward pass of each window from the embedding."""
    calls = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise Seen

    hook = block.register_forward_pre_hook(look, with_kwargs=True)
    for window in windows:
        with suppress(Seen):
            loaded.model(input_ids=window[None], use_cache=False)
    hook.remove()
    return calls


def quantize_layer(layer: Any, gram: torch.Tensor, scheme: IntegerScheme) -> float:
    """Round one weight by GPTQ; Σ ‖x (Ŵ - W)ᵀ‖² over all tokens."""
    original = layer.weight.data.clone()
    packed = quantize(original, scheme)
    assert packed.scale is not None
    assert packed.zero_point is not None
    scale = packed.scale.float().repeat_interleave(scheme.group_size or original.shape[1], 1)
    zero = packed.zero_point.float().repeat_interleave(scheme.group_size or original.shape[1], 1)
    low, high = code_range(scheme.bits)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    weight, scale, zero = original[:, order], scale[:, order], zero[:, order]
    hessian = gram[order][:, order]
    diagonal = torch.arange(len(gram))
    hessian[diagonal, diagonal] += DAMPING * gram.diagonal().mean() + (gram.diagonal()[order] == 0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    after = torch.zeros_like(weight)
    for first in range(0, len(gram), RUN):
        stop = min(first + RUN, len(gram))
        errors = torch.zeros_like(weight[:, first:stop])
        for column in range(first, stop):
            code = torch.clamp(torch.round(weight[:, column] / scale[:, column] + zero[:, column]), low, high)
            after[:, column] = (code - zero[:, column]) * scale[:, column]
            error = (weight[:, column] - after[:, column]) / factor[column, column]
            weight[:, column:stop] -= error[:, None] @ factor[None, column, column:stop]
            errors[:, column - first] = error
        weight[:, stop:] -= errors @ factor[first:stop, stop:]
    layer.weight.data = torch.zeros_like(original)
    layer.weight.data[:, order] = after
    error = layer.weight.data - original
    return float(((error @ gram) * error).sum())


if __name__ == "__main__":
    main()
