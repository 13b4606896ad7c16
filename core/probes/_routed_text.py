"""Text on its way through a mixture of experts: which experts every token of many documents was given.

Legend: L MoE layers, T tokens, K slots, E experts, N documents, G groups of documents.

Every document is read in passages of its own, from its beginning, documents in turn, so that a few thousand tokens
come from many documents: tokens of one document resemble each other, and it is documents that are counted when an
interval is made (``_clustered.py``). Nothing is padded. It knows no statistic and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._clustered import GROUPS
from core.probes._tokens import Encoded, encode
from core.registry import Settings
from core.routing.discover import moe_layers
from core.routing.lens import routed
from core.text.documents import load_documents
from core.types import Cost, Progress, Prompt, content_hash

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.routing.lens import Routed

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
PASSAGE = 512
"""Tokens run together at most: enough to keep a processor busy, short enough for any model's context."""
BATCH_TOKENS = 2048
"""Tokens of one forward pass."""
LOGIT_BYTES = 256 << 20
"""Next-token logits of one forward pass, where all are wanted."""
SHORTEST = 64
"""Tokens of a passage at least; a document's first tokens are routed like no others."""
FEWEST_DOCUMENTS = 32
TEXTS = "domains (text of eight kinds that every machine has), domain:NAME, pydoc, a .txt or .jsonl file, or hub:ID"


class TextSettings(Settings):
    """What text is read; shared by the probes that count."""

    text: str = Field(
        "domains", description=f"Text whose routing is counted: {TEXTS}; empty: the prompt alone"
    )
    max_tokens: int = Field(4096, ge=64, le=65_536, description="Tokens of the text that are read at most")

    @property
    def reads_prompt(self) -> bool:
        """Only where no text is named."""
        return not self.text.strip()


@dataclass(frozen=True)
class Texts:
    """N documents to read, each with the label of its domain where the source has labels."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    prompt: Encoded | None = None
    """The prompt as tokens, where it alone is read; ``texts`` is then its one text."""

    @property
    def fingerprint(self) -> str:
        """Content hash of documents and labels, in order."""
        return content_hash([self.texts, self.labels])

    @property
    def is_prompt(self) -> bool:
        """Whether a prompt alone is read: one text, so nothing can be said about others."""
        return self.prompt is not None


def find_texts(loaded: LoadedModel, prompt: Prompt, source: str) -> Texts:
    """The documents of ``source``, or the prompt where it is empty; raises ``BadInput`` for text that is unusable."""
    if not source.strip():
        return Texts("the prompt", (prompt.text,), prompt=encode(loaded, prompt))
    documents = load_documents(source)
    return Texts(documents.name, documents.texts)


@dataclass(frozen=True)
class Reading:
    """One forward pass: passages of equal length side by side, and what every MoE layer decided for their tokens."""

    document_T: Ints
    ids_T: Ints
    experts_LTK: NDArray[np.int16]
    """-1 where a slot was not used."""
    weights_LTK: NDArray[np.float32]
    kept: tuple[Any, ...]
    """What ``keep`` made of each layer's decision."""
    logits_TV: Any
    """The model's next-token logits, where they were asked for."""


