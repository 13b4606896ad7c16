"""Is a student worth its training: beside the same student without a teacher, and the teacher rounded to its size.

    python benchmarks/distillation.py [--parts a b c] [--data FOLDER] [--tokens 1000000] [--work FOLDER] [--quick]

(a) A sentence encoder is fine-tuned on every labelled file of ``--data`` (text and label; NAME_train* beside NAME_test* are
taken as they are, other files are split by content, a quarter to test on) and distilled to half its layers: accuracy,
bytes and latency of teacher, student, the same student trained without teacher, and the int8 teacher, with exact McNemar
tests. (b) SmolLM2 cut to 15 and 20 layers and trained on ``--tokens`` tokens by its kept answers: bits per byte beside the
cut alone, the same training without teacher, and SmolLM2 rounded to no more bytes. (c) SmolLM2 at 3 and 2 bits, recovered by
scales and norms and by LoRA: KL before and after.

Every row is a recipe made, proved and measured through the catalog in ``--work``; one that is there already is not made
again, and a training that was stopped goes on. Text is this Python's own (``stdlib`` to learn from, ``pydoc`` to measure
on) unless ``--text`` names other. ``--quick`` shows that everything runs; its figures say little.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.catalog.store import Catalog
from core.corpus.rows import Rows
from core.corpus.sources import open_rows
from core.corpus.splits import split
from core.entries import opened
from core.errors import BadInput
from core.evaluate._paired import Paired, compare
from core.loop import evaluate_variant, make_variant, register
from core.models.classify import class_logits, token_ids
from core.output import terminal_progress
from core.recipe import Recipe
from core.registry import get
from core.student_recipes import LOW_BITS, dropping, recipe_of
from core.types import Measurement, Run, Variant

ENCODER, DECODER = "demo:minilm", "demo:smollm2"
TEST_SHARE = 0.25
SPLIT_SEED = 1
"""Not the trainings' own: by one seed the test rows would be those that a training holds out."""
INT8 = ("rtn", {"bits": 8, "group_size": "channel", "scheme": "symmetric"})
ROUNDED = (INT8, *(("gptq", {"bits": bits, "group_size": "32", "scheme": "affine"}) for bits in (4, 3)))
"""What SmolLM2 is rounded to, until it has no more bytes than a student."""
LATENCY_TEXTS, LATENCY_ROUNDS = 16, 5


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    tokens: int
    epochs: int
    rows: int
    """Rows of a labelled file that are used, at most."""
    documents: int
    samples: int
    recovery_tokens: int


FULL = Effort(1_000_000, 4, 1_000_000, 24, 64, 200_000)
QUICK = Effort(6_000, 1, 240, 8, 4, 3_000)


def main() -> None:
    """Print the tables of the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", default=["a", "b", "c"], choices=["a", "b", "c"])
    parser.add_argument(
        "--data", type=Path, help="folder of labelled files; without one, the embedded languages"
    )
    parser.add_argument("--text", default="stdlib", help="what (b) and (c) learn from (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="training tokens of (b)")
    parser.add_argument(
        "--layers", nargs="*", type=int, default=[15, 20], help="layers of the students of (b)"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--work", type=Path, help="catalog and files, kept for the next call (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    if arguments.tokens:
        effort = Effort(**{**vars(effort), "tokens": arguments.tokens})
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; {effort}", flush=True)
    kept = (
        nullcontext(arguments.work)
        if arguments.work
        else tempfile.TemporaryDirectory(prefix="slimscope-bench-")
    )
    with kept as work:
        folder = Path(work)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(Catalog(f"sqlite:///{folder / 'catalog.sqlite'}"), folder, effort, arguments)
        for part in arguments.parts:
            {"a": tasks, "b": students, "c": recovery}[part](bench)


@dataclass(frozen=True)
class Bench:
    """The catalog that rows are made in, and how much is done."""

    catalog: Catalog
    folder: Path
    effort: Effort
    arguments: argparse.Namespace

    def made(self, model: str, *steps: tuple[str, Mapping[str, Any]]) -> Variant:
        """The variant of these steps, made where it is not there."""
        return self.by(model, recipe_of(steps))

    def by(self, model: str, recipe: Recipe) -> Variant:
        """The variant of a recipe."""
        return make_variant(self.catalog, model, recipe, progress=terminal_progress()).variant

    def measured(self, variant: Variant, documents: str, **settings: Any) -> Run:
        """The variant's evaluation on these rows or documents, done where it is not there."""
        for run in self.catalog.runs(variant.id):
            if run.kind == "evaluate" and all(
                run.conditions["settings"].get(k) == v for k, v in settings.items()
            ):
                return run
        return evaluate_variant(
            self.catalog, variant.id, documents=documents, settings=settings, progress=terminal_progress()
        )


