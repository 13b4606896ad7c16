"""What each command of ``slimscope`` does: the loop's functions, called with what the command line said.

A command returns its answer as data; how that is printed is ``core.cli``'s. Engine modules are imported by the command
that needs them, so that ``slimscope --help`` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from core.errors import BadInput
from core.output import terminal_progress
from core.registry import PACKAGES
from core.types import Prompt

COMPARE_SHOWN = [
    *("variant", "name", "bytes", "bits_per_weight", "kl", "kl_low", "kl_high", "bits_per_byte"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "proven", "on_front"),
]
"""What a terminal is wide enough for; ``--json`` has every column."""


def open_command(args: argparse.Namespace) -> Any:
    """Open a model, verify its anatomy, print what it is."""
    from core.entries import opened
    from core.models.sizes import model_card

    return model_card(opened(_catalog(), args.model, progress=terminal_progress()))


def methods_command(args: argparse.Namespace) -> Any:
    """List every method with its settings."""
    from core.registry import methods

    kinds = [args.kind] if args.kind else list(PACKAGES)
    found = [method.describe() for kind in kinds for method in methods(kind).values()]
    return found if args.json else pd.DataFrame(found)[["kind", "id", "title", "needs", "summary"]]


def probe_command(args: argparse.Namespace) -> Any:
    """Look inside a model with one probe, or say what that would cost."""
    from core.bench import original_of
    from core.calling import refuse_misfit, run_probe
    from core.entries import opened
    from core.registry import get

    method = get("probe", args.method)
    settings = method.parse_text(pairs(args.set))
    progress, catalog = terminal_progress(), _catalog()
    loaded = opened(catalog, args.model, progress=progress)
    refuse_misfit(method, loaded)
    prompt = Prompt(args.text, args.second, args.image)
    if args.dry_run:
        from core.estimate import estimate
        from core.models.pace import measure_pace, n_positions

        n = n_positions(loaded, prompt)
        return estimate(method, loaded.anatomy, measure_pace(loaded), n, settings)
    reference = args.reference
    if method.takes_reference and reference is None:
        reference = original_of(catalog, args.model)
    original = None if reference is None else opened(catalog, reference, progress=progress)
    return run_probe(method, loaded, prompt, progress, settings, reference=original)


def train_command(args: argparse.Namespace) -> Any:
    """Train an instrument on a model's activations; its artifact is what a probe's setting takes."""
    from core.bench import train_on
    from core.registry import get

    settings = get("train", args.method).parse_text(pairs(args.set)).model_dump(mode="json")
    return train_on(
        _catalog(), args.model, args.method, text=args.text, settings=settings, progress=terminal_progress()
    )


def compress_command(args: argparse.Namespace) -> Any:
    """Make a variant by one method, and prove that it reloads."""
    from core.loop import make_variant
    from core.recipe import Recipe
    from core.registry import get

    settings = get("compress", args.method).parse_text(pairs(args.set))
    recipe = Recipe.of(args.method, **settings.model_dump(mode="json")).calibrated_on(args.calibration)
    return make_variant(_catalog(), args.model, recipe, progress=terminal_progress()).summary()


def run_command(args: argparse.Namespace) -> Any:
    """Compress by a recipe file, prove, evaluate and profile: the whole loop."""
    from core.loop import evaluate_variant, make_variant, profile_variant
    from core.recipe import Recipe

    catalog, recipe = _catalog(), Recipe.read(Path(args.recipe))
    progress = terminal_progress()
    if args.calibration is not None:
        recipe = recipe.calibrated_on(args.calibration)
    made = make_variant(catalog, args.model, recipe, progress=progress)
    ids = [made.variant.base_id, made.variant.id] if args.with_base else [made.variant.id]
    runs = []
    for id_ in ids:
        runs.append(
            evaluate_variant(
                catalog, id_, documents=args.documents, settings=pairs(args.evaluate_set), progress=progress
            )
        )
        speed = {"tier": args.tier, **pairs(args.profile_set)}
        runs.append(profile_variant(catalog, id_, settings=speed, progress=progress))
    return {**made.summary(), "runs": runs}


def plan_command(args: argparse.Namespace) -> Any:
    """Say how a model could fit into a budget of bytes, and what that is predicted to cost."""
    from core.planning import document, plan_model, summary

    planned = plan_model(
        _catalog(), args.model, args.budget, tolerance=args.tolerance, settings=pairs(args.set),
        progress=terminal_progress(),
    )  # fmt: skip
    return document(planned) if args.json else pd.DataFrame(summary(planned))


def sweep_command(args: argparse.Namespace) -> Any:
    """Make a variant for every combination of values of a method's settings, measure each, compare them."""
    from core.entries import opened
    from core.models.sizes import model_card
    from core.recipe import Recipe
    from core.sweep import Measuring, combinations, planned, run_sweep, values_of

    over = {name: values_of(text) for name, text in pairs(args.set).items()}
    recipes = combinations(Recipe.of(args.method).calibrated_on(args.calibration), over)
    catalog, progress = _catalog(), terminal_progress()
    if args.dry_run:
        return planned(catalog, model_card(opened(catalog, args.model, progress=progress)), recipes)
    speed = {"tier": args.tier, **pairs(args.profile_set)}
    measuring = Measuring(args.documents, pairs(args.evaluate_set), speed)
    rows = run_sweep(catalog, args.model, recipes, measuring, progress=progress)
    return rows if args.json else rows.reindex(columns=[*COMPARE_SHOWN, *{"failed"}.intersection(rows)])


