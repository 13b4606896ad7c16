"""Two prompts that differ token for token: what patching copies from, and what it copies into.

Patching moves states between equal positions, so both prompts must have as many tokens. It refuses others and shows
where they part; it knows no probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from core.errors import BadInput, NeedsInput
from core.probes._tokens import Encoded, encode
from core.types import Prompt

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class PromptPair:
    """Clean and corrupted prompt of equally many tokens."""

    clean: Encoded
    corrupted: Encoded

    @property
    def n_tokens(self) -> int:
        """Tokens of either."""
        return self.clean.n_tokens

    @property
    def differing(self) -> tuple[int, ...]:
        """Positions whose tokens differ; never empty."""
        ids = zip(self.clean.ids, self.corrupted.ids, strict=True)
        return tuple(position for position, (a, b) in enumerate(ids) if a != b)

    def swapped(self) -> PromptPair:
        """The same pair in the opposite roles."""
        return PromptPair(self.corrupted, self.clean)


def encode_pair(loaded: LoadedModel, prompt: Prompt, corrupted: str) -> PromptPair:
    """Tokenize both; raises ``BadInput`` when the second is empty, the same, or of another number of tokens."""
    if not corrupted.strip():
        raise NeedsInput(
            "no corrupted prompt was given; type the prompt again with one word changed for another of as many tokens, "
            "so that the answer changes"
        )
    pair = PromptPair(encode(loaded, prompt), encode(loaded, Prompt(corrupted)))
    if pair.clean.ids == pair.corrupted.ids:
        raise BadInput(
            "clean and corrupted prompt are the same tokens; change a word that the answer depends on"
        )
    if len(pair.clean.ids) != len(pair.corrupted.ids):
        raise BadInput(_misaligned(pair))
    return pair


def _misaligned(pair: PromptPair) -> str:
    clean, corrupted = pair.clean.texts, pair.corrupted.texts
    both = zip_longest(clean, corrupted)
    at, (a, b) = next((position, texts) for position, texts in enumerate(both) if texts[0] != texts[1])
    return (
        f"the prompts do not align: clean has {len(clean)} tokens ({_joined(clean)}), corrupted {len(corrupted)} "
        f"({_joined(corrupted)}); they part at token {at}: {_shown(a)} and {_shown(b)}. "
        "Replace words by words of as many tokens, e.g. one common name by another"
    )


def _joined(texts: tuple[str, ...]) -> str:
    """A tokenization on one line; the middle of a long one is left out."""
    shown = [text.replace("\n", "⏎") for text in texts]
    if len(shown) > 40:
        shown = [*shown[:20], "…", *shown[-20:]]
    return "|".join(shown)


def _shown(text: str | None) -> str:
    return "nothing" if text is None else repr(text)
