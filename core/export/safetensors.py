"""Safetensors: a Hugging Face folder, dense in one dtype, or exactly as the catalog has it."""

from __future__ import annotations

import shutil
import time
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from core.errors import CannotExport
from core.export._companions import write_companions
from core.export._parity import as_runtime, compare
from core.export._report import exported
from core.lazy import torch, transformers
from core.models.checkpoint import INDEX, stored_tensors, weight_files
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.quiet import quiet
from core.models.sizes import component_of
from core.registry import Settings, method
from core.saving.layout import file_tensors
from core.saving.proof import auto_class
from core.saving.store import OURS, WEIGHTS, copy_companions
from core.types import ModelRef, Progress, Result


class SafetensorsSettings(Settings):
    """What the tensors are written as."""

    weights: Literal["stored", "float32", "bfloat16", "float16"] = Field(
        default="stored",
        description="stored: the files as they are, quantized ones too (compressed-tensors); otherwise dense weights in "
        "this dtype, which anything that reads safetensors can load",
    )


@method("export", title="Safetensors")
def run(loaded: LoadedModel, folder: Path, progress: Progress, settings: SafetensorsSettings) -> Result:
    """Write a Hugging Face folder: the catalog's own files, or dense weights that need no library to read.

    ``stored`` copies the files, each byte for byte. A dtype writes every weight as the dense number it stands for,
    rounded to that dtype; plain transformers then loads the folder, and every parameter must come back bit for bit.
    """
    started = time.monotonic()
    if settings.weights == "stored":
        _copy(loaded.folder, folder)
        progress(0.6, 1.0, "opening the copy")
        model = open_model(ModelRef(str(folder), dtype=loaded.ref.dtype)).model
        by = "Slimscope's opener, in the dtype it was opened in"
    else:
        _write_dense(loaded, folder, settings.weights)
        progress(0.6, 1.0, "reloading with plain transformers")
        model = _reloaded(loaded, folder, settings.weights)
        by = f"transformers {transformers.__version__}, {settings.weights} weights multiplied in float32"
    parity = compare(loaded, as_runtime(model))
    parity.refuse_if_broken("the written folder", exact=settings.weights in ("stored", "float32"))
    files = weight_files(folder)
    rows = [
        {
            "component": component_of(loaded.anatomy, name),
            "format": tensor.dtype,
            "parameters": prod(tensor.shape),
            "bytes": tensor.nbytes,
            "noise": None,
            "signal": None,
        }
        for name, tensor in stored_tensors(files).items()
    ]
    return exported(
        loaded, "safetensors", settings, rows, folder, parity, started=started,
        format_=f"safetensors {settings.weights}", runtime=by, files=[path.name for path in files],
    )  # fmt: skip


def _copy(source: Path, folder: Path) -> None:
    copy_companions(source, folder)
    beside = [source / name for name in (*OURS, INDEX) if (source / name).is_file()]
    for path in (*weight_files(source), *beside):
        shutil.copyfile(path, folder / path.name)


def _write_dense(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    import safetensors.torch

    if loaded.activations:
        raise CannotExport(
            "this variant rounds what its layers read (W8A8), which dense weights alone would not; export weights=stored"
        )
    assert not loaded.packed, "an opened model is dense"
    wanted = getattr(torch, dtype)
    limit = torch.finfo(wanted).max
    tensors = {}
    for name, tensor in file_tensors(loaded).items():
        if tensor.is_floating_point() and float(tensor.abs().max()) > limit:
            raise CannotExport(
                f"{dtype} ends at {limit:.0f} but {name} holds more; export bfloat16 or float32"
            )
        tensors[name] = tensor.to(wanted) if tensor.is_floating_point() else tensor
    write_companions(loaded, folder, dtype)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / WEIGHTS)


def _reloaded(loaded: LoadedModel, folder: Path, dtype: str) -> Any:
    """The folder in plain transformers, widened to float32; every parameter must be the one written."""
    with quiet():
        model = getattr(transformers, auto_class(loaded)).from_pretrained(folder, local_files_only=True)
    found = dict(model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        if name not in found or not torch.equal(found[name], parameter.to(getattr(torch, dtype))):
            raise CannotExport(
                f"{name} does not come back as it was written; nothing was kept. Export weights=stored"
            )
    return model.eval().float()