def export_command(args: argparse.Namespace) -> Any:
    """Write a model for another runtime, held against the original there, with its card and checksums."""
    from core.delivery import export_to
    from core.registry import get

    settings = get("export", args.format).parse_text(pairs(args.set)).model_dump(mode="json")
    folder = Path(args.out).expanduser().resolve()
    return export_to(
        _catalog(), args.model, args.format, folder, settings=settings, progress=terminal_progress()
    ).summary()


def evaluate_command(args: argparse.Namespace) -> Any:
    """Measure a variant's quality against its base, reloaded from its artifact."""
    from core.loop import evaluate_variant, register

    catalog = _catalog()
    variant = register(catalog, args.model, progress=terminal_progress())
    return evaluate_variant(
        catalog,
        variant.id,
        method=args.method,
        documents=args.documents,
        settings=pairs(args.set),
        progress=terminal_progress(),
    )


def compare_command(args: argparse.Namespace) -> Any:
    """One row per variant: size, quality, speed, proof, and whether it is on the front; or every pair of some variants."""
    from core.loop import compare
    from core.pairwise import pairwise

    if args.pairs:
        return pairwise(_catalog(), args.pairs)
    rows = compare(_catalog(), base=args.base, objective=args.x, quality=args.y)
    return rows if args.json else rows.reindex(columns=COMPARE_SHOWN)


def jobs_command(args: argparse.Namespace) -> Any:
    """List jobs, or show, pause, resume, cancel or retry one."""
    from core.jobs.queue import Queue

    queue = Queue(_catalog())
    if args.action == "list":
        jobs = queue.jobs(limit=args.limit)
        shown = ("id", "kind", "state", "attempt", "message", "error")
        return (
            jobs
            if args.json
            else pd.DataFrame([{name: getattr(job, name) for name in shown} for job in jobs])
        )
    if not args.job:
        raise BadInput(f"`slimscope jobs {args.action}` needs a job id; see `slimscope jobs`")
    actions = {
        "show": queue.job, "pause": queue.pause, "resume": queue.resume, "cancel": queue.cancel, "retry": queue.retry,
    }  # fmt: skip
    return actions[args.action](args.job)


def doctor_command(args: argparse.Namespace) -> Any:
    """Say what this machine has, and what would stop Slimscope from working."""
    from core.doctor import examine

    return examine()


def pairs(items: Sequence[str]) -> dict[str, str]:
    """``["bits=4"]`` as ``{"bits": "4"}``; raises ``BadInput`` where there is no ``=``."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise BadInput(f"--set {wrong[0]!r} has no '='; write --set key=value, e.g. --set bits=4")
    return dict(item.split("=", 1) for item in items)


def _catalog() -> Any:
    from core.catalog.store import Catalog

    return Catalog()
