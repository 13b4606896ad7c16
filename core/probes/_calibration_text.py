"""A text as calibrated steps read it: its tokens, its windows, what of them counts, document by document.

Legend: ``B`` windows, ``P`` positions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.probes._text_health import broken_ids, duplicates, kind_of, repeated, scripts
from core.types import Documents

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

Ints = NDArray[np.int64]
ROWS = 2000
"""Documents that the table lists."""


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """What the text is, before the model runs."""

    documents: Documents
    tokens: list[int]
    """Of each document."""
    windows_BP: Ints
    n_special: int
    """Positions of a window that are not text."""
    n_tokens: int
    """Of the text, with the token that closes each document where there is one."""
    n_total: int
    """Windows that the whole text would fill."""
    repeated_B: NDArray[np.float64]
    twins: dict[int, tuple[int, float]]
    kind: list[str]
    letters: Counter[str]
    broken: float
    """Share of the windows' tokens that are pieces of characters or unknown."""

    @classmethod
    def of(
        cls, loaded: LoadedModel, documents: Documents, windows_BP: Ints, *, near: float
    ) -> CalibrationText:
        tokenizer: Any = loaded.tokenizer
        tokens = [
            len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in documents.texts
        ]
        whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        after = len(whole) > len(bare) and whole[-1] != bare[-1]
        closing = 0 if tokenizer.eos_token_id is None or after else len(tokens)
        n_special = len(whole) - len(bare)
        body = windows_BP.shape[1] - n_special
        pieces, unknown = broken_ids(tokenizer, windows_BP)
        return cls(
            documents=documents,
            tokens=tokens,
            windows_BP=windows_BP,
            n_special=n_special,
            n_tokens=sum(tokens) + closing,
            n_total=(sum(tokens) + closing) // body,
            repeated_B=repeated(windows_BP),
            twins=duplicates(documents.texts, near=near),
            kind=[kind_of(text) for text in documents.texts],
            letters=scripts("\n".join(documents.texts)),
            broken=float(np.isin(windows_BP, list(pieces | unknown)).mean()),
        )

    @property
    def body(self) -> int:
        """Tokens of text in a window."""
        return int(self.windows_BP.shape[1]) - self.n_special

    @property
    def n_used(self) -> int:
        """Tokens of text that the windows hold."""
        return len(self.windows_BP) * self.body

    @property
    def n_left(self) -> int:
        """Tokens that no window holds: whole windows that were not chosen, and the end."""
        return (self.n_total - len(self.windows_BP)) * self.body + self.n_tokens - self.n_total * self.body

    @property
    def effective(self) -> int:
        """Tokens of text in the windows, less those in runs that were met before."""
        return round(float((1 - self.repeated_B).sum()) * self.body)

    def padding_if_alone(self) -> tuple[float, float]:
        """(cut, padded): what one document per window would lose of the text, and waste of its positions."""
        kept = sum(min(n, self.body) for n in self.tokens)
        return 1 - kept / max(1, sum(self.tokens)), 1 - kept / (len(self.tokens) * self.body)

    def kinds(self) -> pd.DataFrame:
        """Share of tokens by kind of text."""
        total: Counter[str] = Counter()
        for kind, n in zip(self.kind, self.tokens, strict=True):
            total[kind] += n
        found = pd.DataFrame(total.most_common(), columns=["kind", "tokens"])
        return found.assign(share=found["tokens"] / max(1, sum(self.tokens)))

    def table(self) -> pd.DataFrame:
        """One row per document."""
        repeats = [self.twins.get(at) for at in range(len(self.tokens))]
        return pd.DataFrame(
            {
                "document": range(len(self.tokens)),
                "beginning": [text.strip()[:60] for text in self.documents.texts],
                "tokens": self.tokens,
                "bytes_per_token": [
                    len(text.encode()) / max(1, n)
                    for text, n in zip(self.documents.texts, self.tokens, strict=True)
                ],
                "kind": self.kind,
                "repeats_document": pd.array([r and r[0] for r in repeats], dtype="Int64"),
                "similarity": [np.nan if r is None else r[1] for r in repeats],
            }
        ).head(2000)
