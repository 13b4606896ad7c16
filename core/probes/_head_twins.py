"""Every head of two models on the same documents: where it looks, and what it writes, compared in pairs.

Legend: B documents of a batch, P positions, H heads of a layer, A all heads of the student, C of the teacher, X pairs of
positions, N tokens of a group, E head_dim, D d_model.

Keeps no pattern for longer than a document: patterns are multiplied in pairs and summed. The first position, where many
heads rest their attention, is neither key nor token here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.capture import capture
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.probes._alignment import Sums, gram, hsic, own_hsic, thinned
from core.probes._head_weights import dense_weight

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.probes._twin_text import TwinText

Floats = NDArray[np.float64]
LEAST_TOKENS = 3
"""A document needs a key and a query behind its first position."""


@dataclass
class Habits:
    """What each head of a model does by itself, summed over documents: [A] each."""

    n_documents: int = 0
    first: Floats | float = 0.0
    """Mean weight on the first position."""
    previous: Floats | float = 0.0
    """Mean weight on the position before."""
    written: Floats | float = 0.0
    """Squared length of what it adds to the residual stream."""


@dataclass(frozen=True)
class Seen:
    """One model on one group of documents."""

    patterns: dict[int, Tensor]
    """Document → [A, X], the first key left out."""
    grams_ANN: Tensor
    """Products of all pairs of tokens in what each head writes."""
    gap: float
    """Largest |row sum − 1| of a pattern."""


@dataclass
class HeadPairs:
    """Sums for every pair of heads, from which similarities are made."""

    patterns: list[Sums] = field(default_factory=list)
    """Of each document."""
    elsewhere: list[Sums] = field(default_factory=list)
    """The same with the teacher on the document before: what position alone explains."""
    writes: list[Sums] = field(default_factory=list)
    """Of each group of documents."""
    _before_CX: Tensor | None = None

    def add(self, ours: Seen, theirs: Seen) -> None:
        """Take in what both did on a group."""
        for document, ours_AX in ours.patterns.items():
            theirs_CX = theirs.patterns[document]
            self.patterns.append(_sums(ours_AX, theirs_CX))
            before_CX = self._before_CX
            if before_CX is not None and before_CX.shape == theirs_CX.shape:
                self.elsewhere.append(_sums(ours_AX, before_CX))
            self._before_CX = theirs_CX
        k_ANN, l_CNN = ours.grams_ANN, theirs.grams_ANN
        self.writes.append((hsic(k_ANN, l_CNN), own_hsic(k_ANN), own_hsic(l_CNN)))


def look(loaded: LoadedModel, text: TwinText, group: range, habits: Habits, *, n_grams: int) -> Seen:
    """Run a model over a group of documents with eager attention; hold its lock and be in inference mode."""
    anatomy = loaded.anatomy
    patterns: defaultdict[int, list[Tensor]] = defaultdict(list)
    written: list[list[Tensor]] = []
    gap = 0.0
    options = {"logits_to_keep": 1} if loaded.family == "decoder" else {}
    for documents, ids_BP in text.batches(group, loaded.device):
        if ids_BP.shape[1] < LEAST_TOKENS:
            raise BadInput(
                f"a document of {text.name} has {ids_BP.shape[1]} tokens; {LEAST_TOKENS} are needed"
            )
        with (
            capture(loaded.model, [block.attention for block in anatomy.blocks], item=1) as pattern,
            capture(loaded.model, [block.o for block in anatomy.blocks], inputs=True) as z,
        ):
            loaded.model(input_ids=ids_BP, use_cache=False, **options)
        for at, document in enumerate(documents):
            maps_APP = torch.cat([pattern[block.attention][at] for block in anatomy.blocks]).float()
            if not bool(torch.isfinite(maps_APP).all()):
                raise SlimscopeError(
                    f"an attention pattern of {loaded.ref} is not finite; open it in float32, or check its weights"
                )
            gap = max(gap, float((maps_APP.sum(-1) - 1).abs().max()))
            _count(habits, maps_APP)
            patterns[document].append(maps_APP[:, 1:, 1:].flatten(1))
        written.append([z[block.o][:, 1:].flatten(0, 1).float() for block in anatomy.blocks])
    z_LND = [torch.cat(parts) for parts in zip(*written, strict=True)]
    return Seen(
        {document: torch.cat(parts) for document, parts in patterns.items()},
        _written_grams(loaded, z_LND, habits, n_grams),
        gap,
    )


def _written_grams(loaded: LoadedModel, z_LND: list[Tensor], habits: Habits, n_grams: int) -> Tensor:
    """[A, N, N] of z · W_O, head by head, without making z · W_O: its products are z · (W_O W_Oᵀ) · zᵀ."""
    anatomy = loaded.anatomy
    chosen = thinned(len(z_LND[0]), n_grams)
    if len(chosen) < 4:
        raise BadInput(
            f"{len(chosen)} tokens are left of this text; a few hundred are needed to compare heads"
        )
    grams, squares = [], []
    for block, z_ND in zip(anatomy.blocks, z_LND, strict=True):
        o_HED = dense_weight(loaded.model.get_submodule(block.o)).view(
            anatomy.n_heads, anatomy.head_dim, anatomy.d_model
        )
        metric_HEE = o_HED @ o_HED.mT
        z_HNE = z_ND[chosen].view(len(chosen), anatomy.n_heads, anatomy.head_dim).movedim(1, 0).to(metric_HEE)
        squares.append(((z_HNE @ metric_HEE) * z_HNE).sum((1, 2)))
        grams.append(gram(z_HNE, metric_HEE))
    habits.written = habits.written + torch.cat(squares).double().cpu().numpy()
    return torch.cat(grams)


def _count(habits: Habits, maps_APP: Tensor) -> None:
    habits.n_documents += 1
    habits.first = habits.first + maps_APP[:, 1:, 0].mean(-1).double().cpu().numpy()
    habits.previous = habits.previous + maps_APP.diagonal(-1, 1, 2).mean(-1).double().cpu().numpy()


def _sums(ours_AX: Tensor, theirs_CX: Tensor) -> Sums:
    return (
        (ours_AX @ theirs_CX.mT).double().cpu().numpy(),
        ours_AX.square().sum(-1).double().cpu().numpy(),
        theirs_CX.square().sum(-1).double().cpu().numpy(),
    )
