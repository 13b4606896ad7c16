"""Every parameter of a model with its place and part, so that a compression can say what it did with each.

A tied tensor is listed once, under the name it is stored by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from core.lazy import torch, transformers
from core.models.anatomy import Anatomy, Block
from core.models.loaded import LoadedModel

Component = Literal["embedding", "attention", "mlp", "experts", "router", "norm", "head", "other"]
Layout = Literal["linear", "conv1d", "experts", "embedding", "none"]
"""How a parameter is multiplied: what decides whether and how it can be put on a grid."""
KEPT: dict[Component, str] = {
    "router": "a router decides which expert runs: small and sensitive, kept",
    "norm": "a norm's vector: negligible size, kept",
    "embedding": "a position or type embedding: small, kept",
}


@dataclass(frozen=True)
class Target:
    """One parameter: its name, where it is, and what it is to a compressor."""

    name: str
    """As in ``model.named_parameters()``."""
    layer: int | None
    component: Component
    layout: Layout

    @property
    def module(self) -> str:
        """The parameter's name without ``.weight``: the key of ``LoadedModel.packed``."""
        return self.name.removesuffix(".weight")

    @property
    def reason(self) -> str:
        """Why it is left as it is, for one that no grid applies to."""
        if self.component in KEPT:
            return KEPT[self.component]
        return "a bias: negligible size, kept" if self.name.endswith("bias") else "not a matrix product, kept"


def targets(loaded: LoadedModel) -> list[Target]:
    """Every parameter of the model, tied ones once, in the model's own order."""
    return [_target(loaded, name, parameter) for name, parameter in loaded.model.named_parameters()]


def tied_names(model: Any) -> dict[str, str]:
    """Parameter that shares another's tensor → the one it is stored as."""
    return dict(model.all_tied_weights_keys)


def _target(loaded: LoadedModel, name: str, parameter: Any) -> Target:
    anatomy = loaded.anatomy
    block = next((b for b in anatomy.blocks if name.startswith(f"{b.path}.")), None)
    owner = name.rpartition(".")[0]
    layout = _layout(loaded.model.get_submodule(owner), name, parameter, block)
    return Target(name, block.index if block else None, _component(anatomy, block, owner, parameter), layout)


def _layout(module: Any, name: str, parameter: Any, block: Block | None) -> Layout:
    if block is not None and block.router is not None and _inside(name, block.router):
        return "none"
    if block is not None and block.experts is not None and _inside(name, block.experts):
        return "experts" if parameter.ndim == 3 else "none"
    if parameter.ndim != 2 or not name.endswith(".weight"):
        return "none"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, transformers.Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "none"


def _component(anatomy: Anatomy, block: Block | None, owner: str, parameter: Any) -> Component:
    if block is None:
        if _inside(owner, anatomy.embedding) or "embed" in owner:
            return "embedding"
        if anatomy.unembedding is not None and _inside(owner, anatomy.unembedding):
            return "head"
        return "norm" if parameter.ndim == 1 and "norm" in owner.lower() else "other"
    if block.router is not None and _inside(owner, block.router):
        return "router"
    if block.experts is not None and _inside(owner, block.experts):
        return "experts"
    if _inside(owner, block.attention) or owner in (block.q, block.k, block.v, block.o):
        return "attention"
    return "norm" if parameter.ndim == 1 and owner in (block.attention_norm, block.mlp_norm) else "mlp"


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")
