"""Graph runtimes as the tests open them, and what torch answers in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.catalog.store import Catalog
from core.loop import make_variant
from core.models.open import open_model
from core.profile.built import FACTS
from core.recipe import Recipe
from core.registry import get
from core.types import ModelRef, silent
from tests.tiny import tiny_folder


def opened(module: Any, folder: Path, home: Path, **settings: Any) -> Any:
    """A runtime built as the building process does it, once per settings that change its files, then loaded."""
    parsed = get("profile", module.__name__.rsplit(".", 1)[-1]).settings.model_validate(
        {"threads": 1, **settings}
    )
    made_from = [getattr(parsed, name) for name in module.BUILT_FROM]
    files = home / "-".join(["files", *map(str, made_from)])
    if not files.exists():
        files.mkdir(parents=True)
        (files / FACTS).write_text(json.dumps(module.build(folder, files, silent, parsed)))
    runtime = module.create(parsed, files)
    runtime.prepare(folder)
    runtime.load()
    return runtime


def expected(folder: Path, tokens_BP: np.ndarray) -> np.ndarray:
    """The model's own logits of the last position, in float32."""
    model = open_model(ModelRef(str(folder), dtype="float32")).model
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(tokens_BP)).logits[:, -1].numpy()
    return logits


def rounded_variant(home: Path, *, bits: int, scheme: str) -> Path:
    """The folder of a proven variant of a tiny Llama, its weights on an integer grid."""
    folder = tiny_folder("llama", home / "model")
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    recipe = Recipe.parse({"steps": [{"method": "rtn", "settings": {"bits": bits, "scheme": scheme}}]})
    return catalog.variant_folder(make_variant(catalog, str(folder), recipe).variant.id)
