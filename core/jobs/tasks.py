"""What a job can do: task functions by kind, each a thin step from a job's spec onto ``core.loop`` or
``core.bench``.

A task is ``task(spec, context) -> result``: ``spec`` and ``result`` are plain JSON; ``context`` is a
``core.jobs.context.TaskContext``. Specs are written by ``core.jobs.plan``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from core.jobs.context import Task, TaskContext
from core.recipe import Recipe
from core.types import Prompt, Run, part_of


def compress(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Make a proven variant: ``{"model", "recipe"}``."""
    from core.loop import make_variant

    made = make_variant(
        context.catalog,
        spec["model"],
        Recipe.parse(spec["recipe"]),
        progress=context.progress,
        job_id=context.job.id,
    )
    context.say(
        f"{'found' if made.reused else 'made'} {made.variant.name}: {made.variant.bytes} bytes, proven"
    )
    return made.summary()


def evaluate(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure quality: ``{"model", "recipe" or null, "method" or null, "settings", "documents": {"source"}}``."""
    from core.loop import evaluate_variant

    return _said(
        context,
        evaluate_variant(
            context.catalog,
            _variant_id(spec, context),
            method=spec["method"],
            documents=spec["documents"]["source"],
            settings=spec["settings"],
            progress=context.progress,
            job_id=context.job.id,
            scratch=context.scratch,
        ),
    )


def profile(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure speed: ``{"model", "recipe" or null, "method", "settings"}``, and ``"headline"`` false for a cell of a grid."""
    from core.loop import profile_variant

    return _said(
        context,
        profile_variant(
            context.catalog,
            _variant_id(spec, context),
            method=spec["method"],
            settings=spec["settings"],
            headline=spec.get("headline", True),
            progress=context.progress,
            job_id=context.job.id,
        ),
    )


def race(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure two in turn: ``{"model", "a", "b", "phase", "runtime_a", "runtime_b", "settings_a", "settings_b", "blocks", "delta"}``."""
    from core.profile.race import race as run_race

    asked = {name: value for name, value in spec.items() if name != "model"}
    run = run_race(context.catalog, **asked, progress=context.progress, job_id=context.job.id)
    context.say(run.conditions["verdict"]["sentence"])
    return _said(context, run)


def probe(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Look inside: ``{"model", "method", "prompt" (text, second, image), "settings", "reference" or null}``."""
    from core.bench import probe_model

    return _said(
        context,
        probe_model(
            context.catalog,
            spec["model"],
            spec["method"],
            Prompt(**spec["prompt"]),
            settings=spec["settings"],
            reference=spec["reference"],
            progress=context.progress,
            job_id=context.job.id,
        ),
    )


def train(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Train an instrument: ``{"model", "method", "documents": {"source"}, "settings"}``."""
    from core.bench import train_on

    run = train_on(
        context.catalog,
        spec["model"],
        spec["method"],
        text=spec["documents"]["source"],
        settings=spec["settings"],
        progress=context.progress,
        job_id=context.job.id,
    )
    return {**_said(context, run), "artifact": run.conditions["artifact"]}


def export(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Package a variant for another runtime: ``{"model", "method", "settings"}``."""
    from core.delivery import export_package, package_of

    made = export_package(
        context.catalog,
        spec["model"],
        spec["method"],
        settings=spec["settings"],
        progress=context.progress,
        job_id=context.job.id,
    )
    return {**_said(context, made.run), "package": package_of(made.run)}


def where(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Look where the time goes: ``{"model", "method" (a runtime), "settings"}``."""
    from core.loop import register
    from core.profile.where.kept import look_at

    run = look_at(
        context.catalog,
        register(context.catalog, spec["model"]).id,
        runtime=spec["method"],
        settings=spec["settings"],
        progress=context.progress,
        job_id=context.job.id,
    )
    return _said(context, run)


def machine(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Measure the roofs of this machine, and count what the steps of a base's variants must read: ``{"model", "again"}``."""
    from core.loop import register
    from core.profile.machine import machine_roofs
    from core.profile.roofline import roofline

    roofs = machine_roofs("cpu", part_of(context.progress, 0.0, 0.6), again=spec["again"])
    base = register(context.catalog, spec["model"]).base_id
    rows = roofline(context.catalog, base, roofs, part_of(context.progress, 0.6, 1.0))
    context.say(
        f"reads {roofs.read_bytes_per_s() / 1e9:.3g} GB/s, {len(rows)} measured phases placed under the roofs"
    )
    return {"taken_at": roofs.taken_at, "flags": list(roofs.flags), "phases": len(rows)}


def device(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Something with a device of one's own: ``{"slug", "action"}`` and what the action needs (``core.jobs.device_plan``)."""
    from core.devices import registry, remote, ssh

    target = registry.device(spec["slug"])
    match spec["action"]:
        case "check":
            return {"probed": asdict(remote.probe(target))}
        case "key":
            return {"fingerprint": ssh.offered_key(target)[1]}
        case "trust":
            ssh.pin(target, spec["fingerprint"])
            return {"pinned": spec["fingerprint"]}
        case "calibrate":
            rows = remote.calibrate(target, progress=context.progress).frame
            return {"roofs": json.loads(rows.to_json(orient="records"))}
        case "clean":
            return {"freed_bytes": remote.clean(target)}
        case "script":
            folder = context.catalog.folder / "scripts"
            folder.mkdir(exist_ok=True)
            file = folder / f"slimscope-{spec['variant'][:12]}-{target.slug}.pyz"
            engine: Any = spec["engine"] or "onnxruntime"
            remote.script_for(
                context.catalog,
                spec["variant"],
                target,
                engine,
                file,
                spec["settings"],
                progress=context.progress,
            )
            return {"file": str(file), "bytes": file.stat().st_size}
    run = remote.profile_on_device(
        context.catalog,
        spec["variant"],
        target,
        engine=spec["engine"],
        settings=spec["settings"],
        progress=context.progress,
        job_id=context.job.id,
    )
    return _said(context, run)


TASKS: dict[str, Task] = {
    "compress": compress,
    "evaluate": evaluate,
    "profile": profile,
    "race": race,
    "where": where,
    "machine": machine,
    "device": device,
    "probe": probe,
    "train": train,
    "export": export,
}


def _variant_id(spec: dict[str, Any], context: TaskContext) -> str:
    """The variant a spec means: the model itself, or what its recipe makes of it."""
    from core.loop import register

    parent = register(context.catalog, spec["model"])
    return Recipe.parse(spec["recipe"]).variant_id(parent.fingerprint) if spec["recipe"] else parent.id


def _said(context: TaskContext, run: Run) -> dict[str, Any]:
    for measurement in run.measurements:
        context.say(f"{measurement.name} = {measurement.value:.6g} {measurement.unit}")
    return {"run": run.id, "variant": run.variant_id, "status": run.status, "flags": list(run.flags)}
