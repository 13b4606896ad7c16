"""Random tokens, repeated: a text without meaning on which what a head does shows by itself.

A start token, then r, then r again, r distinct tokens drawn at random. Nothing but the first half tells what comes in
the second, so a model that predicts it copies, and a head that looks at the token after the earlier copy of its query
is an induction head (Olsson et al. 2022). It knows tokenizers and seeds, no scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import CannotMeasure
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class Repeats:
    """S sequences of start + r + r."""

    ids_SP: Tensor
    length: int
    """Tokens of r; P is twice that and one."""

    @property
    def structure(self) -> range | tuple[int, ...]:
        """One token per position that repeats as the sequences do, whatever their tokens are."""
        half = range(1, self.length + 1)
        return (0, *half, *half)


def repeated_tokens(loaded: LoadedModel, *, length: int, sequences: int, seed: int) -> Repeats:
    """Seeded sequences; r is shortened to what the model's context and its tokens allow.

    Sequence number s depends on ``seed + s`` only. Special and added tokens, and rows of a padded vocabulary that the
    tokenizer has no name for, are not drawn. Raises ``CannotMeasure`` for a tokenizer without any special token.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id)
    start = next((id_ for id_ in starts if id_ is not None), None)
    if start is None:
        raise CannotMeasure(
            f"the tokenizer of {loaded.ref} names no start or end token to begin a random sequence with; "
            "add bos_token to its tokenizer_config.json"
        )
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    known = min(loaded.anatomy.vocab_size, len(tokenizer))
    drawn_from = torch.tensor([id_ for id_ in range(known) if id_ not in left_out])
    length = min(length, (loaded.anatomy.context_length - 1) // 2, len(drawn_from))
    rows = []
    for number in range(sequences):
        generator = torch.Generator().manual_seed(seed + number)
        r = drawn_from[torch.randperm(len(drawn_from), generator=generator)[:length]]
        rows.append(torch.cat([torch.tensor([start]), r, r]))
    return Repeats(torch.stack(rows).to(loaded.device), length)
