"""Every way of having fewer bits, on several models, beside what other libraries make of the same files.

    python benchmarks/compression.py [--models …] [--bits 8 4 3 2] [--documents 24] [--samples 128] [--sample-tokens 512]
                                     [--peers PYTHON …] [--only WORD] [--no-learned]

One table per model: bytes of the weight file, bits per weight, KL to the base with its 95 % interval, bits per byte,
seconds of making (proof and loading included) and peak memory of the process that made it. Each row is made by a process
of its own and scored from the files on disk. ``smollm2 rotated`` is SmolLM2 after the rotation step: the published
weights lie on a 4-bit grid of groups of 32 already, which flatters every method on that grid; rotated ones do not.
``--peers`` names the Pythons of environments with other libraries (``benchmarks/peers.py`` says which); each peer reads
the same calibration windows, and its weights are scored by the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.catalog.store import Catalog
from core.entries import opened
from core.loop import evaluate_variant, make_variant, register
from core.models.open import local_folder
from core.recipe import Recipe
from core.registry import methods
from core.text.documents import load_documents
from core.types import ModelRef

MODELS = ("demo:smollm2", "smollm2 rotated", "demo:moe", "demo:minilm")
PEERS = {
    "quanto": (8, 4, 2),
    "bitsandbytes": (8, 4),
    "torchao": (8,),
    "llm_compressor": (4, 3, 2),
    "auto_round": (4, 3, 2),
}
FREE = ("rtn", "hqq")
CALIBRATED = ("gptq", "awq", "learned_rounding")


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    bits: float
    nbytes: int
    bits_per_weight: float
    kl: tuple[float, float | None, float | None] | None
    bits_per_byte: float | None
    cosine: float | None
    seconds: float
    peak_bytes: int


def main() -> None:
    """Make, score and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--documents", type=int, default=24, help="evaluation documents")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens of each")
    parser.add_argument("--peers", nargs="*", default=[], help="Python of each environment that has peers")
    parser.add_argument("--only", default="", help="only rows whose name holds this word")
    parser.add_argument("--no-learned", action="store_true", help="leave learned rounding out: minutes a row")
    parser.add_argument("--one", nargs=3, metavar=("CATALOG", "MODEL", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        made = make_variant(
            Catalog(arguments.one[0]),
            arguments.one[1],
            Recipe.parse(json.loads(arguments.one[2])),
        )
        print(json.dumps(made.summary(), default=str))
        return
    with tempfile.TemporaryDirectory(prefix="slimscope-bench-") as scratch:
        for name in arguments.models:
            _table(name, arguments, Path(scratch))


def _table(name: str, arguments: argparse.Namespace, scratch: Path) -> None:
    url = f"sqlite:///{scratch / 'catalog.sqlite'}"
    catalog = Catalog(url)
    source = name
    if name == "smollm2 rotated":
        made, *_ = _made(url, "demo:smollm2", Recipe.of("rotate"))
        # A folder of its own, so that it is a base: its variants are compared with it, not with what it came from.
        source = str(catalog.variant_folder(made["variant"]))
    base = register(catalog, source)
    print(
        f"\n### {name}: {base.parameters:,} parameters, {base.bytes / 1e6:.1f} MB; calibration {arguments.samples} × "
        f"{arguments.sample_tokens} tokens; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| method | bits | MB | bits/weight | KL, nats/token (95 %) | bits/byte | cosine | s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for label, bits, recipe in _recipes(arguments):
        try:
            made, seconds, peak = _made(url, source, recipe)
        except RuntimeError as error:
            print(f"| {label} | {bits:g} | {str(error).strip().splitlines()[-1][:150]} |", flush=True)
            continue
        variant = catalog.variant(made["variant"])
        scores = _scores(catalog, variant.id, arguments)
        _print(
            Row(
                label,
                bits,
                variant.bytes,
                variant.bits_per_weight,
                seconds=seconds,
                peak_bytes=peak,
                **scores,
            )
        )
    if base.family == "decoder":
        for row in _peers(catalog, source, base.parameters, arguments, scratch):
            _print(row)


def _recipes(arguments: argparse.Namespace) -> Iterator[tuple[str, float, Recipe]]:
    """Label, bits and recipe of each of ours."""
    known = methods("compress")
    for bits in arguments.bits:
        for method in (*FREE, *CALIBRATED):
            if method not in known or (arguments.no_learned and method == "learned_rounding"):
                continue
            if bits == 8 and method != "rtn":
                continue
            fields = known[method].settings.model_fields
            settings: dict[str, Any] = {"bits": bits, "group_size": "channel" if bits == 8 else "32"}
            if "scheme" in fields:
                settings["scheme"] = "symmetric" if bits == 8 else "affine"
            if "samples" in fields:
                settings |= {"samples": arguments.samples, "sample_tokens": arguments.sample_tokens}
            label = f"{method} {'channel' if bits == 8 else 'g32 affine'}"
            if arguments.only in label:
                yield label, bits, Recipe.of(method, **settings)
            if method == "gptq" and arguments.only in (label := f"{label}, tables in 16 bits"):
                yield label, bits, Recipe.of(method, **settings, embedding_bits=16)


def _made(url: str, model: str, recipe: Recipe) -> tuple[dict[str, Any], float, int]:
    """What the command line would print, seconds, and peak resident bytes of the process that did it."""
    command = [sys.executable, __file__, "--one", url, model, recipe.canonical()]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as words:
        child = subprocess.Popen(command, stdout=out, stderr=words, text=True)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        words.seek(0)
        if child.returncode:
            raise RuntimeError(words.read() or f"exit code {child.returncode}")
        return json.loads(out.read().strip().splitlines()[-1]), seconds, usage.ru_maxrss * 1024


def _scores(catalog: Catalog, variant_id: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """KL, bits per byte and cosine agreement as the dashboard would show them."""
    run = evaluate_variant(catalog, variant_id, settings={"max_documents": arguments.documents})
    found = {m.name: m for m in run.measurements}
    kl = found.get("kl")
    return {
        "kl": None if kl is None else (kl.value, kl.low, kl.high),
        "bits_per_byte": found["bits_per_byte"].value if "bits_per_byte" in found else None,
        "cosine": found["cosine_agreement"].value if "cosine_agreement" in found else None,
    }


def _peers(
    catalog: Catalog, source: str, parameters: int, arguments: argparse.Namespace, scratch: Path
) -> Iterator[Row]:
    """The other libraries' rows; one that is not installed in any environment says so."""
    from core.calibrate.windows import calibration_windows
    from core.evaluate.language_modelling import LanguageModellingSettings, run
    from core.journal import Journal

    base = opened(catalog, source)
    windows = calibration_windows(
        base, load_documents("pydoc", split="calibration"), samples=arguments.samples,
        sample_tokens=arguments.sample_tokens, seed=0,
    )  # fmt: skip
    calibration = scratch / "calibration.json"
    calibration.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    folder = local_folder(ModelRef.parse(source), variant_folder=catalog.variant_folder)
    documents = load_documents("pydoc", split="evaluation")
    for library, offered in PEERS.items():
        for bits in (b for b in arguments.bits if b in offered and arguments.only in library):
            out = scratch / f"{library}-{bits}-{abs(hash(source))}"
            peak, words = _peer(library, bits, folder, out, calibration, arguments.peers)
            if peak is None:
                print(f"| {library} | {bits} | {words} |", flush=True)
                continue
            facts = json.loads((out / "peer.json").read_text(encoding="utf-8"))
            variant = opened(catalog, str(out))
            settings = LanguageModellingSettings(max_documents=arguments.documents)
            result = run(base, variant, documents, Journal(), lambda *_: None, settings)
            found = {m.name: m for m in result.metrics}
            kl = found["kl"]
            yield Row(
                f"{library} {facts['version']}", bits, facts["bytes"], facts["bytes"] * 8 / parameters,
                (kl.value, kl.low, kl.high), found["bits_per_byte"].value, None, facts["seconds"], peak,
            )  # fmt: skip


def _peer(
    library: str, bits: int, folder: Path, out: Path, calibration: Path, pythons: list[str]
) -> tuple[int | None, str]:
    """Peak memory of a peer's process, or why there is none."""
    words = "not installed in any environment that was named"
    module = {"quanto": "optimum.quanto", "llm_compressor": "llmcompressor"}.get(library, library)
    for python in pythons:
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            continue
        script = str(Path(__file__).with_name("peers.py"))
        command = [python, script, library, str(bits), str(folder), str(out), str(calibration)]
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(
                command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode == 0:
                return usage.ru_maxrss * 1024, ""
            said.seek(0)
            words = said.read().strip().splitlines()[-1][:150]
    return None, words


def _print(row: Row) -> None:
    kl = "–"
    if row.kl is not None:
        value, low, high = row.kl
        kl = f"{value:.4f}" + ("" if low is None else f" ({low:.4f} to {high:.4f})")
    print(
        f"| {row.name} | {row.bits:g} | {row.nbytes / 1e6:.1f} | {row.bits_per_weight:.2f} | {kl} | "
        f"{'–' if row.bits_per_byte is None else f'{row.bits_per_byte:.4f}'} | "
        f"{'–' if row.cosine is None else f'{row.cosine:.4f}'} | {row.seconds:.0f} | {row.peak_bytes / 1e6:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
