"""Where a model's read-out comes from, as one weight per input position: the shared end of rollout and relevance.

Takes a sentence or a picture, knows which position the model reads its answer from, and turns weights into frames and
views: a token strip for text, a map over the picture for images. Legend: P positions, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.errors import SlimscopeError
from core.lazy import torch
from core.probes._image import EncodedImage, encode_image
from core.probes._targets import resolve_position
from core.probes._tokens import MAX_CELLS, Encoded, encode
from core.types import Prompt, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Input = Encoded | EncodedImage
_SINK = (
    "In a decoder most heads rest on the first token, which so collects weight that says nothing of its content: compare "
    "the other tokens, or use direct attribution, occlusion or patching."
)
Floats = NDArray[np.float64]
READING_POINT = (
    "Position whose sources are shown; -1 takes the one the model answers from: the class token, "
    "all tokens averaged as a sentence encoder does, or the last token of a decoder"
)


def encode_any(loaded: LoadedModel, prompt: Prompt) -> Input:
    """A picture for a vision model, else the prompt's text; raises ``BadInput`` for the wrong one."""
    return encode_image(loaded, prompt) if loaded.family == "vision" else encode(loaded, prompt)


def check_positions(encoded: Input, n_positions: int) -> None:
    """Hold the positions counted beforehand against those the model made; a wrong patch grid would shift a whole map."""
    if n_positions != encoded.n_tokens:
        raise SlimscopeError(
            f"this model makes {n_positions} positions of the input, {encoded.n_tokens} were expected from its config "
            f"({', '.join(encoded.texts[:3])} …), so weights cannot be placed; its architecture is not understood"
        )


def read_weights(loaded: LoadedModel, encoded: Input, position: int) -> tuple[Tensor, str]:
    """Weights [P] that sum to 1 over the positions the answer is read from, and that in words."""
    weights_P = torch.zeros(encoded.n_tokens, device=loaded.model.device)
    chosen = (
        resolve_position(position, encoded.n_tokens) if position >= 0 else _reading_point(loaded, encoded)
    )
    if chosen is None:
        return weights_P + 1 / encoded.n_tokens, "the mean of all tokens"
    weights_P[chosen] = 1
    return weights_P, f"{encoded.texts[chosen]!r} at position {chosen}"


def _reading_point(loaded: LoadedModel, encoded: Input) -> int | None:
    """The position a model answers from: None for the mean of all."""
    if isinstance(encoded, EncodedImage):
        return 0
    if loaded.anatomy.causal:
        return encoded.n_tokens - 1
    if loaded.anatomy.pooler is not None:
        return 0  # a classifier's pooler reads the first position
    if loaded.anatomy.unembedding is not None:
        assert loaded.tokenizer is not None
        masks = [n for n, id_ in enumerate(encoded.ids) if id_ == loaded.tokenizer.mask_token_id]
        return masks[0] if len(masks) == 1 else None
    return None if loaded.pooling == "mean" else 0


def frames(encoded: Input, weight_P: Floats, weight_LP: Floats) -> Mapping[str, pd.DataFrame]:
    """``main``: one row per position, heaviest first; ``layers``: what is reached after each layer; the map to draw.

    For a picture ``patches`` is the map; for text ``tokens`` is the strip. Text too long for a map of all layers and
    positions has every n-th layer, the last always.
    """
    texts = np.array(encoded.texts, dtype=object)
    n = len(weight_P)
    main = pd.DataFrame({"position": np.arange(n), "token": texts, "weight": weight_P})
    share = np.divide(weight_P, weight_P.sum(), out=np.zeros(n), where=weight_P.sum() != 0)
    main["share"] = share
    found = {"main": main.sort_values("weight", ascending=False, kind="stable", ignore_index=True)}
    if isinstance(encoded, EncodedImage):
        found["patches"] = encoded.patch_frame(encoded.grid.patches(weight_P))
    else:
        found["tokens"] = main
    layers = _shown_layers(len(weight_LP), n)
    found["layers"] = pd.DataFrame(
        {
            "layer": np.repeat(layers, n),
            "position": np.tile(np.arange(n), len(layers)),
            "token": np.tile(texts, len(layers)),
            "weight": weight_LP[[layer - 1 for layer in layers]].ravel(),
        }
    )
    return found


def views(encoded: Input, what: str) -> tuple[View, ...]:
    """The map over the picture, or the strip over the text; the ranked table; how it came about layer by layer."""
    if isinstance(encoded, EncodedImage):
        first = View(
            "image",
            x="x",
            y="y",
            color="weight",
            frame="patches",
            title=f"{what} of each patch",
            unit="weight",
            tooltip=("row", "column", "width", "height"),
        )
    else:
        first = View(
            "tokens",
            x="position",
            color="weight",
            text="token",
            frame="tokens",
            title=f"{what} of each token",
            unit="weight",
            tooltip=("share",),
        )
    return (
        first,
        View("table", x="position", y="weight", text="token", title="Ranked", tooltip=("share",)),
        View(
            "heatmap",
            x="position",
            y="layer",
            color="weight",
            frame="layers",
            title=f"{what} after each layer",
            unit="weight",
            tooltip=("token",),
        ),
    )


def images(encoded: Input) -> dict[str, bytes]:
    """The picture that ``patches`` is drawn over; nothing for text."""
    return {"patches": encoded.png()} if isinstance(encoded, EncodedImage) else {}


def notes(loaded: LoadedModel, encoded: Input) -> tuple[str, ...]:
    """What a reader must know of the input."""
    if not isinstance(encoded, EncodedImage):
        return (_SINK,) if loaded.anatomy.causal else ()
    grid = encoded.grid
    more = "This model's classifier also reads the mean of all patches; the map is of the class token's part only."
    return (
        *encoded.notes,
        *((more,) if loaded.anatomy.unembedding is None else ()),
        f"The map shows the {grid.rows} × {grid.columns} patches; {', '.join(grid.special)} stand in the table only.",
    )


def _shown_layers(n_layers: int, n_positions: int) -> list[int]:
    """Layers 1 … n, thinned until layers × positions fit one map; the last is always shown."""
    stride = -(-n_layers * n_positions // (MAX_CELLS - n_positions))
    return sorted({*range(1, n_layers + 1, max(1, stride)), n_layers})
