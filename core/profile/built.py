"""A runtime's own files, made once of an artifact and kept: ``cache/runtimes/<key>/``.

The key is everything the files depend on: the artifact's content, the runtime, the settings that change the files,
and the versions of the libraries that write them. They are made in a fresh process, appear whole or not at all, and
are refused beforehand where the disk is too small; a second process that wants the same waits for the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from core.cpu import physical_cores
from core.errors import CannotMeasure
from core.libraries import needed
from core.models.checkpoint import fingerprint, stored_tensors, weight_files
from core.paths import cache_dir
from core.profile.device_lock import locked
from core.profile.fresh import ask
from core.profile.runtimes._base import ProfileSettings
from core.profile.runtimes._loading import module_of, settings_of
from core.types import Progress, content_hash
from core.whole_folder import whole_folder

FACTS = "built.json"
"""What ``build`` returned, beside the files."""
WIDEST = 2.5
"""Bytes on disk while building, as a multiple of the model in float32: a traced graph and the one made from it."""
_PACKED = {"I32": 8, "U8": 2, "I8": 1}
"""Most weights that one stored integer holds (4-bit codes); anything else holds one number."""


def built(folder: Path, runtime: str, settings: ProfileSettings, progress: Progress) -> Path:
    """The files that a runtime opens: made of the artifact in ``folder`` if need be, or ``folder`` where it builds none.

    Raises ``MissingLibrary``, ``CannotMeasure`` (it does not run here, the disk is too small, the runtime cannot take
    this model), ``OutOfMemory``, ``WorkerDied``, and what ``progress`` raises.
    """
    module = module_of(runtime)
    versions = needed(*module.LIBRARIES, by=f"the runtime {runtime}")
    if reason := getattr(module, "unavailable", str)():
        raise CannotMeasure(reason)
    if not hasattr(module, "build"):
        return folder
    asked = settings.model_dump(mode="json")
    key = content_hash(
        {
            "artifact": fingerprint(folder),
            "runtime": runtime,
            "version": getattr(module, "BUILD_VERSION", 1),
            "settings": {name: asked[name] for name in module.BUILT_FROM},
            "libraries": versions,
        }
    )[:32]
    kept = cache_dir() / "runtimes" / key
    kept.parent.mkdir(exist_ok=True)
    with locked(kept.with_name(f"{key}.lock"), progress, waiting=f"another process builds {runtime}'s files"):
        if not kept.exists():
            with whole_folder(kept, _most_bytes(folder), refuse=CannotMeasure) as incoming:
                facts = ask(
                    "core.profile.built",
                    {"runtime": runtime, "folder": str(folder), "target": str(incoming), "settings": asked},
                    progress,
                    threads=physical_cores(),
                    message=f"building {runtime}'s files",
                )
                (incoming / FACTS).write_text(json.dumps(facts))
    return kept


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the building process does: ``{"runtime", "folder", "target", "settings"}`` to the builder's facts."""
    settings = settings_of(request["runtime"], request["settings"])
    build = module_of(request["runtime"]).build
    return dict(build(Path(request["folder"]), Path(request["target"]), progress, settings))


def facts_of(files: Path) -> Mapping[str, Any]:
    """What was said of built files; empty for an artifact's own folder."""
    facts: dict[str, Any] = json.loads((files / FACTS).read_text()) if (files / FACTS).is_file() else {}
    return facts


def _most_bytes(folder: Path) -> int:
    """Disk that building may take, from the sizes in the weight files' headers."""
    tensors = stored_tensors(weight_files(folder)).values()
    numbers = sum(prod(tensor.shape) * _PACKED.get(tensor.dtype, 1) for tensor in tensors)
    return int(WIDEST * 4 * numbers)