# --- (a) students of a task ----------------------------------------------------------------------------


def tasks(bench: Bench) -> None:
    """Teacher, student, control and int8 teacher on every labelled file."""
    for name, train, test in _labelled(bench):
        learning = {"data": train, "epochs": bench.effort.epochs, "window": 128, "evaluate_every": 20_000}
        learning |= {"max_tokens": 10_000_000, "learning_rate": 1e-4, "samples": 0, "patience": 0}
        half = ("drop_layers", dropping(6, 3))
        teacher = bench.made(ENCODER, ("fine_tune", learning))
        kd = {**learning, "kd_weight": 1.0, "task_weight": 0.5, "temperature": 2.0}
        plain = {**learning, "kd_weight": 0.0, "task_weight": 1.0}
        rows = {
            "teacher": teacher,
            "teacher, int8": bench.made(teacher.source, INT8),
            "3 layers, no training": bench.made(teacher.source, half),
            "3 layers, plain": bench.made(teacher.source, half, ("distil", plain)),
            "3 layers, distilled": bench.made(teacher.source, half, ("distil", kd)),
            "3 layers, distilled, int8": bench.made(teacher.source, half, ("distil", kd), INT8),
        }
        _print_task(bench, name, test, rows)


def _labelled(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """(name, training rows, test rows) of every labelled file, as sources; files that must be split are written apart."""
    folder: Path | None = bench.arguments.data
    if folder is None:
        yield _parted(bench, "language", open_rows("builtin:language"))
        return
    files = sorted(path for path in folder.iterdir() if path.suffix in (".tsv", ".csv", ".jsonl"))
    tests = {path.stem.split("_test")[0]: path for path in files if "_test" in path.stem}
    others = [path for path in files if path not in tests.values()]
    if not others:
        raise BadInput(f"{folder} has no labelled file; give .tsv, .csv or .jsonl files with text and label")
    for path in others[-1:] if bench.arguments.quick else others:
        name = path.stem.split("_train")[0]
        if name in tests:
            sides = ((path, f"{name}_train"), (tests[name], f"{name}_test"))
            yield name, *(_written(bench, to, open_rows(str(part), kind="labelled")) for part, to in sides)
        else:
            yield _parted(bench, name, open_rows(str(path), kind="labelled"))


def _parted(bench: Bench, name: str, rows: Rows) -> tuple[str, str, str]:
    train, test = split(rows, held_out=TEST_SHARE, seed=SPLIT_SEED)
    return name, *(
        _written(bench, f"{name}_{side}", part) for side, part in (("train", train), ("test", test))
    )


def _written(bench: Bench, name: str, rows: Rows) -> str:
    """The rows as a file of the work folder, so that it belongs to the recipes; cut to what is used."""
    target = bench.folder / f"{name}.tsv"
    with target.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["text", "label"])
        step = max(1, len(rows) // bench.effort.rows)
        table.writerows([" ".join(row.text.split()), row.label] for row in rows.rows[::step])
    return str(target)


def _print_task(bench: Bench, name: str, test: str, rows: Mapping[str, Variant]) -> None:
    runs = {label: bench.measured(variant, test, max_tokens=128) for label, variant in rows.items()}
    rights = {}
    for label, run in runs.items():
        examples = bench.catalog.frame(run.id, "examples")
        rights[label] = (examples["answer"] == examples["label"]).to_numpy()
    speed = _latency(bench, rows, open_rows(test, kind="labelled"))
    n = len(next(iter(rights.values())))
    print(f"\n### (a) {name}: {n} test texts\n")
    print(
        "| model | MB | accuracy (95 %) | macro-F1 | ms per text (1 at a time) | against the teacher: only it, only this, p |"
    )
    print("|---|---|---|---|---|---|")
    for label, run in runs.items():
        found = {m.name: m for m in run.measurements}
        pair = compare(rights["teacher"], rights[label], draws=2000, seed=0)
        print(
            f"| {label} | {rows[label].bytes / 1e6:.1f} | {_interval(found['accuracy'])} | {found['macro_f1'].value:.4f} | "
            f"{speed[label]:.2f} | {'–' if label == 'teacher' else _paired(pair)} |",
            flush=True,
        )
    pair = compare(rights["3 layers, plain"], rights["3 layers, distilled"], draws=2000, seed=0)
    verdict = (
        "better"
        if pair.p_value < 0.05 and pair.difference > 0
        else "worse"
        if pair.p_value < 0.05
        else "no different"
    )
    print(
        f"\nDistilled against plain: {_paired(pair)}; by this test distilling is {verdict} (0.05).",
        flush=True,
    )


def _latency(bench: Bench, rows: Mapping[str, Variant], texts: Rows) -> dict[str, float]:
    """Median milliseconds of a text, one at a time; all models take turns on the same texts."""
    models = {label: opened(bench.catalog, variant.source, dtype="stored") for label, variant in rows.items()}
    some = [row.text for row in texts.rows[:LATENCY_TEXTS]]
    found: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(LATENCY_ROUNDS):
        for text in some:
            for label, model in models.items():
                began = time.perf_counter()
                inputs, _ = token_ids(model, [text], None, max_tokens=128)
                class_logits(model, inputs)
                found[label].append(1000 * (time.perf_counter() - began))
    return {label: statistics.median(values[len(some) :]) for label, values in found.items()}


# --- (b) smaller language models -----------------------------------------------------------------------


def students(bench: Bench) -> None:
    """SmolLM2 with fewer layers, by its kept answers, beside what it must beat."""
    base = register(bench.catalog, DECODER)
    n_layers = opened(bench.catalog, DECODER).anatomy.n_layers
    learning = _learning(bench, bench.effort.tokens)
    rows = {"SmolLM2": base}
    for layers in bench.arguments.layers[: 1 if bench.arguments.quick else None]:
        cut = ("drop_layers", dropping(n_layers, layers))
        rows[f"{layers} layers, no training"] = bench.made(DECODER, cut)
        plain = {**learning, "kd_weight": 0.0, "task_weight": 1.0}
        rows[f"{layers} layers, plain"] = bench.made(DECODER, cut, ("distil", plain))
        rows[f"{layers} layers, distilled"] = bench.made(DECODER, cut, ("distil", learning))
    limit = min(variant.bytes for label, variant in rows.items() if label != "SmolLM2")
    for method, settings in ROUNDED:
        rounded = bench.made(DECODER, (method, _sampled(bench, method, settings)))
        rows[f"SmolLM2, {settings['bits']} bits"] = rounded
        if rounded.bytes <= limit:
            break
    _print_language(bench, f"(b) SmolLM2, {bench.effort.tokens:,} tokens of {bench.arguments.text}", rows)


# --- (c) recovery after rounding -----------------------------------------------------------------------


def recovery(bench: Bench) -> None:
    """SmolLM2 at few bits, before and after its scales and norms, or low-rank updates, learned from the original."""
    rows = {}
    for bits in (3,) if bench.arguments.quick else (3, 2):
        grid = ("gptq", _sampled(bench, "gptq", {"bits": bits, **LOW_BITS}))
        rows[f"{bits} bits"] = bench.made(DECODER, grid)
        for moves, rate in (("scales_and_norms", 1e-3), ("lora", 2e-4)):
            training = {
                **_learning(bench, bench.effort.recovery_tokens),
                "train": moves,
                "learning_rate": rate,
            }
            rows[f"{bits} bits, {moves.replace('_', ' ')}"] = bench.made(DECODER, grid, ("distil", training))
    _print_language(
        bench, f"(c) recovery, {bench.effort.recovery_tokens:,} tokens of {bench.arguments.text}", rows
    )


def _learning(bench: Bench, tokens: int) -> dict[str, Any]:
    learning: dict[str, Any] = {
        "data": bench.arguments.text,
        "max_tokens": tokens,
        "samples": 0,
        "patience": 0,
    }
    learning |= {"precision": bench.arguments.precision, "evaluate_every": max(2000, tokens // 5)}
    return learning | ({"batch_tokens": 1024, "held_out_tokens": 1024} if bench.arguments.quick else {})


def _sampled(bench: Bench, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    reads = "samples" in get("compress", method).settings.model_fields
    return {**settings, **({"samples": bench.effort.samples} if reads else {})}


def _print_language(bench: Bench, title: str, rows: Mapping[str, Variant]) -> None:
    print(f"\n### {title}; measured on pydoc\n")
    print(
        "| model | MB | bits per weight | bits per byte (95 %) | KL to SmolLM2, nats/token (95 %) | top-1 agreement |"
    )
    print("|---|---|---|---|---|---|")
    for label, variant in rows.items():
        run = bench.measured(variant, "pydoc", max_documents=bench.effort.documents)
        found = {m.name: m for m in run.measurements}
        print(
            f"| {label} | {variant.bytes / 1e6:.1f} | {variant.bits_per_weight:.2f} | {_interval(found['bits_per_byte'])} | "
            f"{_interval(found['kl'])} | {found['top1_agreement'].value:.3f} |",
            flush=True,
        )


def _interval(one: Measurement) -> str:
    return f"{one.value:.4f}" + ("" if one.low is None else f" ({one.low:.4f} to {one.high:.4f})")


def _paired(pair: Paired) -> str:
    return f"{pair.difference:+.4f} ({pair.only_a} against {pair.only_b}), p = {pair.p_value:.3g}"


if __name__ == "__main__":
    main()
