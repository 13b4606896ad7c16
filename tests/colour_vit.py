"""A hand-built vision transformer inside stock ViT maths: its class is the colour of one patch, and nothing else.

One layer of two heads on 4 × 4 patches. Head 0 of every position looks at the chosen patch alone (weight
1 − 15 · e^−β or more) and moves its colour to the class coordinates; head 1 is dead (zero values, uniform attention);
the MLP writes nothing. Every code is a pair ±1, so a norm subtracts no mean. Classes: red, green, blue.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.types import ModelRef

GRID, PATCH, HEADS, CHANNELS = 4, 2, 2, 3
SIDE = GRID * PATCH
COLOURS = ("red", "green", "blue")
BETA = 40.0
# Where each code lives in the residual stream, a pair of coordinates each; the class token has a place too.
PLACE, COLOUR = 0, 2 * (GRID * GRID + 1)
CLASS = COLOUR + 2 * CHANNELS
D = CLASS + 2 * CHANNELS
D_HEAD = D // HEADS


def colour_vit(patch: int, *, dtype: torch.dtype = torch.float32, looks: bool = True) -> LoadedModel:
    """The model whose answer is the colour of ``patch``; without ``looks`` it sees all positions alike."""
    config = transformers.ViTConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=4,
        image_size=SIDE,
        patch_size=PATCH,
        id2label=dict(enumerate(COLOURS)),
        label2id={name: n for n, name in enumerate(COLOURS)},
    )
    model = transformers.ViTForImageClassification(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("weight") and "layernorm" in name else 0.0)
        embeddings, layer = model.vit.embeddings, model.vit.layers[0]
        for channel in range(CHANNELS):
            kernel = embeddings.patch_embeddings.projection.weight
            kernel[COLOUR + 2 * channel, channel] = 1 / PATCH**2
            kernel[COLOUR + 2 * channel + 1, channel] = -1 / PATCH**2
            _write(layer.attention.o_proj.weight[:, channel], CLASS + 2 * channel)
            _read(layer.attention.v_proj.weight[channel], COLOUR + 2 * channel)
            _read(model.classifier.weight[channel], CLASS + 2 * channel)
        if looks:
            for position in range(GRID * GRID + 1):
                _write(embeddings.position_embeddings[0, position], PLACE + 2 * position)
            # Every query is the constant 1 in coordinate 3; only the chosen patch's key answers it.
            layer.attention.q_proj.bias[CHANNELS] = BETA * math.sqrt(D_HEAD) * math.sqrt(D)
            _read(layer.attention.k_proj.weight[CHANNELS], PLACE + 2 * (patch + 1))
    processor = transformers.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model = model.to(dtype)
    return LoadedModel(
        ModelRef("colour"), Path(), model, None, processor, find_anatomy(model), f"colour-{patch}-{looks}"
    )


def painted(path: Path, colours: dict[int, tuple[int, int, int]], *, ground: int = 128) -> str:
    """A picture of grey patches, some painted; returns its path."""
    pixels = np.full((SIDE, SIDE, 3), ground, dtype=np.uint8)
    for patch, colour in colours.items():
        row, column = divmod(patch, GRID)
        pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = colour
    Image.fromarray(pixels).save(path)
    return str(path)


def _write(row: Any, at: int) -> None:
    row[at], row[at + 1] = 1.0, -1.0


def _read(row: Any, at: int) -> None:
    row[at], row[at + 1] = 0.5, -0.5
