"""The shapes of artifacts from their files alone, without reading a weight; counted once per artifact and kept.

The model is built without memory (torch's meta device) in a fresh process, so that a page that asks needs no torch; what
it says is kept under the fingerprint of the files, and so outlives a base that was moved away.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.durable import whole_file
from core.errors import CannotOpen
from core.lazy import torch, transformers
from core.models.checkpoint import fingerprint
from core.paths import cache_dir
from core.predict.model import Layer, Shape, of_anatomy
from core.profile.fresh import ask
from core.types import Progress, silent

VERSION = 1
"""Raised when a shape is counted otherwise, so that kept ones are not taken."""


def shapes_of(folders: Mapping[str, Path], progress: Progress = silent) -> dict[str, Shape]:
    """The shape of each artifact, by its fingerprint; ``folders`` says where the files of each are.

    One that cannot be built (remote code, an unknown architecture) is left out. Raises ``WorkerDied``.
    """
    found = {mark: shape for mark in folders if (shape := known_shape(mark)) is not None}
    missing = {mark: str(folder) for mark, folder in folders.items() if mark not in found}
    if missing:
        request = {"folders": list(missing.values())}
        said = ask(__name__, request, progress, threads=1, message="counting what a step has to read")
        for mark, fields in zip(missing, said, strict=True):
            if fields is not None:
                with whole_file(_file(mark)) as part:
                    part.write_text(json.dumps(fields))
                found[mark] = _shape(fields)
    return found


def shape_of(folder: Path, progress: Progress = silent) -> Shape:
    """The shape of one artifact. Raises ``CannotOpen`` where it cannot be built, ``WorkerDied``."""
    mark = fingerprint(folder)
    found = shapes_of({mark: folder}, progress)
    if mark not in found:
        raise CannotOpen(
            f"{folder} names an architecture that transformers cannot build; open it with `slimscope open`"
        )
    return found[mark]


def known_shape(mark: str) -> Shape | None:
    """The kept shape of the artifact with this fingerprint; None if it was never counted."""
    file = _file(mark)
    return _shape(json.loads(file.read_text())) if file.is_file() else None


def answer(request: Mapping[str, Any], progress: Progress) -> list[dict[str, Any] | None]:
    """``{"folders"}`` to each one's shape as JSON; None for one that cannot be built."""
    folders: Sequence[str] = request["folders"]
    found: list[dict[str, Any] | None] = []
    for done, folder in enumerate(folders):
        progress(done, len(folders), f"counting {Path(folder).name}")
        try:
            found.append(asdict(skeleton_shape(Path(folder))))
        except (CannotOpen, OSError, ValueError, AttributeError):
            found.append(None)
    return found


def skeleton_shape(folder: Path) -> Shape:
    """The shape of the artifact in a folder, counted in this process on a model that holds no weights."""
    from core.models.anatomy_find import find_anatomy
    from core.models.sizes import component_of

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise CannotOpen(f"transformers {transformers.__version__} has no architecture {name!r}")
    with torch.device("meta"):
        model: Any = getattr(transformers, name)(config)
    anatomy = find_anatomy(model)
    counts: Counter[str] = Counter()
    for parameter, tensor in model.named_parameters():
        counts[component_of(anatomy, parameter)] += tensor.numel()
    return of_anatomy(folder.name, anatomy, {key: float(n) for key, n in counts.items()}, folder)


def _file(mark: str) -> Path:
    folder = cache_dir() / "shapes"
    folder.mkdir(exist_ok=True)
    return folder / f"{VERSION}-{mark[:32]}.json"


def _shape(fields: Mapping[str, Any]) -> Shape:
    layers = tuple(
        Layer(**{**layer, "chosen": tuple(layer["chosen"]) if layer["chosen"] else None})
        for layer in fields["layers"]
    )
    return Shape(**{**fields, "layers": layers})
