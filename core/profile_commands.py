"""What ``slimscope profile``, ``ab`` and ``runtimes`` do; the rest of the commands is in ``core.commands``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from core.commands import pairs
from core.output import terminal_progress
from core.profile.protocol import EFFORTS
from core.profile.runtimes._base import PLAIN

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
MODEL = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"


def add_to(add: Add) -> None:
    """The commands that measure speed."""
    parser = add("ab", ab_command)
    parser.add_argument("a", metavar="A", help=MODEL)
    parser.add_argument("b", metavar="B", help="the same or another, to be held against A")
    parser.add_argument(
        "--phase",
        choices=["decode", "prefill"],
        default="decode",
        help="what is raced (default: %(default)s)",
    )
    parser.add_argument("--runtime", default=PLAIN, help="of both, or of A (default: %(default)s)")
    parser.add_argument("--runtime-b", help="of B, where it is another")
    parser.add_argument("--tier", choices=list(EFFORTS), default="quick", help="how long to measure")
    parser.add_argument("--blocks", type=int, help="how many blocks (default: by the tier)")
    parser.add_argument(
        "--delta", type=float, default=0.03, help="smallest difference that matters (default: %(default)s)"
    )
    _takes_settings(parser, "--set", "a setting of both; repeatable")
    _takes_settings(parser, "--set-a", "a setting of A alone; repeatable")
    _takes_settings(parser, "--set-b", "a setting of B alone; repeatable")
    add("runtimes", runtimes_command)


def ab_command(args: argparse.Namespace) -> Any:
    """Say which of two is faster: both loaded, measured in turn in one session, judged by paired blocks."""
    from core.catalog.store import Catalog
    from core.loop import register
    from core.profile.comparability import tier_of
    from core.profile.race import race

    catalog, progress = Catalog(), terminal_progress()
    a, b = (register(catalog, model, progress=progress) for model in (args.a, args.b))
    shared = {"tier": args.tier, **pairs(args.set)}
    run = race(
        catalog,
        a.id,
        b.id,
        phase=args.phase,
        runtime_a=args.runtime,
        runtime_b=args.runtime_b or args.runtime,
        settings_a=shared | pairs(args.set_a),
        settings_b=shared | pairs(args.set_b),
        blocks=args.blocks,
        delta=args.delta,
        progress=progress,
    )
    said, sides = run.conditions["verdict"], run.conditions["sides"]
    badge = tier_of(sides["a"], sides["b"])
    return {
        "run": run.id,
        **said,
        "badge": badge.letter,
        "flags": list(run.flags),
        "a": sides["a"],
        "b": sides["b"],
        "measurements": run.measurements,
        "notes": run.conditions["notes"],
        "protocol": run.protocol,
    }


def runtimes_command(args: argparse.Namespace) -> Any:
    """List the runtimes: which can run here, and what would make the others run."""
    import pandas as pd

    from core.profile.offers import offers

    found = offers()
    if args.json:
        return found
    rows = [
        {
            "runtime": offer.id,
            "title": offer.title,
            "families": " ".join(offer.families),
            "here": "yes" if offer.available else offer.install or offer.reason,
        }
        for offer in found
    ]
    return pd.DataFrame(rows)


def _takes_settings(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, action="append", default=[], metavar="KEY=VALUE", help=text)
