"""``slimscope``: the same engine from a terminal.

One command per step of the loop, one model syntax everywhere, ``--set key=value`` for a method's settings.
With ``--json`` stdout carries exactly one JSON document; progress and logs go to stderr. A wrong input ends
with one line and exit code 1 (2 for a command line that cannot be read).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from core.errors import BadInput, Cancelled, SlimscopeError, refused_by_system
from core.output import human, plain, terminal_progress
from core.profile.protocol import EFFORTS
from core.registry import PACKAGES
from core.types import Prompt

DEFAULT_TEXT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the"

COMPARE_SHOWN = [
    *("variant", "name", "bytes", "bits_per_weight", "kl", "kl_low", "kl_high", "bits_per_byte"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", "proven", "on_front"),
]
"""What a terminal is wide enough for; ``--json`` has every column."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.catalog:
        # In the environment, because supervisor, workers and the inspector must use the same one.
        os.environ["SLIMSCOPE_CATALOG"] = as_url(args.catalog)
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        # Libraries print; stdout belongs to the answer alone.
        with contextlib.redirect_stdout(sys.stderr):
            answer = args.command(args)
        if answer is not None:
            text = (
                json.dumps(plain(answer), ensure_ascii=False, allow_nan=False) if args.json else human(answer)
            )
            print(text, flush=True)
    except SlimscopeError as error:
        print(f"slimscope: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Cancelled):
        print("slimscope: stopped; what was finished is in the catalog", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our answer has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"slimscope: {refused_by_system(error)}", file=sys.stderr)
        return 1
    return 0


def _interrupted(*_: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does: gently, with its temporary files removed."""
    raise KeyboardInterrupt


def as_url(catalog: str) -> str:
    """A ``--catalog`` value as SQLAlchemy URL: a URL as it is, anything else as path of a SQLite file."""
    return catalog if "://" in catalog else f"sqlite:///{Path(catalog).expanduser().resolve()}"


# --- commands -----------------------------------------------------------------------------------------


def command_open(args: argparse.Namespace) -> Any:
    """Open a model, verify its anatomy, print what it is."""
    from core.loop import opened
    from core.models.sizes import model_card

    return model_card(opened(_catalog(), args.model, progress=terminal_progress()))


def command_methods(args: argparse.Namespace) -> Any:
    """List every method with its settings."""
    from core.registry import methods

    kinds = [args.kind] if args.kind else list(PACKAGES)
    found = [method.describe() for kind in kinds for method in methods(kind).values()]
    return found if args.json else pd.DataFrame(found)[["kind", "id", "title", "needs", "summary"]]


def command_probe(args: argparse.Namespace) -> Any:
    """Look inside a model with one probe, or say what that would cost."""
    from core.bench import original_of
    from core.calling import refuse_misfit, run_probe
    from core.loop import opened
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


def command_train(args: argparse.Namespace) -> Any:
    """Train an instrument on a model's activations; its artifact is what a probe's setting takes."""
    from core.bench import train_on
    from core.registry import get

    settings = get("train", args.method).parse_text(pairs(args.set)).model_dump(mode="json")
    return train_on(
        _catalog(), args.model, args.method, text=args.text, settings=settings, progress=terminal_progress()
    )


def command_compress(args: argparse.Namespace) -> Any:
    """Make a variant by one method, and prove that it reloads."""
    from core.loop import make_variant
    from core.recipe import Recipe
    from core.registry import get

    settings = get("compress", args.method).parse_text(pairs(args.set))
    recipe = Recipe.of(args.method, **settings.model_dump(mode="json")).calibrated_on(args.calibration)
    return make_variant(_catalog(), args.model, recipe, progress=terminal_progress()).summary()


def command_run(args: argparse.Namespace) -> Any:
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


def command_plan(args: argparse.Namespace) -> Any:
    """Say how a model could fit into a budget of bytes, and what that is predicted to cost."""
    from core.planning import document, plan_model, summary

    planned = plan_model(
        _catalog(), args.model, args.budget, tolerance=args.tolerance, settings=pairs(args.set),
        progress=terminal_progress(),
    )  # fmt: skip
    return document(planned) if args.json else pd.DataFrame(summary(planned))


def command_sweep(args: argparse.Namespace) -> Any:
    """Make a variant for every combination of values of a method's settings, measure each, compare them."""
    from core.loop import opened
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


def command_export(args: argparse.Namespace) -> Any:
    """Write a model for another runtime, held against the original there, with its card and checksums."""
    from core.delivery import export_to
    from core.registry import get

    settings = get("export", args.format).parse_text(pairs(args.set)).model_dump(mode="json")
    folder = Path(args.out).expanduser().resolve()
    return export_to(
        _catalog(), args.model, args.format, folder, settings=settings, progress=terminal_progress()
    ).summary()


def command_evaluate(args: argparse.Namespace) -> Any:
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


def command_profile(args: argparse.Namespace) -> Any:
    """Measure a variant's speed and memory in a fresh process."""
    from core.loop import profile_variant, register

    catalog = _catalog()
    variant = register(catalog, args.model, progress=terminal_progress())
    settings = {**({"tier": args.tier} if args.tier else {}), **pairs(args.set)}
    return profile_variant(
        catalog, variant.id, method=args.runtime, settings=settings, progress=terminal_progress()
    )


def command_compare(args: argparse.Namespace) -> Any:
    """One row per variant: size, quality, speed, proof, and whether it is on the front."""
    from core.loop import compare

    rows = compare(_catalog(), base=args.base, objective=args.x, quality=args.y)
    return rows if args.json else rows.reindex(columns=COMPARE_SHOWN)


def command_jobs(args: argparse.Namespace) -> Any:
    """List jobs, or cancel, retry or show one."""
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
    return {"show": queue.job, "cancel": queue.cancel, "retry": queue.retry}[args.action](args.job)


def command_doctor(args: argparse.Namespace) -> Any:
    """Say what this machine has, and what would stop Slimscope from working."""
    from core.doctor import examine

    return examine()


def command_ui(args: argparse.Namespace) -> Any:
    """Open the dashboard."""
    from app.server import serve

    serve(host=args.host, port=args.port, open_browser=has_display() and not args.no_browser)


# --- the command line ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; its help is the reference."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    shared.add_argument(
        "--catalog",
        metavar="PATH",
        help="SQLite file or SQLAlchemy URL (default: SLIMSCOPE_CATALOG or the user's data folder)",
    )
    top = argparse.ArgumentParser(
        prog="slimscope", description="See inside a transformer, size it down, and know what it cost."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").splitlines()[0]
        parser = commands.add_parser(name, help=text, description=text, parents=[shared])
        parser.set_defaults(command=run)
        return parser

    _add_looking(add)
    _add_making(add)
    _add_leaving(add)
    _add_measuring(add)
    _add_keeping(add)
    return top


Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]


def _add_looking(add: Add) -> None:
    _takes_model(add("open", command_open), "model")
    parser = add("methods", command_methods)
    parser.add_argument("--kind", choices=list(PACKAGES), help="only methods of this kind")
    parser = add("probe", command_probe)
    parser.add_argument("method", help="id of a probe, e.g. logit_lens")
    _takes_model(parser, "--model")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="the prompt")
    parser.add_argument("--second", help="second text of a pair, for encoders")
    parser.add_argument("--image", help="a vision model's input: an image file, or digits:N")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original that a comparing probe holds the model against (default: a variant's base)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what it is expected to take")
    _takes_settings(parser)
    parser = add("train", command_train)
    parser.add_argument("method", help="id of a training method")
    _takes_model(parser, "--model")
    _takes_text(parser, "--text")
    _takes_settings(parser)


def _add_making(add: Add) -> None:
    parser = add("compress", command_compress)
    parser.add_argument("method", help="id of a compress method, e.g. rtn")
    _takes_model(parser, "--model")
    _takes_settings(parser)
    _takes_calibration(parser)
    parser = add("run", command_run)
    parser.add_argument("recipe", help="a recipe file (JSON)")
    _takes_model(parser, "--model")
    _takes_calibration(parser)
    _takes_measuring(parser)
    parser.add_argument("--with-base", action="store_true", help="measure the base too, in the same session")
    parser = add("plan", command_plan)
    _takes_model(parser, "--model")
    parser.add_argument(
        "--budget", required=True, help="of the weight file: 60MB, 1.2GB, or 4.5bpw (bits per weight)"
    )
    parser.add_argument("--tolerance", help="largest loss: 0.1 (KL in nats), or 0.05bpb (bits per byte more)")
    _takes_settings(
        parser, of="sensitivities; without any the newest stored ones are used, else measure=fisher"
    )
    parser = add("sweep", command_sweep)
    parser.add_argument("method", help="id of a compress method, e.g. rtn")
    _takes_model(parser, "--model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=V1,V2", help="a setting's values; repeatable"
    )
    _takes_calibration(parser)
    _takes_measuring(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="only list the variants and their predicted bytes"
    )


def _takes_measuring(parser: argparse.ArgumentParser) -> None:
    _takes_text(parser, "--documents")
    parser.add_argument(
        "--tier",
        default="rapid",
        choices=list(EFFORTS),
        help="how long to measure speed (default: %(default)s)",
    )
    _takes_settings(parser, "--evaluate-set", of="evaluation")
    _takes_settings(parser, "--profile-set", of="profile")


def _add_leaving(add: Add) -> None:
    parser = add("export", command_export)
    parser.add_argument("format", help="id of an export, e.g. onnx")
    _takes_model(parser, "--model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    _takes_settings(parser)


def _add_measuring(add: Add) -> None:
    parser = add("evaluate", command_evaluate)
    _takes_model(parser, "model")
    parser.add_argument("--method", help="id of an evaluation (default: by model family)")
    _takes_text(parser, "--documents")
    _takes_settings(parser)
    parser = add("profile", command_profile)
    _takes_model(parser, "model")
    parser.add_argument("--runtime", default="torch_eager", help="id of a runtime (default: %(default)s)")
    parser.add_argument("--tier", choices=list(EFFORTS), help="how long to measure")
    _takes_settings(parser)
    parser = add("compare", command_compare)
    parser.add_argument(
        "--base", metavar="MODEL", help="only variants of this base: its id or how it was opened"
    )
    parser.add_argument("--x", default="bytes", help="cost axis of the front (default: %(default)s)")
    parser.add_argument(
        "--y", default=None, help="quality axis of the front (default: kl, or cosine_agreement for encoders)"
    )


def _add_keeping(add: Add) -> None:
    parser = add("jobs", command_jobs)
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "cancel", "retry"])
    parser.add_argument("job", nargs="?", help="id of a job")
    parser.add_argument("--limit", type=int, default=20, help="how many to list (default: %(default)s)")
    add("doctor", command_doctor)
    parser = add("ui", command_ui)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    parser.add_argument("--port", type=int, default=8501, help="port (default: %(default)s)")


