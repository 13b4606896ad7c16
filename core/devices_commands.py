"""What ``slimscope devices`` does: devices of one's own, looked at, trusted, measured on and left clean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from core.commands import pairs
from core.errors import BadInput
from core.output import terminal_progress

Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]
ACTIONS = {
    "list": "every device of the registry",
    "check": "connect and say what it is and which engines it has",
    "trust": "show its host key; with --fingerprint, pin it",
    "calibrate": "measure its memory bandwidth and matrix rate",
    "profile": "measure a model on it",
    "jobs": "measurements that lie on it",
    "stop": "end and forget a measurement on it (--job)",
    "clean": "remove everything of ours from it",
    "script": "write one file to run on a device that nothing reaches",
    "import": "enter the result that such a file left",
}


def add_to(add: Add) -> None:
    """Put the command into the command line."""
    parser = add("devices", devices_command)
    told = "; ".join(f"{name}: {what}" for name, what in ACTIONS.items())
    parser.add_argument("action", choices=list(ACTIONS), help=told)
    parser.add_argument("target", metavar="SLUG|FILE", nargs="?", help="the device, or the file to import")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="profile, script: what to measure")
    parser.add_argument(
        "--engine", help="llama_bench, onnxruntime or torch (default: the first that is there)"
    )
    parser.add_argument("--tier", help="how long to measure: rapid, quick or full")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; repeatable"
    )
    parser.add_argument("--fingerprint", help="trust: the key's fingerprint, as read on the device itself")
    parser.add_argument("--job", help="stop: the job's id")
    parser.add_argument("--output", help="script: the file to write (default: MODEL's id and engine)")


def devices_command(args: argparse.Namespace) -> Any:
    """Devices of one's own by SSH or adb: list, check, trust, calibrate, profile, jobs, stop, clean, script, import."""
    from core.devices import registry, remote
    from core.devices.ssh import offered_key, pin

    if args.action == "list":
        return _listed(registry.devices())
    if args.target is None:
        raise BadInput(f"devices {args.action} needs a {'file' if args.action == 'import' else 'device'}")
    if args.action == "import":
        from core.catalog.store import Catalog

        return remote.import_result(Catalog(), Path(args.target))
    device = registry.device(args.target)
    match args.action:
        case "check":
            return asdict(remote.probe(device))
        case "trust":
            if args.fingerprint:
                pin(device, args.fingerprint)
            shown = args.fingerprint or offered_key(device)[1]
            return {"device": device.slug, "fingerprint": shown, "pinned": bool(args.fingerprint)}
        case "calibrate":
            return remote.calibrate(device, progress=terminal_progress())
        case "jobs":
            return [asdict(job) for job in remote.unfinished(device)]
        case "stop":
            if not args.job:
                raise BadInput(
                    f"name the job with --job ID; `slimscope devices jobs {device.slug}` lists them"
                )
            remote.stop(device, args.job)
            return {"stopped": args.job}
        case "clean":
            return {"freed_bytes": remote.clean(device)}
        case _:
            return _measured(args, device)


def _measured(args: argparse.Namespace, device: Any) -> Any:
    from core.catalog.store import Catalog
    from core.devices import remote
    from core.devices.job import engine_named
    from core.loop import register

    if args.model is None:
        raise BadInput(f"devices {args.action} needs a model after the device")
    catalog, progress = Catalog(), terminal_progress()
    settings = {**({"tier": args.tier} if args.tier else {}), **pairs(args.set)}
    variant = register(catalog, args.model, progress=progress)
    if args.action == "profile":
        return remote.profile_on_device(
            catalog, variant.id, device, engine=args.engine, settings=settings, progress=progress
        )
    engine = engine_named(args.engine or "onnxruntime")
    target = Path(args.output or f"slimscope-{variant.id[:12]}-{engine}.pyz")
    remote.script_for(catalog, variant.id, device, engine, target, settings, progress=progress)
    return {"file": str(target), "bytes": target.stat().st_size, "run_there": f"python3 {target.name}"}


def _listed(devices: Any) -> pd.DataFrame:
    columns = ("slug", "name", "kind", "transport", "address", "power_mode", "confidence", "own")
    rows = [{name: getattr(each, name) for name in columns} for each in devices.values()]
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.sort_values(["own", "transport"], ascending=[False, True], kind="stable").reset_index(
        drop=True
    )
