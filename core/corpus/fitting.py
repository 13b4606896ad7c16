"""Whether a model can learn from these token ids: its context, its vocabulary, and whether texts that share a row stay
strangers to it.

The last is tried, not looked up: layers that carry a state from position to position (Mamba), and models that ignore
what they are told of positions, mix the texts of a packed row without a word.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.corpus.batches import Batch, TrainingData
from core.corpus.packing import Ints
from core.errors import BadInput
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

TOLERANCE, TOLERANCE_16_BIT = 0.01, 0.1
"""Largest relative difference (of norms) between a text's outputs in a packed row and alone. Rounding gives about
1e-6 in float32; a text that sees its neighbour differs by its own size."""


def fitted(data: TrainingData, loaded: LoadedModel) -> TrainingData:
    """The data as this model must be given it; raises ``BadInput`` where it cannot learn from it."""
    anatomy = loaded.anatomy
    longest = int(np.diff(data.encoded.bounds_S1).max())
    if anatomy.context_length and longest > anatomy.context_length:
        raise BadInput(
            f"texts of {longest:,} tokens do not fit the context of {anatomy.context_length:,} that {loaded.ref} has; set "
            "a shorter window"
        )
    top = int(data.encoded.ids_T.max())
    if top >= anatomy.vocab_size:
        raise BadInput(
            f"{data.name} has token {top}, but {loaded.ref} has {anatomy.vocab_size:,}; use the tokenizer of this model"
        )
    shared = np.flatnonzero(np.diff(data.layout.bounds_R1) > 1)
    if data.kind == "pairs" or len(shared) == 0:
        return data
    for by_mask in (False, True):
        tried = replace(data, by_mask=by_mask)
        if _strangers(tried, shared, loaded):
            return tried
    raise BadInput(
        f"{loaded.ref} ({anatomy.model_type}) lets texts that share a row see each other; choose packing=padded"
    )


def _strangers(data: TrainingData, shared: Ints, loaded: LoadedModel) -> bool:
    """Whether each text of two rows gives in them what it gives alone.

    The rows: of those with several texts the one with the longest, and the one with the longest text of all, so that
    a lost sliding window shows too.
    """
    allowed = TOLERANCE if loaded.dtype == "float32" else TOLERANCE_16_BIT
    lengths = np.diff(data.encoded.bounds_S1)
    longest = [int(lengths[data.layout.texts(row)].max()) for row in range(data.n_rows)]
    rows = [int(max(shared, key=longest.__getitem__)), int(np.argmax(longest))]
    batch = data.batch(rows).to(loaded.device)
    together_BPD = _outputs(batch, loaded)
    for b, row in enumerate(rows):
        for number, text in enumerate(data.layout.texts(row), start=1):
            ids = data.encoded.ids_T[slice(*data.encoded.bounds_S1[text : text + 2])]
            alone_PD = _alone(ids, loaded)
            difference = together_BPD[b, batch.segments_BP[b] == number].float() - alone_PD
            if difference.norm() > allowed * alone_PD.norm():
                return False
    return True


def _outputs(batch: Batch, loaded: LoadedModel) -> Tensor:
    with torch.inference_mode():
        return loaded.model(**batch.inputs(loaded.family, dtype=loaded.model.dtype))[0]  # type: ignore[no-any-return]


def _alone(ids: NDArray[np.int32], loaded: LoadedModel) -> Tensor:
    """[P, D] outputs of one text, the model being told nothing but its ids."""
    with torch.inference_mode():
        given = torch.from_numpy(ids.astype(np.int64))[None].to(loaded.device)
        return loaded.model(input_ids=given)[0][0].float()  # type: ignore[no-any-return]
