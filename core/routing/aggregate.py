"""Who computes what over long text, as counts that do not grow with it: load, co-activation, flow, output norms.

Decisions are counted in the forward pass that makes them and then let go. Statistics of these counts are in
``statistics.py``; the whole decisions of a short text are in ``trace.py``.

Legend: ``L`` MoE layers in order, ``E`` experts, ``K`` slots, ``T`` rows of one forward call, ``V`` vocabulary, ``U``
documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.lazy import torch
from core.routing._tally import Tally, Wanted
from core.routing.discover import MoeLayer
from core.routing.lens import NOTHING, Change, layers_of, routed
from core.routing.trace import token_ids
from core.types import Documents, Progress, part_of, silent

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SEQ_LEN = 512
BATCH_TOKENS = 2048
"""Positions of one forward call, padding included."""
MAX_TABLE_BYTES = 512 << 20
"""Largest token × expert table that is held."""
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Aggregates:
    """Counts and sums over all tokens of a text; padding never counts. Shapes are [L, …]."""

    layers: tuple[int, ...]
    """Block indices of the MoE layers."""
    n_tokens: int
    n_experts: int
    top_k: int
    load_LE: Ints
    """Tokens that each expert computed; a layer's sum is n_tokens · top_k where no slot is dropped."""
    first_LE: Ints
    """Tokens for which the expert had the largest routing weight."""
    weight_LE: Floats
    """Sum of routing weights."""
    coactivation_LEE: Ints
    """Tokens that chose both; the diagonal is the load."""
    flow_LEE: Ints
    """Tokens that chose i here and j in the next MoE layer, all K² pairs; 0 for the last layer."""
    probability_LE: Floats
    """Sum over tokens of the router's distribution; NaN for an unknown routing rule."""
    entropy_sum_L: Floats
    """Sum over tokens of that distribution's entropy in nats; NaN likewise."""
    norm_sum_LE: Floats | None = None
    """Σ ‖f_e(x)‖ over the tokens routed to e; None unless asked for."""
    norm_sq_sum_LE: Floats | None = None
    """Σ ‖f_e(x)‖²."""
    gated_norm_sum_LE: Floats | None = None
    """Σ g_e(x) ‖f_e(x)‖, g the routing weight as applied."""
    token_expert_LVE: NDArray[np.int32] | None = None
    """How often the token was computed by the expert; None unless asked for."""
    predicted_expert_LVE: NDArray[np.int32] | None = None
    """How often the expert computed a position whose most likely next token is this one; None unless asked for."""
    first_by_document_ULE: NDArray[np.int32] | None = None
    """``first_LE`` of each document; None unless asked for."""

    def __add__(self, other: Aggregates) -> Aggregates:
        """Both texts together; what only one of them has counted is left out."""
        assert (self.layers, self.n_experts) == (other.layers, other.n_experts), (
            "counts of two different models"
        )
        together: dict[str, Any] = {"n_tokens": self.n_tokens + other.n_tokens}
        for name in COUNTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            together[name] = None if mine is None or theirs is None else mine + theirs
        mine, theirs = self.first_by_document_ULE, other.first_by_document_ULE
        together["first_by_document_ULE"] = (
            None if mine is None or theirs is None else np.concatenate([mine, theirs])
        )
        return replace(self, **together)


NOT_SUMMED = ("layers", "n_tokens", "n_experts", "top_k", "first_by_document_ULE")
COUNTS = tuple(found.name for found in fields(Aggregates) if found.name not in NOT_SUMMED)
"""What is summed over tokens, layer by layer."""


def aggregate(
    loaded: LoadedModel,
    documents: Documents,
    progress: Progress = silent,
    *,
    max_tokens: int,
    seq_len: int = SEQ_LEN,
    norms: bool = False,
    vocabulary: bool = False,
    predicted: bool = False,
    by_document: bool = False,
    change: Change = NOTHING,
) -> Aggregates:
    """Count the decisions on the first ``max_tokens`` tokens of ``documents``, in memory that does not grow with them.

    Documents are cut into windows of ``seq_len`` tokens that see nothing of each other. ``norms`` also sums what
    experts put out; ``vocabulary`` counts experts per token and ``predicted`` per most likely next token, in tables
    of L · V · E int32; ``by_document`` counts first choices per document, for permutation tests.

    Raises ``BadInput`` for a dense model, text without tokens, or a table above ``MAX_TABLE_BYTES``.
    """
    layers = layers_of(loaded)
    wanted = Wanted(
        norms=norms,
        tokens=loaded.anatomy.vocab_size if vocabulary else 0,
        predicted=loaded.anatomy.vocab_size if predicted else 0,
        documents=len(documents.texts) if by_document else 0,
    )
    _refuse_large_tables(layers, wanted)
    tally = Tally(layers, wanted, loaded.model.device)
    # Not under fast_fp32: oneDNN compiles and keeps a kernel for every number of tokens that an expert meets.
    with loaded.lock, torch.inference_mode():
        for batch in _batches(loaded, documents, max_tokens, min(seq_len, loaded.anatomy.context_length)):
            _count(loaded, batch, tally, change=change)
            progress(tally.n_tokens, max_tokens, f"counting experts over {documents.name}")
    if not tally.n_tokens:
        raise BadInput(f"{documents.name} has no tokens to count; give text, and at least one token of it")
    return _aggregates(layers, tally)


