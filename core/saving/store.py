"""Writing a variant to disk: weights, config, tokenizer, recipe; whole or not at all.

Everything is written to a folder beside the wanted one and renamed at the end, after the space for it was checked.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from core.errors import CannotCompress
from core.models.checkpoint import fingerprint
from core.models.learned import FILE as LEARNED
from core.models.learned import written
from core.models.library import QUANTO_MAP, LibraryForm
from core.models.loaded import LoadedModel
from core.models.targets import targets, tied_names
from core.numerics.sizes import DTYPE_NAMES, Entry, file_bytes
from core.saving.description import quantization_config
from core.saving.fresh_load import flat
from core.saving.layout import file_entries, file_tensors
from core.saving.report import Shares
from core.whole_folder import whole_folder

WEIGHTS = "model.safetensors"
_NAMES = {stored: name for name, stored in DTYPE_NAMES.items()}
FEW = 4
"""Formats that are named in full; of more, only their kinds."""
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of tokenizer, processor and pooling files; weights in any format are never copied."""
OURS = ("config.json", "recipe.json", "slimscope.json", LEARNED, QUANTO_MAP)


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
    if loaded.library is not None:
        return file_bytes(_library_entries(loaded.library))
    return file_bytes(file_entries(loaded))


def format_name(loaded: LoadedModel) -> str:
    """What the weights are stored as: packed schemes, integer grids first, and rounded inputs; or else the dtype of most
    of the file."""
    if loaded.library is not None:
        return loaded.library.label
    schemes = {scheme for packed in loaded.packed.values() for scheme in packed.schemes}
    labels = sorted({s.label for s in schemes}, key=lambda label: (not label.startswith("int"), label))
    if not labels:
        plain: Counter[str] = Counter()
        for entry in file_entries(loaded).values():
            plain[entry.dtype] += entry.nbytes
        return _NAMES[plain.most_common(1)[0][0]]
    if len(labels) > FEW:
        labels = [f"mixed {', '.join(dict.fromkeys(label.partition(' ')[0] for label in labels))}"]
    return " + ".join([*labels, *sorted({scheme.label for scheme in loaded.activations.values()})])


def _library_entries(form: LibraryForm) -> dict[str, Entry]:
    """What a library's file will hold, from the tensors in memory; tied ones once."""
    tied = tied_names(form.model)
    return {
        name: Entry(DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in flat(form.model).items()
        if name not in tied
    }


def save_variant(
    loaded: LoadedModel,
    folder: Path,
    *,
    frame: pd.DataFrame,
    provenance: dict[str, Any],
) -> SavedFiles:
    """Write the model so that plain ``from_pretrained`` loads it; ``folder`` appears complete or not at all.

    ``frame`` is the recipe's table (``report.table``) and must account for every parameter. ``provenance`` becomes
    ``slimscope.json``, its ``recipe`` also ``recipe.json``. Raises ``CannotCompress`` when the folder exists or
    the disk has no room.
    """
    sizes = _accounted(loaded, frame)
    expected = predicted_bytes(loaded)
    with whole_folder(folder, expected, refuse=CannotCompress) as incoming:
        import safetensors.torch

        copy_companions(loaded.folder, incoming)
        if loaded.library is not None:
            loaded.library.save(incoming)
            (incoming / "config.json").chmod(0o644)
        else:
            _write_config(loaded, incoming)
            safetensors.torch.save_file(file_tensors(loaded), incoming / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes its file readable by its owner only.
        shutil.copymode(incoming / "config.json", incoming / WEIGHTS)
        if loaded.learned:
            write_json(incoming / LEARNED, written(loaded.learned))
        write_json(incoming / "recipe.json", provenance["recipe"])
        write_json(incoming / "slimscope.json", provenance)
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
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, processor, generation and sentence-pooling files, from the top folder and one level below."""
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
    write_json(folder / "config.json", values)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    fresh.replace(path)
