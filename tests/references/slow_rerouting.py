"""Rerouting by the slow, obvious way: edited configs, zeroed weights, and arguments changed by a hook of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import tiny_folder

Edit = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(block, chosen experts [T, K], routing weights [T, K]) → what the experts get instead."""


def with_top_k(family: str, top_k: int, folder: Path) -> LoadedModel:
    """The tiny model opened from a config that says another number of experts per token."""
    tiny_folder(family, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_experts_per_tok"] = top_k
    path.write_text(json.dumps(config))
    return open_model(ModelRef(str(folder)))


def silence(loaded: LoadedModel, layer: int, expert: int) -> Callable[[], None]:
    """Zero the last matrix (and bias) of an expert; returns what undoes it."""
    experts = loaded.model.get_submodule(loaded.anatomy.blocks[layer].experts)
    undo = []
    for name in ("down_proj", "down_proj_bias"):
        if hasattr(experts, name):
            part = getattr(experts, name).data[expert]
            undo.append((part, part.clone()))
            part.zero_()
    assert undo, "no weight to zero"
    return lambda: [part.copy_(was) for part, was in undo] and None


def logits(loaded: LoadedModel, ids: list[int], edit: Edit | None = None) -> torch.Tensor:
    """Logits [T, V] of a whole pass; ``edit`` changes what every experts module is given."""
    with ExitStack() as hooks, torch.inference_mode():
        for block in loaded.anatomy.blocks:
            if edit is None or block.experts is None:
                continue

            def change(module: Any, args: Any, kwargs: Any, at: int = block.index) -> Any:
                hidden, experts, weights = (*args, *kwargs.values())
                return (hidden, *edit(at, experts, weights)), {}

            module = loaded.model.get_submodule(block.experts)
            hooks.callback(module.register_forward_pre_hook(change, with_kwargs=True).remove)
        return loaded.model(torch.tensor([ids]), use_cache=False).logits[0].float()


def nats(loaded: LoadedModel, ids: list[int], edit: Edit | None = None) -> torch.Tensor:
    """Surprisal of each token but the first, [T − 1]."""
    return torch.nn.functional.cross_entropy(
        logits(loaded, ids, edit)[:-1], torch.tensor(ids[1:]), reduction="none"
    )


def decisions(loaded: LoadedModel, ids: list[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Block → what its experts module was given."""
    found = {}

    def keep(at: int, experts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found[at] = experts.clone(), weights.clone()
        return experts, weights

    logits(loaded, ids, keep)
    return found


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p ‖ q) of two rows of logits, nats."""
    p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p_log.exp() * (p_log - q_log)).sum())
