"""Bytes of a variant before it is made, counted from a model card. Plain functions; draws and opens nothing.

How weights are stored is read from a step's settings by what they are called (``bits``, ``group_size``, ``scheme``,
``embedding_bits``, ``dtype``); what a change of structure leaves is said by its method. Anything else is not predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import SlimscopeError
from core.recipe import Recipe
from core.registry import get

if TYPE_CHECKING:
    from core.models.sizes import ModelCard

MATRICES = ("attention", "mlp", "experts", "shared_expert")
TABLES = ("embedding", "head")
SCALE_BITS = 16
WIDTH = {"float32": 32, "bfloat16": 16, "float16": 16}


def predicted_bytes(card: ModelCard, recipe: Recipe) -> float | None:
    """Bytes of the weight files, file headers aside; None when a step does not say how it stores weights."""
    sizes = card.components.groupby("component")["parameters"].sum().astype(float)
    width = WIDTH.get(card.dtype, 32)
    bits = {"matrices": float(width), "tables": float(width), "rest": float(width)}
    for step in recipe.steps:
        chosen = get("compress", step.method)
        if chosen.left is not None:
            try:
                left = chosen.left(card.anatomy, step.parsed())
            except SlimscopeError:
                return None  # the step will be refused, with the reason
            sizes *= [float(left.get(str(component), 1.0)) for component in sizes.index]
        elif "dtype" in step.settings:
            bits = dict.fromkeys(bits, float(WIDTH[step.settings["dtype"]]))
        elif "bits" in step.settings:
            grid = _bits_per_value(step.settings, card.anatomy.d_model)
            table = step.settings.get("embedding_bits", step.settings["bits"])
            same = table == step.settings["bits"]
            bits |= {"matrices": grid, "tables": grid if same else float(table)}
        else:
            return None
    matrices = float(sizes[sizes.index.isin(MATRICES)].sum())
    tables = float(sizes[sizes.index.isin(TABLES)].sum())
    rest = float(sizes.sum()) - matrices - tables
    return (matrices * bits["matrices"] + tables * bits["tables"] + rest * bits["rest"]) / 8


def _bits_per_value(settings: dict[str, Any], columns: int) -> float:
    """Code, and its share of the scale and of the zero point; a channel is taken to be ``columns`` long."""
    group = settings.get("group_size", "channel")
    length = columns if group == "channel" else int(group)
    zero_point = settings["bits"] if settings.get("scheme") == "affine" else 0
    return float(settings["bits"] + (SCALE_BITS + zero_point) / length)
