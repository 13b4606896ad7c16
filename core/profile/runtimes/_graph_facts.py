"""What a graph's files must tell of the model they were made of, so that measuring them needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.models.loaded import LoadedModel
from core.models.patch_grid import image_size
from core.profile.runtimes._base import Prepared


def graph_facts(loaded: LoadedModel) -> dict[str, Any]:
    """Family, vocabulary, context and picture of a model, as plain data."""
    config = loaded.model.config
    text = config.get_text_config()
    pictures = loaded.family == "vision"
    return {
        "family": loaded.family,
        "vocab_size": getattr(text, "vocab_size", None),
        "context_length": getattr(text, "max_position_embeddings", None),
        "image_shape": [int(config.num_channels), *map(int, image_size(config))] if pictures else None,
    }


def prepared(made: Mapping[str, Any]) -> Prepared:
    """What the measuring loop must know, from ``graph_facts``."""
    shape = made["image_shape"]
    return Prepared(
        made["family"],
        made["vocab_size"],
        None if shape else made["context_length"],
        (shape[0], shape[1], shape[2]) if shape else None,
    )
