"""Writing a variant to disk: weights, config, tokenizer, recipe; whole or not at all.

Everything is written to a folder beside the wanted one and renamed at the end, after the space for it was checked.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from core.compress._description import quantization_config
from core.compress._layout import file_entries, file_tensors
from core.compress._report import Shares
from core.compress._targets import targets
from core.errors import CannotCompress
from core.models.checkpoint import fingerprint
from core.models.loaded import LoadedModel
from core.numerics.sizes import file_bytes

WEIGHTS = "model.safetensors"
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of tokenizer, processor and pooling files; weights in any format are never copied."""
OURS = ("config.json", "recipe.json", "slimscope.json")
SPARE_BYTES = 16 << 20
"""Room for tokenizer and config files, asked for beside the weights."""


@dataclass(frozen=True)
class SavedFiles:
    """What was written."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    """Of the weight file."""
    predicted_bytes: int
    """By formula, before writing."""
    parameters: int
    """Tied tensors once."""
    shares: Shares
    """How much of the model before the recipe was touched."""
    format: str
    """What the weights are stored as, e.g. ``int4 g32 affine + float8_e4m3fn`` or ``bfloat16``."""
    fingerprint: str
    """Content hash of weights and config, as ``open_model`` will find it."""


def predicted_bytes(loaded: LoadedModel) -> int:
    """Bytes of the weight file that ``save_variant`` would write, header included."""
    return file_bytes(file_entries(loaded))


def format_name(loaded: LoadedModel) -> str:
    """What the weights are stored as: packed schemes, integer grids first, or else the dtype."""
    schemes = {scheme for packed in loaded.packed.values() for scheme in packed.schemes}
    labels = sorted({s.label for s in schemes}, key=lambda label: (not label.startswith("int"), label))
    return " + ".join(labels) or loaded.dtype


def save_variant(
    loaded: LoadedModel,
    folder: Path,
    *,
    frame: pd.DataFrame,
    provenance: dict[str, Any],
) -> SavedFiles:
    """Write the model so that plain ``from_pretrained`` loads it; ``folder`` appears complete or not at all.

    ``frame`` is the recipe's table (``_report.table``) and must account for every parameter. ``provenance`` becomes
    ``slimscope.json``, its ``recipe`` also ``recipe.json``. Raises ``CannotCompress`` when the folder exists or
    the disk has no room.
    """
    sizes = _accounted(loaded, frame)
    expected = predicted_bytes(loaded)
    if folder.exists():
        raise CannotCompress(f"{folder} exists already; choose a folder that does not")
    with _whole_or_nothing(folder, expected) as incoming:
        import safetensors.torch

        _copy_companions(loaded.folder, incoming)
        _write_config(loaded, incoming)
        safetensors.torch.save_file(file_tensors(loaded), incoming / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes its file readable by its owner only.
        shutil.copymode(incoming / "config.json", incoming / WEIGHTS)
        _write_json(incoming / "recipe.json", provenance["recipe"])
        _write_json(incoming / "slimscope.json", provenance)
    return SavedFiles(
        folder=folder,
        files=tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())),
        bytes=(folder / WEIGHTS).stat().st_size,
        predicted_bytes=expected,
        parameters=sizes,
        shares=Shares.of(frame),
        format=format_name(loaded),
        fingerprint=fingerprint(folder),
    )


def _accounted(loaded: LoadedModel, frame: pd.DataFrame) -> int:
    """The number of parameters, tied ones once; every one of them must be in the table, with the size it has."""
    sizes = {t.module: p.numel() for t, p in zip(targets(loaded), loaded.model.parameters(), strict=True)}
    listed = dict(zip(frame["module"], frame["parameters"].astype(int), strict=True))
    wrong = [name for name in {*sizes, *listed} if sizes.get(name, 0) != listed.get(name, 0)]
    assert not wrong, f"the recipe's table and the model disagree on the size of {sorted(wrong)[:3]}"
    return sum(sizes.values())


def add_to_provenance(folder: Path, **entries: Any) -> None:
    """Add entries to a saved variant's ``slimscope.json``, replacing the file at once."""
    path = folder / "slimscope.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})


@contextmanager
def _whole_or_nothing(folder: Path, weight_bytes: int) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < weight_bytes + SPARE_BYTES:
        raise CannotCompress(
            f"the disk of {folder.parent} has {free / 1e6:.0f} MB free but this variant needs "
            f"{(weight_bytes + SPARE_BYTES) / 1e6:.0f} MB; free some space or choose another folder"
        )
    incoming = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.incoming")
    incoming.mkdir()
    try:
        yield incoming
        for path in incoming.rglob("*"):
            if path.is_file():
                _flush(path)
        incoming.rename(folder)
    except Exception as error:
        # safetensors reports a full disk as its own error, with the number only in the text.
        if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
            raise CannotCompress(
                f"the disk of {folder.parent} became full while writing; nothing was kept. Free some space and retry"
            ) from error
        raise
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, processor, generation and sentence-pooling files, from the top folder and one level below."""
    for path in [*source.glob("*"), *source.glob("*/*")]:
        within = path.relative_to(source)
        wanted = (
            path.suffix in COPIED
            and not path.name.endswith(".index.json")
            and not within.parts[0].startswith(".")
        )
        if path.is_file() and wanted and str(within) not in OURS:
            (target / within.parent).mkdir(exist_ok=True)
            shutil.copyfile(path, target / within)


def _write_config(loaded: LoadedModel, folder: Path) -> None:
    model = loaded.model
    values = model.config.to_dict()
    values["architectures"] = [type(model).__name__]
    values["dtype"] = loaded.dtype
    values.pop("quantization_config", None)
    described = quantization_config(loaded)
    if described is not None:
        values["quantization_config"] = described
    _write_json(folder / "config.json", values)


def _write_json(path: Path, value: Any) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    fresh.replace(path)
