"""What ``slimscope predict`` does: where a model would fit and how fast it would be, or how far such sayings were off."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from core.errors import BadInput
from core.output import terminal_progress

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
SHOWN = (
    *("slug", "fits", "why", "needed_mb", "longest_context", "decode_tokens_per_s"),
    *("decode_tokens_per_s_low", "decode_tokens_per_s_high", "ttft_ms", "confidence"),
)


def add_to(add: Add) -> None:
    """Put the command into the command line."""
    parser = add("predict", predict_command)
    text = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=text)
    parser.add_argument("--device", metavar="SLUG", help="only this device of the registry")
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens in the cache (default: %(default)s)"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: %(default)s)")
    parser.add_argument(
        "--kv-bytes", type=float, default=2.0, help="bytes of a cached number (default: %(default)s)"
    )
    parser.add_argument(
        "--track-record",
        choices=["device", "chip"],
        help="instead: every published figure beside what would have been said without its device, or its chip",
    )


def predict_command(args: argparse.Namespace) -> Any:
    """Predict on which devices a model fits and how fast it runs there, with a band; or show how far that is off."""
    from core.predict.track_record import by_class, median_error, track_record

    if args.track_record:
        record = track_record(args.track_record)
        classes = by_class(record)
        said = {
            "rows": len(record),
            "held_out": args.track_record,
            "median_error": median_error(record),
            "median_prefill_error": median_error(record, "prefill_error"),
        }
        return {**said, "classes": classes, **({"figures": record} if args.json else {})}
    if not args.model:
        raise BadInput(
            "name a model, e.g. `slimscope predict demo:smollm2`, or ask for --track-record device"
        )
    wrong = [name for name in ("context", "prompt", "batch", "kv_bytes") if getattr(args, name) <= 0]
    if wrong:
        raise BadInput(f"--{wrong[0].replace('_', '-')} must be above 0")
    return _fits(args)


def _fits(args: argparse.Namespace) -> Any:
    from core.catalog.store import Catalog
    from core.devices.registry import device, devices
    from core.entries import folder_of
    from core.loop import register
    from core.predict.fits import fits_on
    from core.profile.shapes import shape_of

    known = {args.device: device(args.device)} if args.device else devices()
    catalog = Catalog()
    variant = register(catalog, args.model, progress=terminal_progress())
    shape = shape_of(folder_of(catalog, variant, progress=terminal_progress()))
    if shape.family == "decoder" and args.context > shape.context_length:
        raise BadInput(
            f"--context {args.context} is more than this model's {shape.context_length}; give a shorter one"
        )
    found = fits_on(
        shape,
        context=args.context,
        prompt=args.prompt,
        batch=args.batch,
        kv_bytes=args.kv_bytes,
        known=known,
    )
    if args.json:
        return found
    return found.assign(needed_mb=found["needed_bytes"] / 1e6)[list(SHOWN)].round(1)
