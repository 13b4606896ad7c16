"""Quantizing by another library, as its documents say, with our bookkeeping around it.

The model in memory is written to a scratch folder, loaded from there by the library with its quantization, and kept as
it is (``LibraryForm``); a second such load is read back as dense weights, which become the model's own. So what is
evaluated is what the opener finds in the saved files, and what is saved has never run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch, transformers
from core.models.library import LibraryForm
from core.models.loaded import LoadedModel
from core.models.quantized import densify
from core.models.quiet import quiet
from core.models.targets import targets
from core.registry import Settings
from core.saving.fresh_load import flat
from core.saving.proof import auto_class
from core.saving.report import VIEWS, Error, headline, row, table, untouched_note
from core.types import Progress, Provenance, Result

if TYPE_CHECKING:
    from torch import Tensor

Quantize = Callable[[Path, str], LibraryForm]
"""From a folder of dense weights and an auto class to the library's model."""
DROPPED = ("input_scale", "output_scale")
"""What quanto keeps beside a weight for activations, which are not quantized here."""


def quantized_by(
    loaded: LoadedModel,
    quantize: Quantize,
    progress: Progress,
    settings: Settings,
    *,
    method: str,
    bits: float,
) -> Result:
    """Quantize ``loaded`` by a library; its report, and ``loaded.library`` for whoever saves it."""
    started = time.monotonic()
    _refuse(loaded, method)
    before = {name: p.data.clone() for name, p in loaded.model.named_parameters()}
    with torch.inference_mode(False), torch.no_grad(), quiet(), tempfile.TemporaryDirectory() as scratch:
        loaded.model.save_pretrained(scratch)
        progress(0.2, 1.0, f"quantizing with {method}")
        form = quantize(Path(scratch), auto_class(loaded))
        progress(0.6, 1.0, "reading the weights back")
        again = quantize(Path(scratch), auto_class(loaded))
        dense, _ = densify(again.model, again.library)
    sizes = stored_bytes(form, before)
    after = dict(dense.named_parameters())
    if set(after) != set(before):
        odd = min({*after} ^ {*before})
        raise CannotCompress(
            f"{form.library} gives back other parameters than the model has, first {odd}; use rtn instead"
        )
    rows = []
    for target in targets(loaded):
        parameter = loaded.model.get_parameter(target.name)
        new = after[target.name].data.to(parameter.dtype)
        touched = not torch.equal(new, parameter.data)
        parameter.data = new
        packed = target.name in sizes
        rows.append(
            row(
                target, parameter, format_=form.label if packed else loaded.dtype,
                bits=bits if packed else 8 * new.element_size(), group_size="library" if packed else "none",
                bytes_before=before[target.name].nbytes, bytes_after=sizes.get(target.name, new.nbytes),
                error=Error.between(before[target.name], new), touched=touched, reason="" if touched else target.reason,
            )
        )  # fmt: skip
    loaded.library = form
    frame = table(rows)
    return Result(
        {"main": frame},
        VIEWS,
        headline(frame),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            conditions={"library": form.library, "library_version": form.version}, seconds=time.monotonic() - started,
        ),
        (f"Quantized by {form.library} {form.version}.", untouched_note(frame)),
    )  # fmt: skip


def stored_bytes(form: LibraryForm, before: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each quantized weight with everything beside it, by parameter name."""
    sizes: dict[str, int] = {}
    for name, tensor in flat(form.model).items():
        module = next((n for n in _owners(name) if f"{n}.weight" in before), None)
        part = name.removeprefix(f"{module}.")
        if module is None or (
            name in before and tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
        ):
            continue
        if part not in DROPPED:
            sizes[f"{module}.weight"] = sizes.get(f"{module}.weight", 0) + tensor.nbytes
    return sizes


def _owners(name: str) -> list[str]:
    """The module paths a stored tensor's name may begin with, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _refuse(loaded: LoadedModel, method: str) -> None:
    if loaded.packed or loaded.activations:
        raise CannotCompress(
            "this model was quantized by an earlier step; keep one quantizing step in the recipe"
        )
    if loaded.anatomy.n_experts:
        raise CannotCompress(
            f"{loaded.anatomy.architecture} keeps its experts in fused tensors, which this library would silently leave "
            f"as they are; {method} is refused: use rtn or expert_bits"
        )
    if not any(target.layout == "linear" for target in targets(loaded)):
        raise CannotCompress(
            f"{loaded.anatomy.architecture} has no torch.nn.Linear that {method} could quantize (Conv1D is not one); use rtn"
        )


def by_transformers(folder: Path, auto: str, config: Any, **named: str) -> LibraryForm:
    """Load a dense folder with a quantization config of transformers: how bitsandbytes and torchao are used."""
    model = getattr(transformers, auto).from_pretrained(
        folder, dtype="auto", quantization_config=config, device_map="cpu", local_files_only=True
    )
    return LibraryForm(model=model.eval(), wrapped=model, loader=auto, **named)
