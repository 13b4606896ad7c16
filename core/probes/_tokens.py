"""A prompt as a model's tokens: ids, what each token looks like to a reader, and how many bytes it stands for.

Shared by the probes. It refuses prompts that cannot be probed, and knows nothing of what a probe computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import BadInput, NeedsInput
from core.lazy import torch
from core.text.token_texts import is_byte_level, token_named, token_texts
from core.types import Prompt

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

__all__ = ["MAX_CELLS", "MAX_TOKENS", "Encoded", "encode", "limit_cells", "token_named", "token_texts"]

MAX_TOKENS = 2048
MAX_CELLS = 10_000
"""Most cells (layers × positions) of one map: what a page may ship to a browser."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized prompt. P is the number of tokens, special tokens included."""

    inputs: dict[str, Any]
    """The model's keyword arguments, tensors [1, P] on its device."""
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    n_bytes: tuple[int, ...]
    """UTF-8 bytes of the prompt that each token stands for; 0 for special tokens. Sums to the prompt's bytes."""

    @property
    def n_tokens(self) -> int:
        """P."""
        return len(self.ids)

    def start(self, last: int) -> int:
        """First position shown when only the last ``last`` are asked for (0: all)."""
        return max(0, self.n_tokens - last) if last else 0


def encode(loaded: LoadedModel, prompt: Prompt) -> Encoded:
    """Tokenize a prompt for this model; raises ``BadInput`` when it is empty, too long, or an unusable pair."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None, "the registry's `needs` keep models without tokenizer away from text probes"
    if prompt.image is not None:
        raise BadInput(
            f"{loaded.ref} reads text and takes no image; leave the image out, or open a vision model, e.g. demo:vit"
        )
    if not prompt.text.strip():
        raise NeedsInput("the prompt is empty; type at least one word")
    if prompt.second is not None and loaded.family not in ("encoder", "classifier"):
        raise BadInput(
            f"a second text only makes sense for an encoder; {loaded.ref} is a {loaded.family}: put both in one prompt"
        )
    texts = [prompt.text] if prompt.second is None else [prompt.text, prompt.second]
    encoding = tokenizer(*texts, return_offsets_mapping=True)
    ids = tuple(encoding["input_ids"])
    limit = min(MAX_TOKENS, loaded.anatomy.context_length)
    if len(ids) > limit:
        reason = "this model's context" if limit < MAX_TOKENS else "the most a probe takes"
        raise BadInput(
            f"the prompt has {len(ids)} tokens, {limit} is {reason}; shorten it by {len(ids) - limit} tokens"
        )
    inputs = {
        name: torch.tensor([encoding[name]], device=loaded.model.device)
        for name in tokenizer.model_input_names
        if name in encoding
    }
    offsets = _offsets_per_text(encoding, len(texts))
    counts = [0] * len(ids)
    for index, text in enumerate(texts):
        for position, n in _bytes_of_text(tokenizer, text, ids, offsets[index]):
            counts[position] = n
    return Encoded(inputs, ids, token_texts(tokenizer, ids), tuple(counts))


def limit_cells(n_layers: int, n_positions: int) -> None:
    """Refuse a layer × position map too large to look at; raises ``BadInput`` with the largest that fits."""
    if n_layers * n_positions > MAX_CELLS:
        raise BadInput(
            f"{n_layers} layers × {n_positions} positions are {n_layers * n_positions:,} cells, more than {MAX_CELLS:,}; "
            f"set positions to at most {MAX_CELLS // n_layers}, or take a larger layer stride"
        )


def _bytes_of_text(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int]]:
    """(position, bytes) for each of a text's tokens; every byte of the text is counted exactly once.

    Bytes between two tokens (spaces that a WordPiece tokenizer drops) go to the later one, bytes after the last
    token to the last. Tokens that share a character split it: byte-level ones know their bytes, and otherwise a
    byte-fallback token is one byte.
    """
    ends = _byte_ends(text)
    counts: list[list[int]] = []
    counted = 0
    byte_level = is_byte_level(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens([ids[position] for position, _, _ in offsets])
    for index, (position, _, end) in enumerate(offsets):
        upto = ends[end]
        shares_its_end = index + 1 < len(offsets) and offsets[index + 1][1] < end
        if shares_its_end:
            known = len(tokens[index]) if byte_level else 1
            upto = min(upto, counted + known)
        counts.append([position, max(0, upto - counted)])
        counted = max(counted, upto)
    if counts:
        counts[-1][1] += ends[-1] - counted
    return [(position, n) for position, n in counts]


def _offsets_per_text(encoding: Any, n_texts: int) -> list[list[tuple[int, int, int]]]:
    """Per text, its tokens as (position, first character, end character); special tokens belong to no text."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(n_texts)]
    spans = zip(encoding["offset_mapping"], encoding.sequence_ids(), strict=True)
    for position, ((first, end), text) in enumerate(spans):
        if text is not None:
            found[text].append((position, first, end))
    return found


def _byte_ends(text: str) -> list[int]:
    """For each character index, how many UTF-8 bytes come before it; one more entry for the end."""
    ends = [0]
    for character in text:
        ends.append(ends[-1] + len(character.encode()))
    return ends
