"""Bytes of a variant before it is made, counted from a model card. Plain functions; draws and opens nothing.

Reads a step's settings by what they are called (``bits``, ``group_size``, ``scheme``, ``embedding_bits``,
``dtype``), not by its method: a method that stores weights some other way is not predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.recipe import Recipe

if TYPE_CHECKING:
    from core.models.sizes import ModelCard

MATRICES = ("attention", "mlp", "experts", "shared_expert")
TABLES = ("embedding", "head")
SCALE_BITS = 16
WIDTH = {"float32": 32, "bfloat16": 16, "float16": 16}


def predicted_bytes(card: ModelCard, recipe: Recipe) -> float | None:
    """Bytes of the weight files, file headers aside; None when a step does not say how it stores weights."""
    sizes = card.components.groupby("component")["parameters"].sum()
    matrices = float(sizes[sizes.index.isin(MATRICES)].sum())
    tables = float(sizes[sizes.index.isin(TABLES)].sum())
    rest = float(sizes.sum()) - matrices - tables
    width = WIDTH.get(card.dtype, 32)
    bits = {"matrices": float(width), "tables": float(width), "rest": float(width)}
    for step in recipe.steps:
        if "dtype" in step.settings:
            bits = dict.fromkeys(bits, float(WIDTH[step.settings["dtype"]]))
        elif "bits" in step.settings:
            grid = _bits_per_value(step.settings, card.anatomy.d_model)
            table = step.settings.get("embedding_bits", step.settings["bits"])
            same = table == step.settings["bits"]
            bits |= {"matrices": grid, "tables": grid if same else float(table)}
        else:
            return None
    return (matrices * bits["matrices"] + tables * bits["tables"] + rest * bits["rest"]) / 8


def _bits_per_value(settings: dict[str, Any], columns: int) -> float:
    """Code, and its share of the scale and of the zero point; a channel is taken to be ``columns`` long."""
    group = settings.get("group_size", "channel")
    length = columns if group == "channel" else int(group)
    zero_point = settings["bits"] if settings.get("scheme") == "affine" else 0
    return float(settings["bits"] + (SCALE_BITS + zero_point) / length)
