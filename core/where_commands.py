"""What ``slimscope where``, ``roofline`` and ``machine`` do: where the time of a model goes, and what this machine can do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.commands import pairs
from core.output import terminal_progress
from core.types import Progress, Result, part_of

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.types import Run, Variant

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
TOP = {"component": 6, "module": 8, "operator": 5}
"""Rows of each table and phase that a terminal shows; ``--json`` has all."""
SHOWN_ACTIONS = 3
UNITS = {"bytes/s": (1e9, "GB/s"), "FLOP/s": (1e9, "GFLOP/s"), "s": (1e-6, "µs")}
"""Unit of a roof → what a reader wants to see."""


def add_to(add: Add) -> None:
    """Put the commands into the command line."""
    parser = add("where", where_command)
    model = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument(
        "--against", metavar="MODEL", help="a second model, e.g. the variant's base, beside it"
    )
    parser.add_argument("--trace", metavar="FILE.json", help="write a Chrome trace there (opens in Perfetto)")
    parser.add_argument("--runtime", default="torch_eager", help="id of a runtime (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the runtime; repeatable"
    )
    parser = add("roofline", roofline_command)
    parser.add_argument("model", metavar="MODEL", help=f"{model}; its base and all variants are shown")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="whose (default: %(default)s)"
    )
    parser = add("machine", machine_command)
    parser.add_argument("--again", action="store_true", help="measure although there are roofs already")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="whose (default: %(default)s)"
    )


def machine_command(args: argparse.Namespace) -> Any:
    """Measure once what this machine can do at best: memory bandwidth, matrix products, empty layers."""
    from core.profile.machine import machine_roofs

    roofs = machine_roofs(args.device, terminal_progress(), again=args.again)
    if args.json:
        return roofs
    units = roofs.frame["unit"].map(UNITS)
    shown = roofs.frame.assign(unit=units.str[1])
    for column in ("value", "median"):
        shown[column] /= units.str[0].astype(float)
    busy = f"; other programs took {roofs.other_cpu:.0%} of the processors, measure again when it is quiet"
    notes = (
        f"best of n repetitions, taken {roofs.taken_at} on {roofs.device}" + (busy if roofs.flags else ""),
    )
    return Result({"roofs": shown.round(3)}, (), notes=notes, flags=roofs.flags)


def roofline_command(args: argparse.Namespace) -> Any:
    """Hold every measured phase of a model's variants against this machine's roofs, and say what holds it back."""
    from core.catalog.store import Catalog
    from core.loop import register
    from core.profile.bottleneck import verdicts
    from core.profile.machine import machine_roofs
    from core.profile.roofline import roofline

    catalog, progress = Catalog(), terminal_progress()
    base = register(catalog, args.model, progress=progress).base_id
    roofs = machine_roofs(args.device, progress)
    rows = roofline(catalog, base, roofs, progress)
    found = verdicts(catalog, base, roofs, progress)[["run", "phase", "cause", "action", "gain"]]
    rows = rows.merge(found, on=["run", "phase"])
    if args.json:
        return rows
    shown = rows[["name", "runtime", "settings", "phase"]].assign(
        ms=(rows["seconds"] * 1e3).round(2), MB=(rows["bytes"] / 1e6).round(1)
    )
    for name in ("share_of_bandwidth", "share_of_matrix_rate", "share_of_roof"):
        shown[name.removeprefix("share_of_")] = rows[name].round(3)
    shown[["bound", "held back by", "flagged"]] = rows[["bound", "cause", "flagged"]]
    best = f"{roofs.read_bytes_per_s() / 1e9:.1f} GB/s, {roofs.flops_per_s('float32') / 1e9:.0f} GFLOP/s in float32"
    notes = (f"shares of this machine's best, measured {roofs.taken_at}: {best}",)
    return Result({"roofline": shown}, (), notes=notes, flags=roofs.flags)


def where_command(args: argparse.Namespace) -> Any:
    """Show where the time of a forward pass goes, by module and operator, and what holds each phase back."""
    from core.catalog.store import Catalog
    from core.profile.where.tables import join_modules
    from core.profile.where.trace import chrome_trace

    catalog, progress = Catalog(), terminal_progress()
    share = 1.0 if args.against is None else 0.5
    variant, run, look = _looked(catalog, args.model, args, part_of(progress, 0.0, share))
    answer: dict[str, Any] = _said(catalog, variant, run, look, progress)
    shown, events = _top(look), {variant.name: look.frames["events"]}
    if args.against is not None:
        other, other_run, other_look = _looked(catalog, args.against, args, part_of(progress, share, 1.0))
        joined = join_modules(other_look.frames["modules"], look.frames["modules"])
        answer = {
            **answer,
            "against": _said(catalog, other, other_run, other_look, progress),
            "joined": joined,
        }
        shown = joined.drop(columns=["kind_a", "kind_b", "depth", "layer"]).round(3)
        events[f"{other.name} (against)"] = other_look.frames["events"]
    if args.trace:
        file = Path(args.trace).expanduser().resolve()
        file.write_bytes(chrome_trace(events))
        answer["trace"] = str(file)
    if args.json:
        return answer
    return Result({"where": shown}, (), notes=tuple(_sentences(answer)), flags=look.flags)


def _looked(
    catalog: Catalog, model: str, args: argparse.Namespace, progress: Progress
) -> tuple[Variant, Run, Result]:
    from core.catalog.results import result_of
    from core.loop import register
    from core.profile.where.kept import look_at
    from core.registry import get

    settings = get("profile", args.runtime).parse_text(pairs(args.set)).model_dump(mode="json")
    variant = register(catalog, model, progress=part_of(progress, 0.0, 0.2))
    looking = part_of(progress, 0.2, 1.0)
    run = look_at(catalog, variant.id, runtime=args.runtime, settings=settings, progress=looking)
    return variant, run, result_of(catalog, run.id)


def _said(catalog: Catalog, variant: Variant, run: Run, look: Result, progress: Progress) -> dict[str, Any]:
    """Everything about one model but its trace."""
    from core.profile.machine import machine_roofs
    from core.profile.where.kept import verdicts_of

    roofs = machine_roofs(look.provenance.device, progress)
    found = verdicts_of(catalog, variant.id, look, roofs)
    return {
        "variant": variant.id,
        "name": variant.name,
        "run": run.id,
        "conditions": look.provenance.conditions,
        "flags": look.flags,
        "notes": look.notes,
        "verdicts": [{**vars(verdict), "time_from": source} for verdict, source in found],
        **{name: look.frames[name] for name in ("components", "modules", "operators")},
    }


def _sentences(answer: Mapping[str, Any]) -> list[str]:
    """What a terminal shows above the table."""
    models = [answer, *([answer["against"]] if "against" in answer else [])]
    lines = []
    for said in models:
        for verdict in said["verdicts"]:
            lines.append(f"{said['name']}: {verdict['sentence']} (time: {verdict['time_from']})")
            lines += [f"  at most {a.gain:.2f} ×: {a.text}" for a in verdict["actions"][:SHOWN_ACTIONS]]
    lines += [*answer["notes"]]
    if "against" in answer:
        lines.append(
            f"a is {answer['against']['name']}, b is {answer['name']}; looked at one after the other"
        )
    if answer["flags"]:
        lines.append(
            f"flags: {', '.join(answer['flags'])} (other programs were busy; look again when it is quiet)"
        )
    if "trace" in answer:
        lines.append(f"trace: {answer['trace']} (open it at ui.perfetto.dev)")
    return lines


def _top(look: Result) -> pd.DataFrame:
    """The first rows of the three tables, under the same columns."""
    tables = []
    for table, value in (("component", "self_ms"), ("module", "self_ms"), ("operator", "traced_ms")):
        frame = look.frames[f"{table}s"]
        if table == "operator":  # summed over modules: a terminal has no room for each
            columns = ["calls", "traced_ms", "share"]
            frame = frame.groupby(["phase", "operator"], as_index=False)[columns].sum()
        first = frame.sort_values(value, ascending=False).groupby("phase").head(TOP[table])
        name = first[table].replace("", "(whole model)")
        tables.append(
            pd.DataFrame(
                {
                    "table": table,
                    "phase": first["phase"],
                    "name": name,
                    "calls": first.get("calls", pd.NA),
                    "ms": first[value].round(3),
                    "share": first["share"].round(3),
                }
            )
        )
    whole = pd.concat(tables, ignore_index=True).astype({"calls": "Int64"})
    return whole.sort_values("phase", ascending=False, kind="stable", ignore_index=True)
