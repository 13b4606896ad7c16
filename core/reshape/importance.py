"""How much each neuron, head or residual dimension of every block matters, by several measures; nothing is changed.

What needs the inputs of the writing projection (``output``, ``activation``) is measured on the walk instead
(``_reconstruction``), so that each block is judged behind the cut ones before it.

Legend: ``L`` blocks, ``U`` units of a block, ``O`` outputs, ``I`` inputs, ``D`` d_model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.models.weights import input_first
from core.reshape.narrower import Part, n_units, writer
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

ABLATION_TEXTS, ABLATION_TOKENS = 8, 64
"""Windows an ablation map is made on: every head is taken out on each of them."""
_NAME = re.compile(r"^L?(\d+)(?::|H|N)(\d+)$")


def magnitudes(loaded: LoadedModel, part: Part) -> Tensor:
    """‖W_u‖² of what each unit writes with (hidden: of its embedding column), [L, U]."""
    anatomy = loaded.anatomy
    if part == "hidden":
        table_VD = loaded.model.get_submodule(anatomy.embedding).weight
        columns_D: Tensor = table_VD.float().square().sum(0).cpu()
        return columns_D.expand(anatomy.n_layers, -1)
    found = []
    for block in anatomy.blocks:
        weight_IO = input_first(loaded.model.get_submodule(writer(block, part)))
        found.append(weight_IO.float().square().sum(1).view(n_units(anatomy, part), -1).sum(1).cpu())
    return torch.stack(found)


def norm_outputs(loaded: LoadedModel, windows_BP: Tensor, progress: Progress) -> Tensor:
    """Σ over all norms inside blocks of mean |output|, per dimension (Minitron, 2407.14679), [D]."""
    anatomy = loaded.anatomy
    paths = [path for block in anatomy.blocks for path in (block.attention_norm, block.mlp_norm)]
    total_D = torch.zeros(anatomy.d_model, device=loaded.device)
    for number, ids_P in enumerate(windows_BP):
        progress(number, len(windows_BP), f"norms on window {number + 1} of {len(windows_BP)}")
        with capture(
            loaded.model, paths, reduce=lambda _, out: out.float().abs().flatten(0, -2).mean(0)
        ) as found:
            loaded.model(input_ids=ids_P[None])
        total_D += torch.stack(list(found.values())).sum(0)
    return (total_D / len(windows_BP)).cpu()


def ablated(loaded: LoadedModel, windows_BP: Tensor, seed: int, progress: Progress) -> Tensor:
    """KL that mean ablation of each head adds, as *Inspect*'s ablation scan finds it, [L, H]; nats per token."""
    from core.probes._ablation import Scored, ablate, heads

    texts = list(windows_BP[:ABLATION_TEXTS, :ABLATION_TOKENS])
    components = heads(loaded.anatomy)
    scored = [Scored(slice(None))] * len(texts)
    effects = ablate(loaded, texts, components, scored, mode="mean", seed=seed, progress=progress)
    return (
        torch.from_numpy(effects.kl_CS.mean(1)).view(loaded.anatomy.n_layers, loaded.anatomy.n_heads).float()
    )


def listed(anatomy: Anatomy, part: Part, text: str) -> dict[int, list[int]]:
    """Block → units to remove, from ``layer:unit`` or an ablation map's names (``L3H5``).

    Raises ``BadInput`` for other words, unknown units, and where layers would not lose equally many.
    """
    found: dict[int, set[int]] = {layer: set() for layer in range(anatomy.n_layers)}
    size = n_units(anatomy, part)
    for word in text.replace(",", " ").split():
        match = _NAME.match(word)
        if match is None:
            raise BadInput(f"remove has {word!r}; write layer:unit like 0:3, 1:7, or names like L0H3")
        layer, unit = int(match[1]), int(match[2])
        if layer not in found or unit >= size:
            raise BadInput(
                f"remove names {word}; there are layers 0 to {anatomy.n_layers - 1} with {part} 0 to {size - 1}"
            )
        found[layer].add(unit)
    counts = {layer: len(units) for layer, units in found.items()}
    if len(set(counts.values())) > 1 or not counts[0]:
        said = ", ".join(f"layer {layer}: {count}" for layer, count in counts.items())
        raise BadInput(
            f"remove names different numbers of {part} ({said}); plain transformers loads the same number in every layer, "
            "at least 1 of each here: name equally many"
        )
    return {layer: sorted(units) for layer, units in found.items()}


def best(scores_U: Tensor, n_kept: int, *, groups: int = 1) -> list[int]:
    """The ``n_kept`` units of highest score, equally many of each of ``groups`` neighbouring runs; ascending."""
    by_group = scores_U.view(groups, -1)
    top = by_group.argsort(dim=1, descending=True, stable=True)[:, : n_kept // groups]
    offset = torch.arange(groups)[:, None] * by_group.shape[1]
    chosen: list[int] = (top.cpu() + offset).flatten().sort().values.tolist()
    return chosen


def complement(size: int, removed: Sequence[int]) -> list[int]:
    """The units that stay."""
    gone = set(removed)
    return [unit for unit in range(size) if unit not in gone]
