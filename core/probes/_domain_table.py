"""Choices of experts counted by domain: what kind of text a token was in, and which expert it got.

Legend: D domains, G groups of a domain's documents, U = D · G units, N documents, T tokens, L MoE layers, E experts,
R shuffles.

A domain is a label of documents, not of tokens. It knows no probe and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.probes._clustered import GROUPS
from core.probes._routed_text import Texts, read_choices
from core.probes._routing_report import Counted, counted_by
from core.routing import statistics
from core.text.domains import documents_by_domain
from core.text.labelled import load_labelled
from core.types import Progress

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats

Count = Literal["first", "all", "weight"]
"""A token's first choice, all k experts it was given, or these by routing weight."""
DATA = (
    "domains: eight kinds of text that every machine has; or a .csv, .tsv or .jsonl file with text and label"
)
"""What a setting that names labelled texts says of itself."""
DOCUMENTS_EACH = 16
"""Documents of each domain that share the tokens at least: what intervals and shuffles have to work with."""


def labelled_texts(data: str) -> Texts:
    """Documents with their domain as label, domains in turn; raises ``BadInput`` for a file that has no two."""
    if data.strip() == "domains":
        each = {name: documents.texts for name, documents in documents_by_domain().items()}
        name = "domains"
    else:
        labelled = load_labelled(data)
        rows = list(zip(labelled.texts, labelled.labels, strict=True))
        each = {known: tuple(text for text, label in rows if label == known) for known in labelled.classes}
        name = labelled.name
    turns = zip_longest(*([(label, text) for text in texts] for label, texts in each.items()))
    pairs = [pair for pair in chain.from_iterable(turns) if pair is not None]
    return Texts(name, tuple(text for _, text in pairs), tuple(label for label, _ in pairs))


def domain_choices(
    loaded: LoadedModel, data: str, progress: Progress, *, max_tokens: int
) -> tuple[Texts, Choices]:
    """Read labelled texts, ``max_tokens`` of all domains together and about as many of each."""
    texts = labelled_texts(data)
    fewest = DOCUMENTS_EACH * len(set(texts.labels))
    return texts, read_choices(loaded, texts, progress, max_tokens=max_tokens, fewest_documents=fewest)


@dataclass(frozen=True)
class DomainTable:
    """Choices counted by unit: a group of documents of one domain."""

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    counts_DGLE: NDArray[Any]
    """Tokens, or routing weight."""

    @classmethod
    def of(cls, choices: Choices, texts: Texts, *, count: Count) -> DomainTable:
        """Count a text's choices; documents of a domain are dealt out to its groups in turn."""
        domains = tuple(dict.fromkeys(texts.labels))
        label_N = np.array([domains.index(label) for label in texts.labels])
        rank_N = np.zeros(len(label_N), dtype=np.int64)
        for domain in range(len(domains)):
            rank_N[label_N == domain] = np.arange((label_N == domain).sum())
        read = np.unique(choices.document_T)
        n_groups = min(GROUPS, int(np.bincount(label_N[read], minlength=len(domains)).min()))
        if n_groups == 0:
            raise BadInput(
                f"{choices.n_tokens} tokens do not reach all {len(domains)} domains of {texts.name}; raise max_tokens"
            )
        unit_T = label_N[choices.document_T] * n_groups + rank_N[choices.document_T] % n_groups
        n_units = len(domains) * n_groups
        chosen_LTK = choices.first_LT[..., None] if count == "first" else choices.experts_LTK
        weights_LTK = choices.weights_LTK if count == "weight" else None
        counts_ULE = counted_by(chosen_LTK, unit_T, n_units, choices.n_experts, weights_LTK)
        return cls(
            domains,
            choices.layers,
            counts_ULE.reshape(len(domains), n_groups, *counts_ULE.shape[1:]),
        )

    def information(self) -> Counted:
        """Normalised mutual information of domain and expert, per layer."""
        counts_GLDE = self.counts_DGLE.transpose(1, 2, 0, 3)
        return Counted.of(counts_GLDE, statistics.normalized_mutual_information)

    def shuffled(self, *, permutations: int, seed: int) -> tuple[Floats, Floats]:
        """The same [R, L] under shuffles of the units' labels, and per layer the p-value of what was observed."""
        n_domains, n_groups, n_layers, n_experts = self.counts_DGLE.shape
        counts_LUE = self.counts_DGLE.reshape(-1, n_layers, n_experts).swapaxes(0, 1)
        _, shuffled_RL, p_L = statistics.shuffled_information(
            counts_LUE, np.repeat(np.arange(n_domains), n_groups), draws=permutations, seed=seed
        )
        return shuffled_RL, p_L
