"""The weight matrices of a model as a number format meets them: rows of consecutive weights as they are stored.

A Conv1D keeps its [in, out] and a fused expert tensor is its experts one below the other, because blocks of weights that
share a scale run along the last axis of what is stored. Routers, norms, biases and position tables are no such matrices.

Legend: ``R`` rows, ``C`` columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.errors import BadInput
from core.lazy import torch
from core.models.sizes import Component, block_of, component_of
from core.numerics.schemes import (
    FloatScheme,
    IntegerScheme,
    MxElement,
    MxScheme,
    Nf4Scheme,
    Nvfp4Scheme,
    ScaleRule,
    Scheme,
    TernaryScheme,
)

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

COMPONENTS: tuple[Component, ...] = ("attention", "mlp", "experts", "shared_expert", "embedding", "head")


@dataclass(frozen=True, eq=False)
class Weight:
    """One stored weight."""

    name: str
    """Of its parameter, as in ``model.named_parameters()``."""
    layer: int | None
    """None outside the blocks."""
    part: str
    """Its name inside the block, e.g. ``q_proj``."""
    component: Component
    _tensor: Tensor = field(repr=False)

    @property
    def columns(self) -> int:
        """Consecutive weights of a row."""
        return int(self._tensor.shape[-1])

    @property
    def n_rows(self) -> int:
        """Rows, all experts together."""
        return self._tensor.numel() // self.columns

    @property
    def parameters(self) -> int:
        """How many weights."""
        return self._tensor.numel()

    def rows(self, most: int) -> Tensor:
        """Up to ``most`` evenly spaced rows (0: all) [R, C], float32."""
        weight_RC = self._tensor.detach().reshape(-1, self.columns)
        if 0 < most < self.n_rows:
            at = torch.linspace(0, self.n_rows - 1, most, device=weight_RC.device).long()
            weight_RC = weight_RC[at]
        return weight_RC.float()


def weights(loaded: LoadedModel) -> list[Weight]:
    """Every weight matrix, in the model's order; a tied one once."""
    found = []
    for name, parameter in loaded.model.named_parameters():
        component = component_of(loaded.anatomy, name)
        if component not in COMPONENTS or parameter.ndim not in (2, 3) or min(parameter.shape[-2:]) < 2:
            continue
        if component == "embedding" and name.rpartition(".")[0] != loaded.anatomy.embedding:
            continue
        found.append((name, component, parameter))
    parts = dict(zip([name for name, *_ in found], part_names([n for n, *_ in found], loaded), strict=True))
    return [
        Weight(name, block.index if (block := block_of(loaded.anatomy, name)) else None, parts[name], component, tensor)
        for name, component, tensor in found
    ]  # fmt: skip


def part_names(names: Sequence[str], loaded: LoadedModel) -> list[str]:
    """Short names of parameters inside their blocks: the last word of the path, more where two would be alike."""
    inside, blocks = [], []
    for name in names:
        block = block_of(loaded.anatomy, name)
        path = name.removesuffix(".weight")
        inside.append(path.removeprefix(f"{block.path}.") if block else path)
        blocks.append(block.index if block else None)
    short = [path.rpartition(".")[2] for path in inside]
    times = Counter(zip(blocks, short, strict=True))
    return [
        name if times[block, name] == 1 else path
        for block, name, path in zip(blocks, short, inside, strict=True)
    ]


def chosen_weight(loaded: LoadedModel, layer: int, part: str) -> Weight:
    """The weight of a layer (-1: the middle one) by the name of its part; without a name the last of the layer.

    ``part`` may also be the whole name of a parameter, or of a module: then its last weight, as fused experts have two.
    Raises ``BadInput`` with what there is.
    """
    found = weights(loaded)
    whole = [one for one in found if part and part in (one.name, one.name.rpartition(".")[0])]
    if whole:
        return whole[-1]
    layers = sorted({one.layer for one in found if one.layer is not None})
    at = layers[len(layers) // 2] if layer == -1 else layer
    own = [one for one in found if one.layer == at]
    if not own:
        raise BadInput(
            f"there is no layer {layer}; this model has layers {layers[0]} … {layers[-1]}, or -1 for the middle"
        )
    named = [one for one in own if part in ("", one.part)]
    if not named:
        raise BadInput(f"layer {at} has no weight {part!r}; it has {', '.join(one.part for one in own)}")
    return named[-1]


# --- formats ------------------------------------------------------------------------------------------

BLOCK_CHOICES = ("own", "16", "32", "64", "128", "256", "row")
OWN_GROUP = 32
"""Integers and ternary weights leave the group open; small models want this one."""


def schemes(block: str, rule: ScaleRule, *, affine: bool = False) -> dict[str, Scheme]:
    """Every format that weights are stored in, by its name in the catalogue, widest first.

    ``block`` is how many consecutive weights share a scale: ``own`` is each format's own, ``row`` a whole row.
    """
    size = None if block in ("own", "row") else int(block)
    group = OWN_GROUP if block == "own" else size

    def integer(bits: int) -> Scheme:
        return IntegerScheme(bits, group, symmetric=not affine)

    def mx(element: MxElement) -> Scheme:
        return MxScheme(element, rule, size or 32)

    return {
        "bfloat16": FloatScheme("bfloat16"),
        "float16": FloatScheme("float16"),
        "float8 e4m3": FloatScheme("float8_e4m3fn", "row"),
        "float8 e5m2": FloatScheme("float8_e5m2", "row"),
        "int8": integer(8),
        "MXFP8 e4m3": mx("e4m3"),
        "MXFP8 e5m2": mx("e5m2"),
        "MXFP6 e2m3": mx("e2m3"),
        "MXFP6 e3m2": mx("e3m2"),
        **{f"int{bits}": integer(bits) for bits in (6, 5, 4)},
        "MXFP4": mx("e2m1"),
        "NVFP4": Nvfp4Scheme(size or 16),
        "NF4": Nf4Scheme(False, size or 64),
        **{f"int{bits}": integer(bits) for bits in (3, 2)},
        "ternary": TernaryScheme(group),
    }  # fmt: skip


def block_of_scheme(scheme: Scheme) -> int | None:
    """Consecutive weights that share a scale and must fill a row evenly; None where nothing must."""
    match scheme:
        case IntegerScheme() | TernaryScheme():
            return scheme.group_size
        case MxScheme() | Nvfp4Scheme():
            return scheme.block
    return None
