"""What ``slimscope import`` does: other programs' reports into the catalog."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from core.types import Result

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]


def add_to(add: Add) -> None:
    """Put the command into the command line."""
    parser = add("import", import_command)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="llama-bench JSON or JSONL, an optimum-benchmark report, an ONNX Runtime profile, or AI Hub's perf.yaml",
    )
    parser.add_argument(
        "--variant", metavar="ID", help="whose numbers they are (default: a hidden entry external:NAME)"
    )
    parser.add_argument("--name", help="name of that entry (default: the file's)")


def import_command(args: argparse.Namespace) -> Any:
    """Enter numbers that another program measured; they can be looked at, never called faster (tier D)."""
    from core.catalog.store import Catalog
    from core.importing import import_report

    runs = import_report(Catalog(), Path(args.file).expanduser(), variant=args.variant, name=args.name)
    if args.json:
        return runs
    rows = [
        {
            "variant": run.variant_id,
            "device": run.conditions.get("device_model") or "not told",
            **{name: getattr(m, name) for name in ("name", "value", "low", "high", "unit", "n")},
        }
        for run in runs
        for m in run.measurements
    ]
    notes = (f"{len(runs)} measurements, {runs[0].protocol}: tier D, measured elsewhere",)
    return Result({"imported": pd.DataFrame(rows)}, (), notes=notes)
