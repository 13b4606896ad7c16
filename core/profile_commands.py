"""What ``slimscope profile``, ``ab`` and ``runtimes`` do; the rest of the commands is in ``core.commands``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from core.commands import pairs
from core.output import terminal_progress
from core.profile.protocol import EFFORTS
from core.profile.runtimes._base import PLAIN
from core.types import Progress

if TYPE_CHECKING:
    from core.profile.grid import Cell

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
AUTO = "auto"
MODEL = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"


def add_to(add: Add) -> None:
    """The commands that measure speed."""
    parser = add("profile", profile_command)
    parser.add_argument("model", metavar="MODEL", nargs="+", help=f"{MODEL}; several make a grid")
    parser.add_argument(
        "--runtime", default=PLAIN, help="id of a runtime, or several: R1,R2 (default: %(default)s)"
    )
    parser.add_argument("--tier", choices=list(EFFORTS), help="how long to measure")
    text = (
        "a setting; several values (KEY=V1,V2) make a grid; threads=auto finds the best numbers; repeatable"
    )
    _takes_settings(parser, "--set", text)
    parser.add_argument("--dry-run", action="store_true", help="only list the cells and what they would take")
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


def profile_command(args: argparse.Namespace) -> Any:
    """Measure speed and memory in fresh processes: one variant, or a grid of variants × runtimes × settings."""
    from core.catalog.store import Catalog
    from core.loop import profile_variant, register
    from core.profile.grid import cells, measure_cells
    from core.sweep import values_of

    catalog, progress = Catalog(), terminal_progress()
    variants = [register(catalog, model, progress=progress).id for model in args.model]
    runtimes, given = values_of(args.runtime), pairs(args.set)
    if args.tier:
        given = {"tier": args.tier, **given}
    tuned = given.get("threads") == AUTO
    several = len(variants) * len(runtimes) > 1 or any("," in value for value in given.values())
    if not (several or tuned or args.dry_run):
        return profile_variant(catalog, variants[0], method=runtimes[0], settings=given, progress=progress)
    axes = {name: values_of(value) for name, value in given.items()}
    if tuned:
        return _tuned(catalog, variants, runtimes, axes, progress, dry_run=args.dry_run)
    found = cells(catalog, variants, runtimes, others=axes)
    return _listed(found) if args.dry_run else measure_cells(catalog, found, progress=progress)


def _tuned(
    catalog: Any,
    variants: list[str],
    runtimes: list[str],
    axes: dict[str, list[str]],
    progress: Progress,
    *,
    dry_run: bool,
) -> Any:
    """Find the threads of each variant in each runtime, for prompts and for decoding, then measure those cells."""
    import pandas as pd

    from core.profile.autotune import autotune, candidates
    from core.profile.grid import cells, measure_cells

    axes = {name: values for name, values in axes.items() if name != "threads"}
    if dry_run:
        others = {**axes, "tier": ["rapid"]}
        return _listed(cells(catalog, variants, runtimes, threads=candidates(), others=others))
    first = {name: values[0] for name, values in axes.items()}
    parts = []
    for variant in variants:
        for runtime in runtimes:
            tuned = autotune(catalog, variant, runtime, settings=first, progress=progress)
            chosen = cells(catalog, [variant], [runtime], threads=tuned.threads, others=axes)
            measured = measure_cells(catalog, chosen, progress=progress)
            counts = [cell.settings["threads"] for cell in chosen]
            best = {"prefill_threads": tuned.prefill_threads, "decode_threads": tuned.decode_threads}
            parts.append(measured.assign(threads=counts, **best))
    return pd.concat(parts, ignore_index=True)


def _listed(found: Sequence[Cell]) -> Any:
    """Cells as rows: what each is, whether it was measured, and how many seconds it would take."""
    import pandas as pd

    from core.profile.grid import differing

    names = differing(found)
    return pd.DataFrame(
        [
            {
                "name": cell.name,
                "runtime": cell.runtime,
                **{name: cell.settings.get(name) for name in names},
                "state": cell.refused or ("to do" if cell.to_do else "measured before"),
                "seconds": round(cell.seconds, 1),
                "basis": cell.basis,
                "run": cell.measured_run,
                "flags": " ".join(cell.flags),
                "variant": cell.variant,
                "key": cell.key[:12],
            }
            for cell in found
        ]
    )


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
