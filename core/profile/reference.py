"""What an artifact itself answers to fixed real text: opened by ``core.models.open`` in float32, once per content.

Every runtime is held against these answers before its speed is told. They are made in a process of their own, so that
the measuring one stays what it is, and kept as ``cache/reference/<key>.npz`` until newer ones push them out.

Legend: ``T`` texts, ``P`` positions read, ``S`` positions answered (the prompt's last and one per forced token), ``V``
vocabulary, classes or hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from core.cpu import physical_cores
from core.durable import whole_file
from core.lazy import torch
from core.models.checkpoint import fingerprint
from core.paths import cache_dir
from core.profile.device_lock import locked
from core.profile.fresh import ask
from core.profile.runtimes._base import PARITY_PROMPT, PARITY_STEPS
from core.types import ModelRef, Progress, content_hash

VERSION = 1
TEXTS = 16
KEPT = 12
"""Files kept; one of a small language model takes 50 MB."""
_AT_ONCE = 4
"""Texts per forward, which bounds the memory that logits take."""


@dataclass(frozen=True)
class Reference:
    """Questions and the artifact's own answers."""

    inputs: np.ndarray
    """Token ids [T, P] or pixels [T, C, H, W]; a decoder is asked its prompt, then the rest token by token."""
    answers: np.ndarray
    """Decoder: logits [T, S, V]; encoder: hidden states [T, P, V]; classifier or vision model: logits [T, V]."""
    rounds_inputs: bool
    """The artifact rounds what its layers read (W8A8), which not every runtime does."""


def reference(folder: Path, progress: Progress) -> Path:
    """The file with an artifact's own answers, made if need be. Raises ``CannotOpen``, ``OutOfMemory``."""
    key = content_hash([fingerprint(folder), VERSION, version("torch"), version("transformers")])[:32]
    file = cache_dir() / "reference" / f"{key}.npz"
    file.parent.mkdir(exist_ok=True)
    with locked(file.with_suffix(".lock"), progress, waiting="another process asks the same model"):
        if not file.exists():
            ask(
                __name__,
                {"folder": str(folder), "file": str(file)},
                progress,
                threads=physical_cores(),
                message="asking the model itself, in float32",
            )
            kept = sorted(file.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime)
            for old in kept[:-KEPT]:
                old.unlink(missing_ok=True)
    return file


def read(file: Path) -> Reference:
    """A kept file."""
    with np.load(file) as arrays:
        return Reference(arrays["inputs"], arrays["answers"], bool(arrays["rounds_inputs"]))


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the asked process does: ``{"folder", "file"}``; writes the file."""
    from core.models.open import open_model

    loaded = open_model(ModelRef(str(Path(request["folder"]).resolve())))
    inputs = _pictures(loaded) if loaded.family == "vision" else _tokens(loaded)
    parts = []
    for start in range(0, TEXTS, _AT_ONCE):
        progress(start, TEXTS, "asking the model itself, in float32")
        parts.append(_answers(loaded, inputs[start : start + _AT_ONCE]))
    with whole_file(Path(request["file"])) as part, part.open("wb") as stream:
        np.savez(stream, inputs=inputs, answers=np.concatenate(parts), rounds_inputs=bool(loaded.activations))
    return {}


def _answers(loaded: Any, inputs: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(inputs)
    with torch.inference_mode():
        if loaded.family == "vision":
            found = loaded.model(pixel_values=tensor).logits
        elif loaded.family == "decoder":
            found = loaded.model(input_ids=tensor, use_cache=False).logits[:, PARITY_PROMPT - 1 :]
        elif loaded.family == "classifier":
            found = loaded.model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits
        else:
            body = loaded.model.base_model
            found = body(input_ids=tensor, attention_mask=torch.ones_like(tensor)).last_hidden_state
    array: np.ndarray = found.float().numpy()
    return array


def _tokens(loaded: Any) -> np.ndarray:
    """Beginnings of the evaluation topics [T, P]; seeded ids for a model that has no tokenizer."""
    from core.text.documents import load_documents

    asked = PARITY_PROMPT + (PARITY_STEPS if loaded.family == "decoder" else 0)
    vocabulary, length = loaded.anatomy.vocab_size, min(asked, loaded.anatomy.context_length or asked)
    random = np.random.default_rng(0)
    rows = []
    for text in load_documents("pydoc", limit=TEXTS).texts if loaded.tokenizer is not None else ():
        ids = [i for i in loaded.tokenizer(text)["input_ids"] if i < vocabulary][:length]
        rows.append([*ids, *random.integers(0, vocabulary, length - len(ids))])
    rows += list(random.integers(0, vocabulary, (TEXTS - len(rows), length)))
    return np.asarray(rows, dtype=np.int64)


def _pictures(loaded: Any) -> np.ndarray:
    from core.models.patch_grid import image_size

    config = loaded.model.config
    shape = (TEXTS, config.num_channels, *image_size(config))
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
