"""How fast a student learns: with its teacher's answers kept, with its teacher run beside it, and in TRL's trainer.

    python benchmarks/distillation_speed.py [--updates 6] [--rows 8] [--window 256] [--layers 15] [--threads 1]
                                            [--rounds 3] [--peer PYTHON]

SmolLM2 teaches the student made of every second of its layers, on the same tokens in the same order, float32, AdamW,
forward KL at temperature 1, whole vocabulary but for the kept answers (the 64 likeliest tokens and the mass of all others).
Each contestant is a process of its own; they take turns, and what is compared is processor seconds per update (the first
update, which warms up, left out), which other work on the machine disturbs less than the clock. ``--peer`` names the Python
of an environment with TRL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.catalog.store import Catalog
from core.corpus.batches import TrainingData, order, tokenized
from core.corpus.packing import Layout
from core.corpus.sources import open_rows
from core.loop import make_variant
from core.models.loaded import LoadedModel
from core.models.open import local_folder, open_model
from core.student_recipes import dropping, recipe_of
from core.types import ModelRef

OURS = ("teacher live", "teacher kept")
TEACHER = "demo:smollm2"


def main() -> None:
    """Take turns, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--updates", type=int, default=6, help="updates of each contestant, the first not counted"
    )
    parser.add_argument("--rows", type=int, default=8, help="windows of one update")
    parser.add_argument("--micro", type=int, default=4, help="windows of one forward and backward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--layers", type=int, default=15, help="layers of the student")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with TRL")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "STUDENT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(_ours(*arguments.one, arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="slimscope-bench-") as folder:
        _compare(arguments, Path(folder))


def _compare(arguments: argparse.Namespace, folder: Path) -> None:
    catalog = Catalog(f"sqlite:///{folder / 'catalog.sqlite'}")
    recipe = recipe_of([("drop_layers", dropping(30, arguments.layers))])
    student = catalog.variant_folder(make_variant(catalog, TEACHER, recipe).variant.id)
    data = _data(open_model(ModelRef(TEACHER)), arguments)
    windows = [data.batch([row]).ids_BP[0].tolist() for row in order(data.n_rows, 0, 0)]
    (folder / "ids.json").write_text(json.dumps(windows), encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for who in OURS:
            command = [
                sys.executable,
                __file__,
                *_repeated(arguments),
                "--one",
                who,
                str(student),
                str(folder),
            ]
            found.setdefault(who, []).append(_run(command, arguments.threads))
            print(f"{who}: done", file=sys.stderr, flush=True)
        if arguments.peer:
            command = [
                arguments.peer, str(Path(__file__).with_name("distillation_peer.py")), str(local_folder(ModelRef(TEACHER))),
                str(student), str(folder / "ids.json"), str(arguments.updates), str(arguments.rows), str(arguments.micro),
            ]  # fmt: skip
            one = _run(command, arguments.threads)
            found.setdefault(one["version"], []).append(one)
    _print(found, arguments)


def _data(teacher: LoadedModel, arguments: argparse.Namespace) -> TrainingData:
    """Whole windows only, as many as all updates read."""
    data = tokenized(open_rows("stdlib"), teacher.tokenizer, window=arguments.window)
    lengths_S = np.diff(data.encoded.bounds_S1)
    chosen_S = np.flatnonzero(lengths_S == arguments.window)[: arguments.updates * arguments.rows]
    assert len(chosen_S) == arguments.updates * arguments.rows, "the text has too few whole windows"
    return replace(data, layout=Layout(chosen_S, np.arange(len(chosen_S) + 1)))


def _repeated(arguments: argparse.Namespace) -> list[str]:
    names = ("updates", "rows", "micro", "window", "layers", "threads")
    return [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]


def _run(command: list[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _ours(who: str, student: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Our trainer on the same windows; the teacher's answers are kept before the clock starts."""
    from core.distill.language_objective import LanguageObjective
    from core.distill.live_teacher import LiveTeacher, Teacher
    from core.distill.losses.logit_gradient import Terms
    from core.distill.losses.named import named
    from core.distill.settings import DistilSettings
    from core.distill.teacher_cache import build
    from core.distill.trainable.prepare import prepare
    from core.distill.trainer import Job, train

    teacher, learner = open_model(ModelRef(TEACHER)), open_model(ModelRef(student))
    data = _data(teacher, arguments)
    settings = DistilSettings(
        batch_tokens=arguments.rows * arguments.window, micro_batch=arguments.micro, window=arguments.window,
        max_tokens=arguments.updates * arguments.rows * arguments.window, schedule="constant", warmup=0.0, epochs=1,
        evaluate_every=0, held_out_tokens=256, samples=0, checkpoint_minutes=1440,
    )  # fmt: skip
    live = LiveTeacher(teacher)
    kept: Teacher = build(live, data, folder=Path(folder) / "kept") if who == "teacher kept" else live
    objective = LanguageObjective(learner, kept, Terms(named("forward_kl")))
    clock = _Clock()
    trained = train(
        Job(learner, objective, data, data, prepare(learner, settings), settings), progress=clock.progress
    )
    losses = [point["loss"] for point in trained.curve.points if point["kind"] == "update"]
    return {**clock.seconds(), "losses": losses}


class _Clock:
    """When each update began, from what the trainer tells: its first word of an update, and the first thereafter."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, float]] = {}

    def progress(self, done: float, total: float, message: str) -> None:
        """Told by the trainer at every micro-batch."""
        name = message.split(":")[0]
        self._began.setdefault(name, (time.perf_counter(), time.process_time()))

    def seconds(self) -> dict[str, list[float]]:
        """Wall and processor seconds of every update but the last, whose end nobody told."""
        marks = [mark for name, mark in self._began.items() if name.startswith("update")]
        pairs = list(itertools.pairwise(marks))
        return {"wall": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs]}


def _print(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    tokens = arguments.rows * arguments.window
    print(
        f"\n{arguments.layers} layers learn from 30; updates of {arguments.rows} × {arguments.window} tokens in float32, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| who | tokens per processor second | tokens/s | ratio (each round) | first loss, nats |")
    print("|---|---|---|---|---|")
    medians = {who: [statistics.median(one["cpu"][1:]) for one in rounds] for who, rounds in found.items()}
    reference = medians[OURS[0]]
    for who, rounds in found.items():
        wall = statistics.median(second for one in rounds for second in one["wall"][1:])
        ratios = [base / own for base, own in zip(reference, medians[who], strict=True)]
        print(
            f"| {who} | {tokens / statistics.median(medians[who]):.0f} | {tokens / wall:.0f} | "
            f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | "
            f"{rounds[0]['losses'][0]:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