def readings(
    loaded: LoadedModel,
    texts: Texts,
    progress: Progress,
    *,
    max_tokens: int,
    keep: Callable[[Routed], Any] | None = None,
    logits: bool = False,
    outputs: bool = False,
    fewest_documents: int = FEWEST_DOCUMENTS,
) -> Iterator[Reading]:
    """Run the model over the documents, passage by passage, until ``max_tokens`` are read.

    ``keep`` is called inside the forward pass, so that what it does not keep is freed at once. Passages are made
    shorter until ``fewest_documents`` share ``max_tokens``. Raises ``BadInput`` where the text has no token.
    """
    done = 0
    at_once = min(BATCH_TOKENS, LOGIT_BYTES // (4 * loaded.anatomy.vocab_size)) if logits else BATCH_TOKENS
    for batch in _batches(token_passages(loaded, texts, max_tokens, fewest_documents), at_once):
        progress(done, max_tokens, f"reading {texts.name}")
        decisions: list[tuple[Any, Any, Any]] = []

        def observe(decision: Routed, decisions: list[Any] = decisions) -> None:
            experts_TK = decision.experts_TK.to("cpu", torch.int16).numpy()
            weights_TK = decision.weights_TK.to("cpu", torch.float32).numpy()
            decisions.append((experts_TK, weights_TK, keep(decision) if keep else None))

        documents, ids = zip(*batch, strict=True)
        ids_BP = torch.tensor(ids, device=loaded.model.device)
        options = {} if logits else {"logits_to_keep": 1}
        with loaded.lock, torch.inference_mode(), routed(loaded, observe, outputs=outputs):
            output = loaded.model(input_ids=ids_BP, use_cache=False, **options)
        experts, weights, kept = zip(*decisions, strict=True)
        yield Reading(
            document_T=np.repeat(documents, ids_BP.shape[1]),
            ids_T=ids_BP.cpu().numpy().ravel(),
            experts_LTK=np.stack(experts),
            weights_LTK=np.stack(weights),
            kept=kept,
            logits_TV=output.logits.flatten(0, 1) if logits else None,
        )
        done += ids_BP.numel()
    if not done:
        raise BadInput(f"{texts.name} has no text that becomes a token; give other text")


def _batches(found: Iterable[tuple[int, list[int]]], at_once: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Neighbouring passages of equal length together, so that nothing need be padded."""
    batch: list[tuple[int, list[int]]] = []
    for one in found:
        length = len(one[1])
        if batch and (len(batch[0][1]) != length or (len(batch) + 1) * length > at_once):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def token_passages(
    loaded: LoadedModel, texts: Texts, max_tokens: int, fewest_documents: int
) -> Iterator[tuple[int, list[int]]]:
    """(document, token ids), every document's first passage, then every document's second, and so on."""
    if texts.prompt is not None:
        yield 0, list(texts.prompt.ids)
        return
    tokenizer = loaded.tokenizer
    assert tokenizer is not None, "the registry's `needs` keep models without tokenizer away"
    shared = max_tokens // min(fewest_documents, len(texts.texts))
    length = min(max(SHORTEST, min(PASSAGE, shared)), loaded.anatomy.context_length)
    ids: dict[int, list[int]] = {}
    left, turn, found = max_tokens, 0, True
    while found and left > 0:
        found = False
        for document, text in enumerate(texts.texts):
            if turn == 0:
                ids[document] = tokenizer(text, verbose=False)["input_ids"]
            passage = ids[document][turn * length : (turn + 1) * length][:left]
            if passage:
                found = True
                left -= len(passage)
                yield document, passage
            if left <= 0:
                return
        turn += 1


@dataclass(frozen=True)
class Choices:
    """Every token's experts in every MoE layer."""

    layers: tuple[int, ...]
    """Block index of each MoE layer."""
    n_experts: int
    top_k: int
    experts_LTK: NDArray[np.int16]
    weights_LTK: NDArray[np.float32]
    document_T: Ints
    ids_T: Ints
    predicted_T: Ints | None
    """The model's own next token after each token, where it was asked for."""

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    @property
    def n_documents(self) -> int:
        """Documents that at least one token is of."""
        return len(np.unique(self.document_T))

    @property
    def first_LT(self) -> NDArray[np.int16]:
        """Each token's first choice: the expert of its largest routing weight (slots need not be sorted)."""
        slot_LT1 = self.weights_LTK.argmax(-1)[..., None]
        first_LT: NDArray[np.int16] = np.take_along_axis(self.experts_LTK, slot_LT1, -1)[..., 0]
        return first_LT

    @property
    def group_T(self) -> Ints:
        """The group, 0 … G − 1, of each token's document: what an interval resamples."""
        _, number_T = np.unique(self.document_T, return_inverse=True)
        return number_T.astype(np.int64) % GROUPS

    def layer_at(self, layer: int) -> int:
        """Where block ``layer`` stands among the MoE layers; raises ``BadInput`` naming those there are."""
        return place_of(layer, self.layers)


def place_of(layer: int, layers: Sequence[int]) -> int:
    """Where block ``layer`` stands among the MoE layers; raises ``BadInput`` naming those there are."""
    if layer not in layers:
        raise BadInput(f"layer {layer} routes nothing; its MoE layers are {', '.join(map(str, layers))}")
    return list(layers).index(layer)


def read_choices(
    loaded: LoadedModel,
    texts: Texts,
    progress: Progress,
    *,
    max_tokens: int,
    predicted: bool = False,
    fewest_documents: int = FEWEST_DOCUMENTS,
) -> Choices:
    """Every token's experts over at most ``max_tokens`` of the documents."""
    found = readings(
        loaded,
        texts,
        progress,
        max_tokens=max_tokens,
        logits=predicted,
        fewest_documents=fewest_documents,
    )
    return choices_of(loaded, found)


def choices_of(loaded: LoadedModel, found: Iterable[Reading]) -> Choices:
    """The readings of a text as one; predicted tokens where logits were asked for."""
    parts = []
    for one in found:
        said_T = None if one.logits_TV is None else one.logits_TV.argmax(-1).cpu().numpy()
        parts.append((one.experts_LTK, one.weights_LTK, one.document_T, one.ids_T, said_T))
    experts, weights, documents, ids, said = zip(*parts, strict=True)
    layers = moe_layers(loaded)
    return Choices(
        layers=tuple(layer.layer for layer in layers),
        n_experts=max(layer.n_experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        experts_LTK=np.concatenate(experts, axis=1),
        weights_LTK=np.concatenate(weights, axis=1),
        document_T=np.concatenate(documents),
        ids_T=np.concatenate(ids),
        predicted_T=None if said[0] is None else np.concatenate(said),
    )


def text_cost(anatomy: Anatomy, n_tokens: int, settings: TextSettings) -> Cost:
    """Forward passes over the prompt that reading the text amounts to, and what is kept of them."""
    n_read = settings.max_tokens if settings.text.strip() else n_tokens
    layers = sum(block.is_moe for block in anatomy.blocks)
    return Cost(n_read / max(1, n_tokens), 8 * layers * n_read * anatomy.experts_per_token)
