"""What goes with an exported model, so that whoever gets it knows what it is: recipe, proof, measurements, a model
card written from the catalog, checksums; and all of it as one file.

A figure is written with its unit, n and interval, and the conditions it was taken under. Nothing is judged here.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.output import plain
from core.types import Result, Run, Variant

if TYPE_CHECKING:
    from core.catalog.store import Catalog

CHECKSUMS = "SHA256SUMS"
CHUNK_BYTES = 1 << 22
SHOWN = ("environment", "method", "settings", "dtype", "device")
"""Conditions that the card spells out; ``measurements.json`` has every one."""


def describe(catalog: Catalog, variant: Variant, made: Result, folder: Path) -> None:
    """Write recipe, proof, measurements, export report and README.md beside the model's files, checksums last."""
    runs = [
        run for run in catalog.runs(variant.id) if run.kind in ("compress", "proof", "evaluate", "profile")
    ]
    if variant.recipe is not None:
        _write(folder / "recipe.json", json.loads(variant.recipe))
    proofs = [run for run in runs if run.kind == "proof"]
    if proofs:
        _write(folder / "proof.json", _run(proofs[0]))
    rows = _measurements(runs)
    _write(folder / "measurements.json", [_run(run) for run in runs])
    rows.to_csv(folder / "measurements.csv", index=False)
    _write(folder / "export.json", {
        "metrics": plain(made.metrics), "bytes": plain(made.frames["main"]), "parity": plain(made.frames["parity"]),
        "conditions": plain(made.provenance.conditions), "settings": plain(made.provenance.settings),
        "notes": list(made.notes),
    })  # fmt: skip
    card = model_card(catalog, variant, made, rows, proofs[0] if proofs else None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """SHA-256 of every file, in the form that ``sha256sum --check`` reads."""
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS
    )
    lines = [f"{_sha256(folder / name)}  {name}" for name in names]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def pack(folder: Path, file: Path) -> None:
    """The folder as one ZIP file, stored as it is (weights do not shrink), equal bytes for equal content."""
    with zipfile.ZipFile(file, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            entry = zipfile.ZipInfo(f"{file.stem}/{path.relative_to(folder).as_posix()}")
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # so that a file over 4 GB gets its long header
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)


def model_card(
    catalog: Catalog, variant: Variant, made: Result, rows: pd.DataFrame, proof: Run | None
) -> str:
    """README.md: what it is, what it was made from, how it compares, how it was checked."""
    base = catalog.variant(variant.base_id)
    named = {metric.name: metric for metric in made.metrics}
    facts = made.provenance.conditions
    parts = [
        f"# {variant.name}, {facts['format']}",
        (f"{variant.architecture}, {variant.parameters:,} parameters, made from `{Path(base.source).name}` "
        f"(fingerprint `{base.fingerprint[:16]}`). {_size(named['exported_bytes'].value)} of weights, "
        f"{named['bits_per_weight'].value:.2f} bits per weight. Written by Slimscope."),
        "## Recipe\n\n" + (f"```json\n{json.dumps(json.loads(variant.recipe), indent=2)}\n```" if variant.recipe else
                           "None: the base as it came."),
        "## This export\n\n" + f"Checked in {facts['runtime']} against the model reloaded from the catalog, on "
        "fixed inputs at two lengths.\n\n" + _table(made.frames["parity"]) + "\n\n### Bytes\n\n"
        + _table(made.frames["main"]) + "".join(f"\n\n{note}" for note in made.notes),
        "## Reload proof\n\n" + _proof(variant, proof),
        "## Measurements\n\n" + _measured(rows),
        (f"## Files\n\n`sha256sum --check {CHECKSUMS}` finds whether they are whole. `measurements.json` has every "
        "measurement with all its conditions."),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _proof(variant: Variant, proof: Run | None) -> str:
    if variant.recipe is None:
        return "A base is not rewritten, so there is nothing to prove."
    if proof is None:
        return "None is recorded: treat this variant as unproven."
    gap = next((m.value for m in proof.measurements if m.name == "max_logit_difference"), None)
    verdict = "passed" if proof.conditions.get("passed") else f"failed: {proof.conditions.get('failure')}"
    return (
        f"The catalog's files, loaded in a fresh process by `{proof.conditions.get('loader')}`: {verdict}; "
        f"largest output difference {gap}."
    )


def _measurements(runs: list[Run]) -> pd.DataFrame:
    """One row per number, newest run first."""
    return pd.DataFrame(
        [
            {
                "run": run.id, "kind": run.kind, "status": run.status, "measured": run.ended_at.isoformat(),
                "name": m.name, "value": m.value, "unit": m.unit, "n": m.n, "low": m.low, "high": m.high,
                "interval": m.interval,
                "conditions": json.dumps(plain({**run.conditions, **m.conditions}), sort_keys=True),
            }
            for run in runs
            for m in run.measurements
        ],
        columns=["run", "kind", "status", "measured", "name", "value", "unit", "n", "low", "high", "interval", "conditions"],
    )  # fmt: skip


def _measured(rows: pd.DataFrame) -> str:
    measured = rows[rows["kind"].isin(("evaluate", "profile"))]
    if measured.empty:
        return "None yet."
    shown = measured.drop_duplicates(["kind", "name"]).copy()
    shown["95 % interval"] = [
        "" if pd.isna(low) else f"{low:.4g} to {high:.4g}"
        for low, high in zip(shown["low"], shown["high"], strict=True)
    ]
    shown["under"] = [_conditions(text) for text in shown["conditions"]]
    text = "Of the catalog's files, not of this export; the newest run of each.\n\n"
    return text + _table(
        shown[["name", "value", "unit", "n", "95 % interval", "interval", "status", "under"]]
    )


def _conditions(text: str) -> str:
    found = json.loads(text)
    return ", ".join(
        f"{name} {found[name]}" for name in SHOWN if found.get(name) and not isinstance(found[name], dict)
    )


def _table(frame: pd.DataFrame) -> str:
    """Markdown; a cell's bar would end it."""
    head = [str(name) for name in frame.columns]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in frame.itertuples(index=False):
        lines.append(f"| {' | '.join(_cell(value) for value in row)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _run(run: Run) -> Any:
    return {k: v for k, v in plain(run).items() if k not in ("job_id",)}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
