"""Making variants of tiny models: each test changes its own copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.saving.description import settle
from core.saving.store import SavedFiles, save_variant
from core.types import ModelRef, Result, silent
from tests import tiny
from tests.tiny import tiny_folder


def own_model(family: str, folder: Path) -> LoadedModel:
    """A tiny model that the test may change."""
    return open_model(ModelRef(str(tiny_folder(family, folder / "base"))))


def apply(loaded: LoadedModel, method: str, **settings: Any) -> Result:
    """Run one compression in memory."""
    chosen = get("compress", method)
    result: Result = chosen.run(loaded, None, silent, chosen.parse(settings))
    return result


def save(loaded: LoadedModel, result: Result, folder: Path) -> SavedFiles:
    """Write what ``apply`` made."""
    settle(loaded)
    return save_variant(loaded, folder, frame=result.frame, provenance={"recipe": {}})


def grouped_model(folder: Path) -> LoadedModel:
    """DeepSeek-V3 with 4 groups of 4 experts, of which a token takes 2 groups: enough for each to lose one."""
    tiny.tiny_folder("deepseek_v3", folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.n_routed_experts = 16
    torch.manual_seed(3)
    model = transformers.DeepseekV3ForCausalLM(config)
    tiny._redraw(model, 3)
    model.save_pretrained(folder)
    return open_model(ModelRef(str(folder)))
