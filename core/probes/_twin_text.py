"""The same documents as the tokens of two models of any shape: what student and teacher are read side by side on.

One passage a document, from its beginning; the document is what intervals resample. Knows no statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._tokens import encode, token_texts
from core.probes._twins import refuse_other_tokens
from core.registry import Settings
from core.text.documents import load_documents
from core.text.domains import documents_by_domain
from core.types import Cost, Prompt, content_hash

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

PROMPT = Prompt("(the text named in the settings is read; the prompt is not)")


class TwinTextSettings(Settings):
    """What text both models read."""

    text: str = Field(
        "domains",
        max_length=1000,
        description="Text that both models read: domains (eight kinds that every machine has), domain:NAME, pydoc, a "
        ".txt or .jsonl file, or hub:ID; empty: the prompt alone",
    )
    documents: int = Field(64, ge=4, le=2048, description="Documents read, the first of the text")
    tokens: int = Field(64, ge=8, le=256, description="Tokens of each, from its beginning")

    @property
    def reads_prompt(self) -> bool:
        """Only where no text is named."""
        return not self.text.strip()


@dataclass(frozen=True)
class TwinText:
    """Documents as token ids, special tokens included, and the label of each where its source has labels."""

    name: str
    ids: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    is_prompt: bool
    tokenizer: Any

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.ids))

    @property
    def conditions(self) -> dict[str, Any]:
        """What a result must say of the text it rests on."""
        return {
            "text": self.name,
            "documents": len(self.ids),
            "tokens": self.n_tokens,
            "text_fingerprint": content_hash(self.ids),
        }

    def strings(self, document: int) -> tuple[str, ...]:
        """What each token of a document looks like to a reader."""
        return token_texts(self.tokenizer, self.ids[document])

    def tokens_of(self, ids: Iterable[int]) -> tuple[str, ...]:
        """What token ids look like to a reader."""
        return token_texts(self.tokenizer, [int(id_) for id_ in ids])

    def groups(self, size: int) -> list[range]:
        """Document numbers dealt into groups of ``size``; a last one that is not full goes to the one before."""
        n = max(1, len(self.ids) // size)
        return [range(at * size, (at + 1) * size if at + 1 < n else len(self.ids)) for at in range(n)]

    def batches(self, documents: Sequence[int], device: str) -> Iterator[tuple[list[int], Any]]:
        """(documents, ids [B, P]): those of equal length together, so that nothing is padded."""
        of_length: dict[int, list[int]] = {}
        for document in documents:
            of_length.setdefault(len(self.ids[document]), []).append(document)
        for members in of_length.values():
            yield members, torch.tensor([self.ids[one] for one in members], device=device)


def read_twin_text(
    loaded: LoadedModel, reference: LoadedModel, prompt: Prompt, settings: TwinTextSettings
) -> TwinText:
    """The text a probe of two models reads; raises ``BadInput`` where the two split it into different tokens."""
    if loaded.family != reference.family:
        raise BadInput(
            f"{loaded.ref} is a {loaded.family} and {reference.ref} a {reference.family}; pick two models of one family"
        )
    if settings.reads_prompt:
        ids, other = encode(loaded, prompt).ids, encode(reference, prompt).ids
        refuse_other_tokens(loaded, reference, ids, other)
        return TwinText("the prompt", (ids,), ("",), is_prompt=True, tokenizer=loaded.tokenizer)
    source = settings.text.strip()
    documents = load_documents(source, limit=settings.documents)
    found = []
    for text in documents.texts:
        ours, theirs = (_ids(model, text, settings.tokens) for model in (loaded, reference))
        refuse_other_tokens(loaded, reference, ours, theirs)
        found.append(ours)
    domain_of = _domains() if source == "domains" else {}
    labels = tuple(domain_of.get(text, "") for text in documents.texts)
    return TwinText(documents.name, tuple(found), labels, is_prompt=False, tokenizer=loaded.tokenizer)


def _ids(loaded: LoadedModel, text: str, length: int) -> tuple[int, ...]:
    assert loaded.tokenizer is not None, "the registry's `needs` keep models without tokenizer away"
    limit = min(length, loaded.anatomy.context_length)
    return tuple(loaded.tokenizer(text, truncation=True, max_length=limit)["input_ids"])


def _domains() -> dict[str, str]:
    return {text: name for name, found in documents_by_domain().items() for text in found.texts}


def twin_cost(anatomy: Anatomy, n_tokens: int, settings: TwinTextSettings) -> Cost:
    """Both models over the text, in forward passes over the prompt; twice what the larger takes."""
    n_read = n_tokens if settings.reads_prompt else settings.documents * settings.tokens
    return Cost(2 * n_read / max(1, n_tokens), 1 << 28)
