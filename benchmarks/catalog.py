"""How quick the catalog is with 100 000 runs and a million measurements: ``python benchmarks/catalog.py``.

Builds the catalog in a temporary folder by bulk insert, then times what the pages ask, each several times on a
warm cache, and prints one table: median and worst in milliseconds, and the processor time of the median call,
which says more than the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from core.catalog.queries import MEASURES, tradeoff_frame, variant_detail
from core.catalog.store import Catalog
from core.catalog.tables import (
    Headline,
    JobRow,
    LayerStat,
    MeasurementRow,
    RecipeRow,
    RunRow,
    VariantEdge,
    VariantRow,
)
from core.jobs.queue import Queue
from core.types import Measurement, Run

START = datetime(2026, 1, 1, tzinfo=UTC)
RUNS_PER_VARIANT = 4
NAMES = MEASURES[:10]
LAYERS = 50


def variant_rows(base: str, count: int) -> Iterator[dict[str, Any]]:
    """A base and its variants."""
    for i in range(count):
        yield {
            "id": base if i == 0 else f"{base}-{i:06}",
            "name": f"rtn {i}",
            "source": "demo:synthetic",
            "base_id": base,
            "recipe_hash": None if i == 0 else f"recipe-{i % 500}",
            "artifact": None,
            "format": "int4",
            "fingerprint": f"{base}-{i}",
            "architecture": "llama",
            "family": "decoder",
            "parameters": 135_000_000,
            "bytes": 80_000_000 + i,
            "bits_per_weight": 2 + 6 * random.random(),
            "proven": True,
            "hidden": False,
            "created_at": START + timedelta(seconds=i),
        }


def run_rows(variants: list[str]) -> Iterator[dict[str, Any]]:
    """Runs of every variant, a minute apart."""
    for i, variant in enumerate(variants):
        for j in range(RUNS_PER_VARIANT):
            at = START + timedelta(minutes=i * RUNS_PER_VARIANT + j)
            yield {
                "id": f"{variant}:{j}",
                "kind": "evaluate",
                "variant_id": variant,
                "status": "valid",
                "flags": [],
                "protocol": "synthetic 1",
                "conditions": {"threads": 2},
                "environment": None,
                "started_at": at,
                "ended_at": at,
                "job_id": None,
            }


def number(name: str) -> dict[str, Any]:
    """A number with an interval."""
    value = random.random()
    return {
        "name": name,
        "value": value,
        "low": value * 0.9,
        "high": value * 1.1,
        "unit": "",
        "better": "lower",
    }


def fill(catalog: Catalog, runs: int) -> list[str]:
    """Fill the catalog; returns the ids of the bases, the one with all but 1000 runs' variants first."""
    total = runs // RUNS_PER_VARIANT
    bases = {"big": total - total // 100, "small": total // 100}
    variants = [row for base, count in bases.items() for row in variant_rows(base, count)]
    ids = [row["id"] for row in variants]

    def measurements() -> Iterator[dict[str, Any]]:
        for id_ in ids:
            for j in range(RUNS_PER_VARIANT):
                for name in NAMES:
                    extra = {"run_id": f"{id_}:{j}", "n": 24, "interval": "", "conditions": {}}
                    yield number(name) | extra

    def headlines() -> Iterator[dict[str, Any]]:
        for id_ in ids:
            run = {"variant_id": id_, "status": "valid", "ended_at": START, "run_id": f"{id_}:0"}
            yield from (number(name) | run for name in NAMES)

    tables: dict[type, Any] = {
        RecipeRow: (
            {"hash": f"recipe-{i}", "canonical": f'{{"steps":[{{"method":"rtn","n":{i}}}]}}', "method": "rtn"}
            for i in range(500)
        ),
        VariantRow: variants,
        VariantEdge: (
            {"child_id": row["id"], "parent_id": row["base_id"], "position": 0, "role": "source"}
            for row in variants
            if row["id"] != row["base_id"]
        ),
        RunRow: run_rows(ids),
        MeasurementRow: measurements(),
        Headline: headlines(),
        LayerStat: layer_rows(ids[1:2]),
        JobRow: job_rows(20_000),
    }
    with catalog.write() as session:
        for table, rows in tables.items():
            for batch in chunks(rows):
                session.execute(insert(table), batch)
    return list(bases)


def layer_rows(variants: list[str]) -> Iterator[dict[str, Any]]:
    """Per-weight errors of the first run of some variants."""
    for variant in variants:
        for i in range(LAYERS):
            yield {
                "run_id": f"{variant}:0",
                "position": i,
                "module": f"model.layers.{i}.mlp",
                "layer": i,
                "component": "mlp",
                "bits": 4.0,
                "parameters": 1000,
                "relative_error": random.random(),
                "sqnr_db": 30.0,
                "touched": True,
            }


def job_rows(count: int) -> Iterator[dict[str, Any]]:
    """Jobs that have succeeded."""
    for i in range(count):
        yield {
            "id": f"job-{i:06}",
            "group_id": f"job-{i // 3:06}",
            "kind": "evaluate",
            "spec": {},
            "state": "succeeded",
            "token": None,
            "attempt": 1,
            "max_attempts": 2,
            "done": 1.0,
            "total": 1.0,
            "message": "",
            "error": "",
            "log_path": "",
            "created_at": START + timedelta(seconds=i),
            "cancel_requested": False,
            "depends_on": None,
            "blocked": False,
            "result": {},
        }


def chunks(rows: Any) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches small enough for memory, large enough for speed."""
    iterator = iter(rows)
    while batch := list(islice(iterator, 50_000)):
        yield batch


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median, worst and median processor milliseconds of a call, after one run that warms the cache."""
    call()
    wall, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        call()
        wall.append((time.perf_counter() - start) * 1000)
        cpu.append((time.process_time() - used) * 1000)
    return statistics.median(wall), max(wall), statistics.median(cpu)


def one_run(catalog: Catalog, base: str) -> Callable[[], Any]:
    """A call that records one more run of ten measurements."""
    from core.catalog.store import new_id

    def record() -> Run:
        measurements = tuple(Measurement(name, 0.5, "", "lower", 24, 0.4, 0.6) for name in NAMES)
        run = Run(new_id(), "evaluate", base, "valid", (), "p", {}, "", START, START, None, measurements)
        return catalog.record_run(run)

    return record


def main() -> None:
    """Build, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "catalog.sqlite"
        url = f"sqlite:///{file}"
        catalog = Catalog(url)
        start = time.perf_counter()
        big, small = fill(catalog, arguments.runs)
        seconds = time.perf_counter() - start
        catalog.close()
        print(
            f"{arguments.runs:,} runs, {arguments.runs * len(NAMES):,} measurements: {seconds:.1f} s to fill, "
            f"{file.stat().st_size / 1e6:.0f} MB\n"
        )
        reader = Catalog(url, read_only=True)
        last = Queue(reader).jobs(50)[-1]
        questions: dict[str, Callable[[], Any]] = {
            "open (read-only)": lambda: Catalog(url, read_only=True).close(),
            "revision": reader.revision,
            f"tradeoff_frame, {len(reader.variants(big)):,} variants": lambda: tradeoff_frame(reader, big),
            f"tradeoff_frame, {len(reader.variants(small)):,} variants": lambda: tradeoff_frame(
                reader, small
            ),
            "variant_detail (click)": lambda: variant_detail(reader, f"{big}-000001"),
            "variants of a base, all": lambda: reader.variants(big),
            "latest 50 jobs": lambda: Queue(reader).jobs(50),
            "next 50 jobs": lambda: Queue(reader).jobs(50, before=last),
            "active jobs": Queue(reader).active_count,
            "record_run, 10 measurements": one_run(catalog, big),
        }
        print(f"{'question':<40} {'median ms':>10} {'worst ms':>10} {'cpu ms':>10}")
        for name, call in questions.items():
            median, worst, cpu = timed(call, arguments.repeats)
            print(f"{name:<40} {median:>10.2f} {worst:>10.2f} {cpu:>10.2f}")


if __name__ == "__main__":
    main()
