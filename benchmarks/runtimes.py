"""The demo models in every runtime that runs here: bytes, prefill, decode, memory, parity, share of bandwidth.

    python benchmarks/runtimes.py [--models demo:smollm2 demo:minilm] [--tier quick] [--only WORD] [--json FILE]

Each cell is a fresh process. Plain torch in bfloat16, which the ratios are against, is measured first and again last;
how far those two differ is how far this machine drifted meanwhile, and no ratio is better known than that. KL is what
the runtime's own answers lose against the artifact in float32, in nats per position. The share of bandwidth is what a
decode step has to read (weights as they lie in memory, and the cache) at the pace measured, over the best read bandwidth
of this machine. Run it on a quiet machine: what was disturbed is marked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.catalog.store import Catalog
from core.errors import SlimscopeError
from core.loop import make_variant, profile_variant, register
from core.profile.machine import machine_roofs
from core.recipe import Recipe
from core.types import Run


@dataclass(frozen=True)
class Cell:
    """One line of the table: a model in a runtime."""

    label: str
    runtime: str = "torch_eager"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    """Compress steps that make the variant; none for the model itself."""


REFERENCE = Cell("torch bf16 eager", settings={"dtype": "bfloat16"})
DECODERS = (
    Cell("torch fp32 eager", settings={"dtype": "float32"}),
    Cell("torch bf16 compile", "torch_compile", {"dtype": "bfloat16"}),
    Cell("torch fp32 compile", "torch_compile", {"dtype": "float32"}),
    Cell("quanto int8", steps=({"method": "quanto_weights", "settings": {"format": "int8"}},)),
    Cell("ONNX Runtime fp32", "onnx_runtime"),
    Cell("ONNX Runtime int8", "onnx_runtime", {"weights": "int8"}),
    Cell("ONNX Runtime int4", "onnx_runtime", {"weights": "int4"}),
    Cell("GenAI fp32", "ort_genai"),
    Cell("GenAI int8", "ort_genai", {"weights": "int8"}),
    Cell("GenAI int4", "ort_genai", {"weights": "int4"}),
    Cell("OpenVINO fp32", "openvino", {"precision": "float32"}),
    Cell("OpenVINO int8", "openvino", {"weights": "int8", "precision": "bfloat16"}),
    Cell("OpenVINO int4", "openvino", {"weights": "int4", "precision": "bfloat16"}),
    Cell("llama.cpp Q8_0", "llama_cpp", {"weights": "q8_0"}),
    Cell("llama.cpp Q4_1", "llama_cpp", {"weights": "q4_1"}),
)
ENCODERS = tuple(
    cell
    for cell in DECODERS
    if cell.runtime in ("torch_eager", "onnx_runtime", "openvino") and not cell.steps
)


@dataclass(frozen=True)
class Row:
    """What was measured of a cell."""

    label: str
    mega_bytes: float
    prefill: float | None
    decode: float | None
    decode_low: float | None
    decode_high: float | None
    memory_mb: float
    kl: float | None
    cosine: float | None
    share: float | None
    flags: tuple[str, ...]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["demo:smollm2", "demo:minilm"])
    parser.add_argument("--tier", default="quick", choices=["rapid", "quick", "full"])
    parser.add_argument("--only", default="", help="only rows whose name holds this word")
    parser.add_argument("--json", metavar="FILE", help="write every row there, too")
    arguments = parser.parse_args()
    roofs = machine_roofs(progress=_said)
    bandwidth = roofs.read_bytes_per_s()
    print(f"best read bandwidth {bandwidth / 1e9:.1f} GB/s {' '.join(roofs.flags)}")
    kept: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(f"sqlite:///{folder}/catalog.db")
        for model in arguments.models:
            rows = list(_rows(catalog, model, arguments.tier, arguments.only, bandwidth))
            _print(model, rows)
            kept[model] = [asdict(row) for row in rows]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(kept, indent=1))


def _rows(catalog: Catalog, model: str, tier: str, only: str, bandwidth: float) -> Iterator[Row]:
    base = register(catalog, model)
    cells = DECODERS if base.family == "decoder" else ENCODERS
    chosen = [cell for cell in cells if only.lower() in cell.label.lower()]
    for cell in (REFERENCE, *chosen, REFERENCE):
        started = time.perf_counter()
        print(f"{model}: {cell.label} …", end=" ", file=sys.stderr, flush=True)
        try:
            variant = base.id
            if cell.steps:
                recipe = Recipe.parse({"steps": [dict(step) for step in cell.steps]})
                variant = make_variant(catalog, model, recipe).variant.id
            run = profile_variant(
                catalog, variant, method=cell.runtime, settings={"tier": tier, **cell.settings}
            )
        except SlimscopeError as error:
            print(f"not measured: {error}", file=sys.stderr)
            continue
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
        yield _row(cell, run, bandwidth)


def _row(cell: Cell, run: Run, bandwidth: float) -> Row:
    # Names end in the runtime and its weights; here the row says that already.
    found = {metric.name: metric for metric in run.measurements}

    def value(stem: str) -> float | None:
        names = [name for name in found if name == stem or name.startswith(f"{stem}_")]
        return found[min(names, key=len)].value if names else None

    decode = next((m for name, m in found.items() if name.startswith("decode_tokens_per_s")), None)
    weights, cache = value("weights_memory_bytes") or 0.0, value("kv_cache_bytes") or 0.0
    return Row(
        label=cell.label,
        mega_bytes=weights / 1e6,
        prefill=value("prefill_tokens_per_s"),
        decode=decode.value if decode else None,
        decode_low=decode.low if decode else None,
        decode_high=decode.high if decode else None,
        memory_mb=(value("peak_memory_bytes") or 0.0) / 1e6,
        kl=value("parity_kl"),
        cosine=value("parity_cosine"),
        share=(weights + cache) * decode.value / bandwidth if decode else None,
        flags=run.flags,
    )


def _print(model: str, rows: list[Row]) -> None:
    if not rows:
        return
    unit = "decode" if rows[0].decode is not None else "prefill"
    reference = getattr(rows[0], unit)
    print(f"\n{model}, one sequence; tokens/s with 95 % interval; × is {unit} over {rows[0].label}")
    print(
        f"{'':20} {'MB':>6} {'prefill':>8} {'decode':>8} {'':>15} {'×':>5} {'peak MB':>8} {'KL':>9} {'cosine':>9} {'share':>6}"
    )
    for row in rows:
        interval = f"[{_text(row.decode_low, '.1f')}, {_text(row.decode_high, '.1f')}]" if row.decode else ""
        print(
            f"{row.label:20} {row.mega_bytes:6.0f} {_text(row.prefill, '.0f'):>8} {_text(row.decode, '.1f'):>8} {interval:>15} "
            f"{getattr(row, unit) / reference:5.2f} {row.memory_mb:8.0f} {_text(row.kl, '.2g'):>9} {_text(row.cosine, '.6f'):>9} "
            f"{_text(row.share, '.0%'):>6} {' '.join(row.flags)}"
        )
    print(flush=True)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _said(done: float, total: float, message: str) -> None:
    print(f"\r{message}\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
