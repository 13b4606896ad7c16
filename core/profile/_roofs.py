"""Measures the roofs of a machine, in the process that ``core.profile.machine`` starts for it.

Reading: the largest value of a buffer far beyond every cache is looked for, by the fastest of three reductions that do
little beside reading. Arithmetic: square products, of which the best size counts. Overhead: decode steps of a decoder
so narrow that nothing is left but calls; with two depths, what a layer adds and what a step costs without any.

Each roof is the best of some repetitions in a fresh process. The GPU path times by events; it was never run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from statistics import median
from typing import Any

from core.cpu import physical_cores
from core.errors import CannotMeasure
from core.lazy import torch, transformers
from core.models.fp32_path import fast_fp32
from core.profile.environment import environment
from core.types import Progress

Row = tuple[Any, ...]
"""As in ``machine.COLUMNS``."""
BUFFER_BYTES = 2**28
"""Read at a time: eight times the largest cache of usual processors."""
PRODUCTS = (512, 1024, 2048)
DTYPES = ("float32", "bfloat16", "int8")
SLOWEST_PRODUCT_S = 2.0
"""A dtype whose smaller product predicts more for the next size is not tried at it."""
LAYERS = (2, 10)
REPEATS, ROOF_S = 9, 1.0
"""At least so many repetitions of each, and for so long."""


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """``{"device"}`` to the rows of all roofs, as JSON."""
    device = request["device"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CannotMeasure(
            "this machine has no CUDA device that torch can use; measure the roofs of the cpu"
        )
    rows: list[Row] = []
    stages = (("memory", _reading), ("matrix products", _products), ("empty layers", _overhead))
    with torch.inference_mode():
        for done, (name, stage) in enumerate(stages):
            progress(done, len(stages), f"roofs: {name}")
            rows += stage(device)
    return {
        "device": device,
        "environment": environment(device)["hash"],
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def _reading(device: str) -> Iterator[Row]:
    """Bandwidth of reading and of copying, by threads."""
    source = torch.ones(BUFFER_BYTES // 4, device=device)
    target = torch.empty_like(source)
    whole = source.view(torch.int32)
    readers = {
        "amax int32": lambda: whole.amax(),
        "amax float32": lambda: source.amax(),
        "norm float32": lambda: torch.linalg.vector_norm(source),
    }
    for threads in _thread_counts(device):
        torch.set_num_threads(threads)
        rates = {name: _per_s(read, BUFFER_BYTES, device) for name, read in readers.items()}
        kernel = max(rates, key=lambda name: rates[name][0])
        yield ("read_bandwidth", "", source.numel(), threads, *rates[kernel], "bytes/s", kernel)
        copied = _per_s(lambda: target.copy_(source), 2 * BUFFER_BYTES, device)
        yield ("copy_bandwidth", "", source.numel(), threads, *copied, "bytes/s", "copy float32")
    torch.set_num_threads(physical_cores())


def _products(device: str) -> Iterator[Row]:
    """Rate of n × n × n products by dtype and n, with all cores; float32 also on the path that profiles take."""
    for dtype in DTYPES:
        yield from _squares(dtype, "matmul" if dtype != "int8" else "int8 × int8 → int32", device)
    if device == "cpu":
        with fast_fp32() as path:
            yield from _squares("float32", f"matmul, {path.name}", device)


def _squares(dtype: str, kernel: str, device: str) -> Iterator[Row]:
    """A dtype's products, the larger only where the smaller ones promise that they end."""
    expected_s = 0.0
    for n in PRODUCTS:
        if expected_s > SLOWEST_PRODUCT_S:
            break
        multiply = _product(n, dtype, device)
        start = time.perf_counter()
        multiply()
        expected_s = (time.perf_counter() - start) * 8
        rate = _per_s(multiply, 2 * n**3, device)
        yield ("matrix_rate", dtype, n, physical_cores(), *rate, "FLOP/s", kernel)


def _product(n: int, dtype: str, device: str) -> Callable[[], Any]:
    """One n × n × n product."""
    if dtype == "int8":
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b)
    kind = getattr(torch, dtype)
    x, y = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    return lambda: x @ y


def _overhead(device: str) -> Iterator[Row]:
    """What a decode step through layers of next to no work takes: per layer, and without any."""
    torch.set_num_threads(1)  # nothing here is worth a second one, and waiting for it would be counted
    few, many = (_times_s(_empty_step(layers, device), device) for layers in LAYERS)
    n, kernel = min(len(few), len(many)), "transformers Llama, width 16, eager"
    best, middle = (_line(pick(few), pick(many)) for pick in (min, median))
    for place, quantity in enumerate(("layer_overhead", "step_overhead")):
        yield (quantity, "", LAYERS[1], 1, best[place], middle[place], n, "s", kernel)


def _line(few: float, many: float) -> tuple[float, float]:
    """Seconds per layer and beside the layers, from the steps of two depths; neither is below 0."""
    per_layer = max(0.0, (many - few) / (LAYERS[1] - LAYERS[0]))
    return per_layer, max(0.0, few - LAYERS[0] * per_layer)


def _empty_step(layers: int, device: str) -> Callable[[], None]:
    """A decode step of a seeded decoder whose matrices fit into registers; its cache starts again at 64 tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    model.eval().to(device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    state: dict[str, Any] = {"cache": None, "length": 0}

    def step() -> None:
        if state["length"] == 64:
            state.update(cache=None, length=0)
        output = model(input_ids=token, past_key_values=state["cache"], use_cache=True)
        state.update(cache=output.past_key_values, length=state["length"] + 1)

    return step


def _per_s(work: Callable[[], Any], amount: float, device: str) -> tuple[float, float, int]:
    """Amount per second: best, median, n."""
    times = _times_s(work, device)
    return amount / min(times), amount / median(times), len(times)


def _times_s(work: Callable[[], Any], device: str) -> list[float]:
    """Seconds of repetitions, the first left out."""
    work()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < ROOF_S:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    """Until the GPU is done, where there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _thread_counts(device: str) -> list[int]:
    """1, 2, 4 … and all cores; a GPU is asked once."""
    if device.startswith("cuda"):
        return [physical_cores()]
    powers = [2**k for k in range(12) if 2**k < physical_cores()]
    return [*powers, physical_cores()]