def _takes_model(parser: argparse.ArgumentParser, name: str) -> None:
    text = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"
    required = {} if name == "model" else {"required": True}
    parser.add_argument(name, metavar="MODEL", help=text, **required)  # type: ignore[arg-type]


_TEXTS = "pydoc, domains, domain:NAME, a .txt or .jsonl file, or hub:ID"


def _takes_text(parser: argparse.ArgumentParser, name: str) -> None:
    text = f"{_TEXTS} (default: %(default)s)"
    parser.add_argument(name, default="pydoc", metavar="SOURCE", help=text)


def _takes_calibration(parser: argparse.ArgumentParser) -> None:
    text = f"text for steps that read any: {_TEXTS} (default: the recipe's own, else pydoc)"
    parser.add_argument("--calibration", metavar="SOURCE", help=text)


def _takes_settings(parser: argparse.ArgumentParser, name: str = "--set", of: str = "method") -> None:
    text = f"a setting of the {of}; repeatable (see `slimscope methods`)"
    parser.add_argument(name, action="append", default=[], metavar="KEY=VALUE", help=text)


def has_display() -> bool:
    """Whether a browser window can open here: always on macOS and Windows, with a display server elsewhere."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def pairs(items: Sequence[str]) -> dict[str, str]:
    """``["bits=4"]`` as ``{"bits": "4"}``; raises ``BadInput`` where there is no ``=``."""
    wrong = [item for item in items if "=" not in item]
    if wrong:
        raise BadInput(f"--set {wrong[0]!r} has no '='; write --set key=value, e.g. --set bits=4")
    return dict(item.split("=", 1) for item in items)


def _catalog() -> Any:
    from core.catalog.store import Catalog

    return Catalog()


if __name__ == "__main__":
    sys.exit(main())
