"""What ``slimscope predict`` does: how a model would do on devices that nobody here has, and how far such sayings were off."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from core.errors import BadInput
from core.output import terminal_progress
from core.types import Result

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
GB = 1e9


def add_to(add: Add) -> None:
    """Put the command into the command line."""
    parser = add("predict", predict_command)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="demo:NAME, variant:ID, a folder, a .gguf file, a hub id, a config.json, or a model of --list",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="SLUG", help="only this device, in full (default: a table of all)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens in the cache (default: 2048, or all that the model has)",
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--kv-bytes", type=float, default=2, help="of a cached number (default: %(default)s)")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="count the model's config in this format instead of its files, e.g. q4_k_m",
    )
    parser.add_argument("--list", action="store_true", help="list devices, known models and formats")
    parser.add_argument(
        "--track-record",
        nargs="?",
        const="device",
        choices=["device", "chip"],
        help="published rates, each predicted without its device (default) or chip",
    )


def predict_command(args: argparse.Namespace) -> Any:
    """Say on which devices a model would fit and how fast it would be there, each rate with its band."""
    if args.list:
        return _listed(args)
    if args.track_record:
        return _record(args)
    if args.model is None:
        raise BadInput("name a model to predict, or ask for --list or --track-record")
    from core.catalog.store import Catalog
    from core.predict.anchors import anchor_of, known_devices, observed
    from core.predict.fits import fits_on, row_of
    from core.predict.predict import Workload, predict
    from core.predict.source import named_shape

    catalog, progress = Catalog(), terminal_progress()
    shape = named_shape(catalog, args.model, args.format, progress)
    context = min(2048, shape.context_length) if args.context is None else args.context
    workload = Workload(context, args.prompt, args.batch, args.kv_bytes)
    seen = observed(catalog, progress)
    if args.device is None:
        table = fits_on(shape, workload=workload, seen=seen)
        return table if args.json else _shown(table)
    known = known_devices()
    if args.device not in known:
        from core.devices.registry import device

        device(args.device)  # raises, with close names
    there = known[args.device]
    return row_of(predict(shape, there, workload, anchor=anchor_of(there, shape, seen)))


def _shown(table: pd.DataFrame) -> Result:
    """What a terminal is wide enough for; ``--json`` has every column."""
    frame = pd.DataFrame(
        {
            "device": table["slug"],
            "fits": table["fits"].map({True: "yes", False: "no"}).where(table["why"] == "", table["why"]),
            "needs_gb": (table["needed_bytes"] / GB).round(2),
            "has_gb": (table["usable_bytes"] / GB).round(2),
            "longest_context": table["longest_context"],
            "decode_tok_s": [_range(*row) for row in _bands(table, "decode_tokens_per_s")],
            "ttft_ms": [_range(*row) for row in _bands(table, "ttft_ms")],
            "waits_for": table["bound"].fillna(""),
            "rests_on": [
                "measured there" if anchored else "extrapolated" if far and not pd.isna(rate) else ""
                for anchored, far, rate in zip(
                    table["anchored"], table["extrapolated"], table["decode_tokens_per_s"], strict=True
                )
            ],
        }
    )
    from core.predict.track_record import by_class, track_record

    notes = (
        frame.to_string(index=False),
        "",
        "Modelled, not measured: each rate with the range that nine of ten past errors of its class stay in;",
        "extrapolated: the class's published rates are all of models more than twice as large.",
        "Past errors, each published rate predicted without its own device (slimscope predict --track-record):",
    )
    return Result({"classes": by_class(track_record()).round(3)}, (), notes=notes)


def _bands(table: pd.DataFrame, name: str) -> list[tuple[float, float, float]]:
    return list(table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None))


def _range(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "?"
    digits = 0 if value >= 100 else 1
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _listed(args: argparse.Namespace) -> Any:
    from core.predict.anchors import known_devices
    from core.predict.published import formats, models

    found = known_devices().values()
    frame = pd.DataFrame(
        {
            "device": device.slug,
            "name": device.name,
            "kind": device.kind,
            "engine": ", ".join(device.engines),
            "usable_gb": round(device.usable_bytes / GB, 2),
            "bandwidth_gb_s": None if device.bandwidth is None else device.bandwidth / GB,
            "confidence": device.confidence,
            "own": device.own,
        }
        for device in found
    )
    if args.json:
        return {"devices": list(found), "models": models(), "formats": formats()}
    bits = pd.DataFrame({"format": name, **vars(of)} for name, of in formats().items())
    notes = (
        frame.to_string(index=False),
        "",
        f"models: {', '.join(models())}",
        "formats, in bits per weight:",
    )
    return Result({"formats": bits}, (), notes=notes)


def _record(args: argparse.Namespace) -> Any:
    from core.predict import track_record as made
    from core.predict.published import rows

    record = made.track_record(by=args.track_record)
    said = {
        "rows": len(record),
        "held_out": args.track_record,
        "median_error": made.median_error(record),
        "median_prefill_error": made.median_error(record, "prefill_error"),
        "inside_the_band": float(record["inside"].mean()),
        "lint": made.lint(rows()),
    }
    classes = made.by_class(record)
    if args.json:
        return {**said, "classes": classes, "figures": record}
    columns = [
        "device",
        "engine",
        "model",
        "format",
        "published",
        "predicted",
        "low",
        "high",
        "error",
        "flag",
    ]
    lines = [f"{name:<24} {value:.3g}" for name, value in said.items() if isinstance(value, float)]
    notes = (record[columns].round(3).to_string(index=False), "", *lines, *said["lint"])
    return Result({"classes": classes.round(3)}, (), notes=notes)
