"""Calibration text as windows of one length, nothing padded: what every data-aware step reads.

Documents are laid end to end and cut, so that no text is thrown away and every token is real; each window begins and
ends with the special tokens that the tokenizer gives a text of its own.

Legend: ``B`` windows, ``P`` positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import BadInput
from core.lazy import torch
from core.types import Documents

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

MIN_WINDOWS = 8
"""Fewer are refused, unless fewer were asked for."""


class Sampling(Protocol):
    """Settings that say how much calibration text a step reads."""

    @property
    def samples(self) -> int:
        """Windows at most."""

    @property
    def sample_tokens(self) -> int:
        """Tokens of a window, at most the context length."""

    @property
    def seed(self) -> int:
        """Which windows, where the text has more."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a step reads, and what its result says of it."""

    documents: Documents
    windows_BP: Tensor
    asked: int
    """Windows that the settings asked for."""

    @property
    def n_tokens(self) -> int:
        """Of all windows."""
        return self.windows_BP.numel()

    @property
    def shortage(self) -> str:
        """One sentence where the text gave fewer windows than were asked for; else empty."""
        return shortage_note(self.windows_BP, self.asked, self.documents)

    @property
    def inputs(self) -> dict[str, str]:
        """For ``Provenance.inputs``."""
        return {"calibration": self.documents.fingerprint}

    @property
    def conditions(self) -> dict[str, Any]:
        """For ``Provenance.conditions``."""
        return {"calibration": self.documents.name, "calibration_tokens": self.n_tokens}


def read_calibration(loaded: LoadedModel, documents: Documents | None, settings: Sampling) -> Calibration:
    """The windows that a step's settings ask for; raises as ``calibration_windows`` does."""
    assert documents is not None, "the registry's `needs` bring calibration text"
    windows_BP = calibration_windows(
        loaded, documents, samples=settings.samples, sample_tokens=settings.sample_tokens, seed=settings.seed
    )
    return Calibration(documents, windows_BP, settings.samples)


def calibration_windows(
    loaded: LoadedModel, documents: Documents, *, samples: int, sample_tokens: int, seed: int
) -> Tensor:
    """Up to ``samples`` windows of ``sample_tokens`` token ids each (at most the context length), [B, P] int64.

    Where the text has more, ``seed`` chooses among its windows; where it has fewer, all are given, and ``MIN_WINDOWS``
    at least. Raises ``BadInput`` saying how many tokens there are and how many it takes.
    """
    length = min(sample_tokens, loaded.anatomy.context_length)
    frame = _Frame.of(loaded.tokenizer)
    body = length - len(frame.before) - len(frame.after)
    stream = _stream(loaded.tokenizer, documents, frame)
    n_windows = len(stream) // body
    needed = min(samples, MIN_WINDOWS)
    if n_windows < needed:
        raise BadInput(
            f"{documents.name} gives {len(stream):,} calibration tokens, and {needed} windows of {length} take "
            f"{needed * body:,}; give longer text (calibration=domains has more), or lower sample_tokens or samples"
        )
    windows_NB = torch.tensor(stream[: n_windows * body]).view(n_windows, body)
    if n_windows > samples:
        generator = torch.Generator().manual_seed(seed)
        windows_NB = windows_NB[torch.randperm(n_windows, generator=generator)[:samples].sort().values]
    before, after = (torch.tensor(part, dtype=torch.int64).expand(len(windows_NB), -1) for part in frame)
    return torch.cat([before, windows_NB, after], 1).to(loaded.model.device)


def shortage_note(windows_BP: Tensor, samples: int, documents: Documents) -> str:
    """One sentence where the text gave fewer windows than were asked for; else empty."""
    n, length = windows_BP.shape
    if n >= samples:
        return ""
    return (
        f"{documents.name} gave {n} of the {samples} calibration windows asked for ({n * length:,} tokens); longer text, "
        "e.g. calibration=domains, gives more."
    )


@dataclass(frozen=True)
class _Frame:
    """Special tokens that a tokenizer puts around a text."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> _Frame:
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return cls(whole[:start], whole[start + len(bare) :])

    def __iter__(self) -> Any:
        return iter((self.before, self.after))


def _stream(tokenizer: Any, documents: Documents, frame: _Frame) -> list[int]:
    """All documents' tokens, each document closed by the token that ends a text, if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    close = [] if frame.after else end
    found: list[int] = []
    for text in documents.texts:
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + close
    return found