def by_domain(
    loaded: LoadedModel,
    groups: Mapping[str, Documents],
    progress: Progress = silent,
    *,
    max_tokens: int,
    seq_len: int = SEQ_LEN,
    norms: bool = False,
    vocabulary: bool = False,
    by_document: bool = False,
) -> dict[str, Aggregates]:
    """``aggregate`` for each group of documents by itself, ``max_tokens`` of each; they may be added up."""
    found = {}
    for index, (name, documents) in enumerate(groups.items()):
        found[name] = aggregate(
            loaded,
            documents,
            part_of(progress, index / len(groups), (index + 1) / len(groups)),
            max_tokens=max_tokens,
            seq_len=seq_len,
            norms=norms,
            vocabulary=vocabulary,
            by_document=by_document,
        )
    return found


def _refuse_large_tables(layers: Sequence[MoeLayer], wanted: Wanted) -> None:
    rows, n_experts = wanted.tokens + wanted.predicted, max(layer.n_experts for layer in layers)
    n_bytes = 4 * len(layers) * rows * n_experts
    if n_bytes > MAX_TABLE_BYTES:
        raise BadInput(
            f"a table of {len(layers)} layers × {rows:,} tokens × {n_experts} experts takes {n_bytes >> 20:,} MiB, "
            f"more than {MAX_TABLE_BYTES >> 20}; count without vocabulary"
        )


@dataclass(frozen=True)
class _Chunk:
    """Some tokens of one document, to be run by themselves."""

    document: int
    ids: list[int]


def _batches(
    loaded: LoadedModel, documents: Documents, max_tokens: int, seq_len: int
) -> Iterator[list[_Chunk]]:
    """Chunks of all documents, in order, a forward call's worth at a time; whole chunks apart from short ends."""
    waiting: dict[bool, list[_Chunk]] = {True: [], False: []}
    left = max_tokens
    for document, text in enumerate(documents.texts):
        ids = token_ids(loaded, text)[:left]
        left -= len(ids)
        for first in range(0, len(ids), seq_len):
            chunk = _Chunk(document, ids[first : first + seq_len])
            batch = waiting[len(chunk.ids) == seq_len]
            longest = max(len(other.ids) for other in [*batch, chunk])
            if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
                yield batch.copy()
                batch.clear()
            batch.append(chunk)
        if left <= 0:
            break
    yield from (batch for batch in waiting.values() if batch)


def _count(loaded: LoadedModel, batch: list[_Chunk], tally: Tally, *, change: Change) -> None:
    """Run one batch, padded on the right, and count its decisions."""
    longest = max(len(chunk.ids) for chunk in batch)
    padded = [chunk.ids + [0] * (longest - len(chunk.ids)) for chunk in batch]
    ids_BP = torch.tensor(padded, device=loaded.model.device)
    lengths_B1 = torch.tensor([[len(chunk.ids)] for chunk in batch], device=ids_BP.device)
    mask_BP = (torch.arange(longest, device=ids_BP.device) < lengths_B1).long()
    documents_B1 = torch.tensor([[chunk.document] for chunk in batch], device=ids_BP.device)
    tally.start(ids_BP.flatten(), documents_B1.expand_as(ids_BP).flatten(), int(mask_BP.sum()))
    with routed(loaded, tally.observe, change=change, norms=tally.wanted.norms, mask_BP=mask_BP):
        # All positions' logits are only computed where they are read.
        logits_BPV = loaded.model(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            use_cache=False,
            logits_to_keep=0 if tally.wanted.predicted else 1,
        ).logits
    if tally.wanted.predicted:
        tally.finish(logits_BPV.argmax(-1).flatten())


def _aggregates(layers: Sequence[MoeLayer], tally: Tally) -> Aggregates:
    sums = {name: values.cpu().numpy() for name, values in tally.sums.items()}
    by_document_LUE = sums.pop("first_by_document_LUE", None)
    if by_document_LUE is not None:
        n_read = 1 + int(np.flatnonzero(by_document_LUE.any(axis=(0, 2)))[-1])
        sums["first_by_document_ULE"] = by_document_LUE.swapaxes(0, 1)[:n_read]
    return Aggregates(
        layers=tuple(layer.layer for layer in layers),
        n_tokens=tally.n_tokens,
        n_experts=max(layer.n_experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        **sums,
    )
