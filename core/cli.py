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

from core import (
    commands,
    devices_commands,
    import_commands,
    learning_commands,
    predict_commands,
    profile_commands,
    where_commands,
)
from core.errors import Cancelled, SlimscopeError, refused_by_system
from core.output import human, plain
from core.profile.protocol import EFFORTS
from core.registry import PACKAGES

DEFAULT_TEXT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the"


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


def ui_command(args: argparse.Namespace) -> Any:
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
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").splitlines()[0]
        parser = subparsers.add_parser(name, help=text, description=text, parents=[shared])
        parser.set_defaults(command=run)
        return parser

    _add_looking(add)
    _add_making(add)
    _add_learning(add)
    _add_leaving(add)
    _add_measuring(add)
    profile_commands.add_to(add)
    where_commands.add_to(add)
    predict_commands.add_to(add)
    import_commands.add_to(add)
    devices_commands.add_to(add)
    _add_keeping(add)
    return top


Add = Callable[[str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]


def _add_looking(add: Add) -> None:
    _takes_model(add("open", commands.open_command), "model")
    parser = add("methods", commands.methods_command)
    parser.add_argument("--kind", choices=list(PACKAGES), help="only methods of this kind")
    parser = add("probe", commands.probe_command)
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
    parser = add("train", commands.train_command)
    parser.add_argument("method", help="id of a training method")
    _takes_model(parser, "--model")
    _takes_text(parser, "--text")
    _takes_settings(parser)


def _add_making(add: Add) -> None:
    parser = add("compress", commands.compress_command)
    parser.add_argument("method", help="id of a compress method, e.g. rtn")
    _takes_model(parser, "--model")
    _takes_settings(parser)
    _takes_calibration(parser)
    parser = add("run", commands.run_command)
    parser.add_argument("recipe", help="a recipe file (JSON)")
    _takes_model(parser, "--model")
    _takes_calibration(parser)
    _takes_measuring(parser)
    parser.add_argument("--with-base", action="store_true", help="measure the base too, in the same session")
    parser = add("plan", commands.plan_command)
    _takes_model(parser, "--model")
    parser.add_argument(
        "--budget", required=True, help="of the weight file: 60MB, 1.2GB, or 4.5bpw (bits per weight)"
    )
    parser.add_argument("--tolerance", help="largest loss: 0.1 (KL in nats), or 0.05bpb (bits per byte more)")
    _takes_settings(
        parser, of="sensitivities; without any the newest stored ones are used, else measure=fisher"
    )
    parser = add("sweep", commands.sweep_command)
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


def _add_learning(add: Add) -> None:
    parser = add("distil", learning_commands.distil_command)
    _takes_model(parser, "model")
    parser.add_argument("--template", help="a ready recipe: half, two_thirds, narrow, recover, dense or task")
    parser.add_argument("--layers", type=int, metavar="N", help="layers the student keeps")
    parser.add_argument(
        "--criterion", default="even", help="which: even, ends, block_influence … (default: %(default)s)"
    )
    parser.add_argument("--width", type=float, metavar="SHARE", help="share of every MLP's neurons it keeps")
    parser.add_argument(
        "--bits", type=int, metavar="N", help="round it with GPTQ; then scales and norms learn"
    )
    parser.add_argument("--student", metavar="MODEL", help="an existing model instead")
    parser.add_argument(
        "--step", action="append", default=[], metavar="METHOD:KEY=VALUE,…", help="a further step; repeatable"
    )
    parser.add_argument("--data", metavar="SOURCE", help="rows to learn from (see `slimscope data`)")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="whom it learns from (default: MODEL, or its base)"
    )
    _takes_settings(parser, of="training")
    _takes_calibration(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the recipe")
    parser = add("data", learning_commands.data_command)
    sources = "pydoc, stdlib, domains, builtin:NAME, a file or folder, or hub:ID[:SPLIT]"
    parser.add_argument("source", metavar="SOURCE", help=sources)
    _takes_model(parser, "--model", required=False)
    parser.add_argument(
        "--kind", default="auto", choices=["auto", "text", "instruction", "labelled", "pairs"],
        help="what to make of a table (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--window", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.1, help="share held out (default: %(default)s)")
    parser.add_argument("--against", metavar="SOURCE", help="text it will be measured on, to find leaks")


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
    parser = add("export", commands.export_command)
    parser.add_argument("format", help="id of an export, e.g. onnx")
    _takes_model(parser, "--model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    _takes_settings(parser)


def _add_measuring(add: Add) -> None:
    parser = add("evaluate", commands.evaluate_command)
    _takes_model(parser, "model")
    parser.add_argument("--method", help="id of an evaluation (default: by model family)")
    _takes_text(parser, "--documents")
    _takes_settings(parser)
    parser = add("compare", commands.compare_command)
    parser.add_argument(
        "--base", metavar="MODEL", help="only variants of this base: its id or how it was opened"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="ID",
        help="hold these variants against each other, text by text (exact McNemar)",
    )
    parser.add_argument("--x", default="bytes", help="cost axis of the front (default: %(default)s)")
    parser.add_argument(
        "--y", default=None, help="quality axis of the front (default: kl, or cosine_agreement for encoders)"
    )


def _add_keeping(add: Add) -> None:
    parser = add("jobs", commands.jobs_command)
    parser.add_argument(
        "action", nargs="?", default="list", choices=["list", "show", "pause", "resume", "cancel", "retry"]
    )
    parser.add_argument("job", nargs="?", help="id of a job")
    parser.add_argument("--limit", type=int, default=20, help="how many to list (default: %(default)s)")
    add("doctor", commands.doctor_command)
    parser = add("ui", ui_command)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser window")
    parser.add_argument("--port", type=int, default=8501, help="port (default: %(default)s)")


def _takes_model(parser: argparse.ArgumentParser, name: str, *, required: bool = True) -> None:
    text = "demo:NAME, variant:ID, a folder, a .gguf file, or a hub id with optional @revision"
    if name.startswith("--"):
        parser.add_argument(name, metavar="MODEL", help=text, required=required)
    else:
        parser.add_argument(name, metavar="MODEL", help=text)


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


if __name__ == "__main__":
    sys.exit(main())
