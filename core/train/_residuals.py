"""The residual stream of running text, a window at a time: what every trained instrument learns from.

Windows never cross documents, and the part held out for measuring shares no document with the training part where
the text has more than one. Legend: B windows of one length, P position, D d_model.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.types import Documents

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

MIN_WINDOW = 8
"""Shorter ends of documents are left out: they would be all beginning and no context."""
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class TextWindow:
    """Consecutive tokens of one document."""

    document: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TextParts:
    """Windows to learn from, and windows to measure on."""

    training: tuple[TextWindow, ...]
    held_out: tuple[TextWindow, ...]

    @property
    def n_training(self) -> int:
        """Tokens to learn from."""
        return sum(len(window.ids) for window in self.training)

    @property
    def n_held_out(self) -> int:
        """Tokens to measure on."""
        return sum(len(window.ids) for window in self.held_out)


def cut_text(loaded: LoadedModel, documents: Documents, *, window: int, max_tokens: int) -> TextParts:
    """Tokenize documents in order until ``max_tokens``, cut them into windows, and hold the last fifth out.

    Raises ``BadInput`` for text too short to be cut in two.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None, "the registry's `needs` keep models without tokenizer away"
    size = min(window, loaded.anatomy.context_length)
    found: list[TextWindow] = []
    left = max_tokens
    for document, text in enumerate(documents.texts):
        ids = tokenizer(text, verbose=False)["input_ids"][:left]
        cuts = (tuple(ids[first : first + size]) for first in range(0, len(ids), size))
        found.extend(TextWindow(document, cut) for cut in cuts if len(cut) >= MIN_WINDOW)
        left -= len(ids)
        if left < MIN_WINDOW:
            break
    if len(found) < 2:
        raise BadInput(
            f"{documents.name} gives {len(found)} windows of {size} tokens, and training needs at least two (one is held out "
            "to measure on); give more text, or a smaller window"
        )
    cut = _boundary(found)
    return TextParts(tuple(found[:cut]), tuple(found[cut:]))


def _boundary(windows: list[TextWindow]) -> int:
    """Where the held-out part begins: the first new document of the last fifth, or before it where there is none."""
    n = len(windows)
    wanted = min(n - 1, round(n * (1 - HELD_OUT_SHARE)))
    starts = [i for i in range(1, n) if windows[i].document != windows[i - 1].document]
    return min(starts, key=lambda start: abs(start - wanted)) if starts else max(1, wanted)


def spread_positions(windows: tuple[TextWindow, ...], n: int) -> list[list[int]]:
    """Per window, positions so that all together are ``n`` spread evenly over the text; never a window's first.

    The first position of a window attends to nothing and often carries a massive activation.
    """
    places = [(w, p) for w, window in enumerate(windows) for p in range(1, len(window.ids))]
    step = max(1.0, len(places) / n)
    chosen = [places[int(index * step)] for index in range(min(n, len(places)))]
    positions: list[list[int]] = [[] for _ in windows]
    for w, p in chosen:
        positions[w].append(p)
    return positions


def run_window(loaded: LoadedModel, window: TextWindow) -> Any:
    """One forward pass over one window; logits of the last position only."""
    ids = torch.tensor([window.ids], device=loaded.model.device)
    return loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


def residual_after(loaded: LoadedModel, layer: int, window: TextWindow) -> Tensor:
    """The residual stream [P, D] after ``layer`` ≥ 1 blocks, float32; later blocks are not run."""
    found: list[Tensor] = []

    def stop(path: str, residual_BPD: Tensor) -> None:
        found.append(residual_BPD[0].float())
        raise _Enough

    with suppress(_Enough), capture(loaded.model, [loaded.anatomy.blocks[layer - 1].path], reduce=stop):
        run_window(loaded, window)
    return found[0]
