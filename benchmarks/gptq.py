"""Our GPTQ against the textbook's and llm-compressor's, at equal calibration: seconds, peak memory, loss of the layers.

    python benchmarks/gptq.py [--model demo:smollm2] [--samples 128] [--sample-tokens 512] [--bits 4] [--threads 2]
                              [--prefix] [--peer PYTHON] [--no-textbook]

Every row is a fresh process on the same windows, grids (affine, groups of 32, scales from the original weights),
damping 0.01 and order of inputs (falling Σx²). Time is that of the quantization; opening the model is left out.

* ``ours``: ``quantize_blocks`` with default settings, as the gptq step runs it; also with ``precision=bfloat16``.
* ``textbook``: as the authors published it (https://github.com/IST-DASLab/gptq): blocks in order, their inputs kept; one
  window at a time; each linear layer with an XᵀX of its own, also where layers read the same inputs; each weight by
  itself, column by column in runs of 128; then each window once more through the quantized block.
* ``textbook, prefix`` (``--prefix``): the same without keeping anything between blocks: for each block every window runs
  from the embedding to that block, as an implementation on hooks of the whole model does.
* ``llm-compressor`` (``--peer``, the Python of an environment that has it): its ``oneshot`` with GPTQModifier.

``layer loss`` is Σ over matrices of ‖X (Ŵ - W)ᵀ‖² per token, on the inputs X of the unquantized model (the first windows
of the calibration, at most 16), the same for all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
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
    parser.add_argument("--peer", default="", help="Python of an environment with llm-compressor")
    parser.add_argument("--no-textbook", action="store_true", help="leave the slow row out")
    parser.add_argument("--one", nargs=2, default=(), metavar=("ROW", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--score", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options)))
        return
    if options.score:
        print(json.dumps(layer_loss(Path(options.score), options)))
        return
    names = [
        "ours", "ours, walk in bfloat16", *([] if options.no_textbook else ["textbook"]), *(["textbook, prefix"] if options.prefix else []),
        *(["llm-compressor"] if options.peer else []),
    ]  # fmt: skip
    size = f"{options.samples} × {options.sample_tokens} tokens"
    print(f"{options.model}, {options.bits} bits, {size}, {options.threads} threads\n")
    print("| implementation | wall s | of ours | processor s | of ours | peak MB | layer loss | of ours |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    ours: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "weights.safetensors"
            row = (
                by_peer(options, file) if name == "llm-compressor" else in_fresh_process("--one", name, file)
            )
            row["loss"] = in_fresh_process("--score", file)
        ours = ours or row
        cells = " | ".join(f"{row[key]:.4g} | {row[key] / ours[key]:.3f}" for key in ("wall_s", "cpu_s"))
        loss = f"{row['loss']:.4g} | {row['loss'] / ours['loss']:.4f}"
        print(f"| {name} | {cells} | {row['peak_mb']:.0f} | {loss} |", flush=True)
    print(
        f"\nThe model's weights are {ours['base_mb']:.0f} MB in float32; a process that has only opened it peaked at "
        f"{ours['open_mb']:.0f} MB."
    )


def in_fresh_process(*arguments: object) -> Any:
    """What this script prints with these arguments, alone."""
    command = [sys.executable, __file__, *sys.argv[1:], *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def by_peer(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """llm-compressor's row: it runs in its own environment, on the same windows."""
    loaded, windows = material(options)
    calibration, out = file.with_name("calibration.json"), file.with_name("out")
    calibration.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    script = Path(__file__).with_name("peers.py")
    command = [options.peer, script, "llm_compressor", options.bits, loaded.folder, out, calibration]
    threads = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **threads}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"llm-compressor ended with {child.returncode}; is it in {options.peer}?")
    facts = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    (out / "model.safetensors").rename(file)
    return {
        "wall_s": facts["seconds"], "cpu_s": facts["cpu_seconds"], "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }  # fmt: skip


def material(options: argparse.Namespace) -> tuple[LoadedModel, torch.Tensor]:
    """The model and the windows that all rows read."""
    loaded = open_model(ModelRef.parse(options.model))
    text = load_documents("domains", split="calibration")
    return loaded, calibration_windows(
        loaded, text, samples=options.samples, sample_tokens=options.sample_tokens, seed=0
    )


def measured(name: str, file: str, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, write the dense weights to ``file``, and say what quantizing took."""
    from safetensors.torch import save_file

    torch.set_num_threads(options.threads)
    loaded, windows = material(options)
    settings, open_mb = GridSettings(bits=options.bits), peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        if name.startswith("ours"):
            how = GptqOptions(
                DAMPING, act_order=True, fit_grid=False,
                precision="bfloat16" if "bfloat16" in name else "float32",
            )  # fmt: skip
            quantize_blocks(loaded, windows, assign(loaded, settings), how, progress=silent, scratch=None)
        else:
            textbook(loaded, windows, settings.grid, prefix="prefix" in name)
    row = {
        "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_mb": peak_mb(),
        "base_mb": loaded.nbytes / 1e6, "open_mb": open_mb,
    }  # fmt: skip
    save_file({name: weight.data.clone() for name, weight in loaded.model.named_parameters()}, file)
    return row


def layer_loss(file: Path, options: argparse.Namespace) -> float:
    """Σ ‖X (Ŵ - W)ᵀ‖² per token over the linear layers of all blocks, X of the unquantized model."""
    from safetensors.torch import load_file

    torch.set_num_threads(options.threads)
    loaded, windows = material(options)
    after = load_file(file)
    total = torch.zeros((), dtype=torch.float64)

    def add(change_OI: torch.Tensor, x: torch.Tensor) -> None:
        total.add_((x.flatten(0, -2) @ change_OI.T).square().sum())

    for block in loaded.anatomy.blocks:
        for name, module in loaded.model.get_submodule(block.path).named_modules():
            if isinstance(module, torch.nn.Linear):
                change = after[f"{block.path}.{name}.weight"] - module.weight.data
                module.register_forward_pre_hook(lambda _, args, change=change: add(change, args[0]))
    with torch.inference_mode():
        for window in windows[:16]:
            loaded.model(input_ids=window[None], use_cache=False)
    return float(total) / windows[:16].numel()


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# --- the textbook -------------------------------------------------------------------------------------


class Seen(Exception):
    """Ends a forward pass at the block that is looked at."""


def textbook(loaded: LoadedModel, windows: torch.Tensor, scheme: IntegerScheme, *, prefix: bool) -> None:
    """Quantize every linear layer of every block."""
    blocks = [loaded.model.get_submodule(block.path) for block in loaded.anatomy.blocks]
    kept = None
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
            quantize_layer(layer, grams[name], scheme)
        if not prefix:
            kept = [(block(hidden, **arguments), arguments) for hidden, arguments in calls]


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


def quantize_layer(layer: Any, gram: torch.Tensor, scheme: IntegerScheme) -> None:
    """Round one weight by GPTQ."""
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


if __name__ == "__main__":
    main()
