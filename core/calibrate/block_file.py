"""A finished block on disk: what a step made of it, so that a step that was stopped goes on behind it.

One safetensors file per block holds its parameters, packed ones as codes and scales, and what the step reported (JSON)
in the header. A file is whole or absent. It knows no step.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.durable import whole_file
from core.lazy import torch
from core.models.anatomy import Block
from core.models.loaded import LoadedModel
from core.numerics import packed as packed_forms
from core.numerics import schemes

if TYPE_CHECKING:
    from torch import Tensor


def write_block(file: Path, loaded: LoadedModel, block: Block, report: Any) -> None:
    """Write what the model now holds of ``block``; ``report`` must be JSON."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    packed = {m: p for m, p in loaded.packed.items() if m.startswith(f"{block.path}.")}
    forms = {module: _take_apart(form, f"packed:{module}", tensors) for module, form in packed.items()}
    inside = set(packed)
    for name, parameter in loaded.model.named_parameters():
        if name.startswith(f"{block.path}.") and name.removesuffix(".weight") not in inside:
            tensors[name] = parameter.detach().contiguous()
    header = {"report": json.dumps(report), "packed": json.dumps(forms)}
    with whole_file(file) as part:
        save_file(tensors, part, metadata=header)


def read_block(file: Path, loaded: LoadedModel) -> Any:
    """Give the model what ``write_block`` wrote; the report."""
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=loaded.device) as stored:
        header = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    for module, form in json.loads(header["packed"]).items():
        name = f"{module}.weight" if _has_parameter(loaded.model, f"{module}.weight") else module
        parameter = loaded.model.get_parameter(name)
        loaded.packed[module] = _put_together(form, tensors)
        parameter.data.copy_(loaded.packed[module].dequantize())
    for name, tensor in tensors.items():
        if not name.startswith("packed:"):
            loaded.model.get_parameter(name).data.copy_(tensor)
    return json.loads(header["report"])


def _has_parameter(model: Any, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    try:
        return last in model.get_submodule(owner)._parameters
    except AttributeError:
        return False


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A packed weight as JSON, its tensors put aside under ``path``."""
    if torch.is_tensor(value):
        tensors[path] = value.contiguous()
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return [_take_apart(part, f"{path}/{index}", tensors) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        parts = {name: _take_apart(part, f"{path}/{name}", tensors) for name, part in fields.items()}
        return {"class": type(value).__name__, "fields": parts}
    return value


def _put_together(form: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``_take_apart``: a list was a tuple, and a class is one of a scheme or of a packed form."""
    if isinstance(form, list):
        return tuple(_put_together(part, tensors) for part in form)
    if isinstance(form, dict) and "tensor" in form:
        return tensors[form["tensor"]]
    if isinstance(form, dict) and "dtype" in form:
        return getattr(torch, form["dtype"])
    if isinstance(form, dict):
        class_ = getattr(schemes, form["class"], None) or getattr(packed_forms, form["class"])
        return class_(**{name: _put_together(part, tensors) for name, part in form["fields"].items()})
    return form
