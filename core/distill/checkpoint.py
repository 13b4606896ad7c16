"""A training on disk, so that it goes on where it was: one file, whole or absent, replaced when the next one is whole.

Tensors are safetensors, everything else is JSON in the header: nothing is pickled. A kill at any moment leaves the old
file or the new one, and a full disk leaves the old one. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.durable import whole_file
from core.errors import refused_by_system

if TYPE_CHECKING:
    from torch import Tensor

NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON: position in the data, the best so far, how long the curve is."""


def write_checkpoint(
    folder: Path, *, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> str:
    """Replace the folder's checkpoint by this one; the reason where it could not be written, and the old one stays.

    ``key`` is the hash of everything the training depends on: under another key it is not taken up again.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"key": key, "facts": json.dumps(facts)}
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(folder / NAME) as part:
            save_file(ready, part, metadata=header)
    except (OSError, SafetensorError) as problem:
        return refused_by_system(problem) if isinstance(problem, OSError) else str(problem)
    return ""


def has_checkpoint(folder: Path, *, key: str) -> bool:
    """Whether ``read_checkpoint`` would find one."""
    return _facts(folder, key) is not None


def read_checkpoint(folder: Path, *, key: str) -> Checkpoint | None:
    """The folder's checkpoint; None where there is none, it is damaged, or it is of another training."""
    from safetensors import safe_open

    facts = _facts(folder, key)
    if facts is None:
        return None
    with safe_open(folder / NAME, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    return Checkpoint(tensors, facts)


def _facts(folder: Path, key: str) -> dict[str, Any] | None:
    """The header of this training's checkpoint; opening the file refuses one that was cut short."""
    from safetensors import SafetensorError, safe_open

    if not (folder / NAME).exists():
        return None
    try:
        with safe_open(folder / NAME, framework="pt") as stored:
            header = stored.metadata()
    except SafetensorError:
        return None
    found: dict[str, Any] = json.loads(header["facts"])
    return found if header["key"] == key else None
