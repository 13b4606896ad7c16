"""Every parameter of a model with its place and part, so that a compression can say what it did with each.

A tied tensor is listed once, under the name it is stored by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from core.lazy import torch, transformers
from core.models.loaded import LoadedModel
from core.models.sizes import Component, block_of, component_of

Layout = Literal["linear", "conv1d", "experts", "embedding", "none"]
"""How a parameter is multiplied: what decides whether and how it can be put on a grid."""
KEPT: dict[Component, str] = {
    "router": "a router decides which expert runs: small and sensitive, kept",
    "norm": "a norm's vector: negligible size, kept",
    "embedding": "an embedding other than the token table: small, kept",
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
    def projection(self) -> str:
        """What it is called within its block, e.g. ``self_attn.q_proj``."""
        return projection_of(self.module)

    @property
    def reason(self) -> str:
        """Why it is left as it is, for one that no grid applies to."""
        if self.component in KEPT:
            return KEPT[self.component]
        if self.name.endswith("bias"):
            return "a bias: negligible size, kept"
        return (
            "a part of what answers: small, kept"
            if self.component == "head"
            else "not a matrix product, kept"
        )


def projection_of(module: str) -> str:
    """The last two parts of a module's path, layer numbers left out."""
    return ".".join(part for part in module.split(".")[-2:] if not part.isdigit())


def targets(loaded: LoadedModel) -> list[Target]:
    """Every parameter of the model, tied ones once, in the model's own order."""
    return [_target(loaded, name, parameter) for name, parameter in loaded.model.named_parameters()]


def tied_names(model: Any) -> dict[str, str]:
    """Parameter that shares another's tensor → the one it is stored as."""
    return dict(model.all_tied_weights_keys)


def _target(loaded: LoadedModel, name: str, parameter: Any) -> Target:
    block = block_of(loaded.anatomy, name)
    component = component_of(loaded.anatomy, name)
    if any(
        path and name.startswith(f"{path}.") for path in (loaded.anatomy.classifier, loaded.anatomy.pooler)
    ):
        return Target(name, None, component, "none")
    layout = _layout(loaded.model.get_submodule(name.rpartition(".")[0]), name, parameter, component)
    return Target(name, block.index if block else None, component, layout)


def _layout(module: Any, name: str, parameter: Any, component: Component) -> Layout:
    if component == "router":
        return "none"
    if component == "experts":
        return "experts" if parameter.ndim == 3 else "none"
    if parameter.ndim != 2 or not name.endswith(".weight"):
        return "none"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, transformers.Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "none"
