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

TOLERANCE, TOLERANCE_16_BIT = 0.01, 0.05
"""Largest relative difference (of norms) between a text's outputs in a packed row and alone. SmolLM2 differs by 2e-7 in
float32 and 4e-3 in bfloat16 from rounding alone, and by 0.22 where the text sees its neighbour."""
AMONG = 64
"""The row that is tried is the shortest of so many."""


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
    """Whether each text of a short shared row gives in it what it gives alone.

    A mask takes the place of the model's own, so with one the row with the longest text is tried too: a lost sliding
    window shows there only.
    """
    allowed = TOLERANCE if loaded.dtype == "float32" else TOLERANCE_16_BIT
    rows = [min(shared[-AMONG:].tolist(), key=data.length)]
    if data.by_mask:
        lengths = np.diff(data.encoded.bounds_S1)
        first_of_row = data.layout.texts_S[data.layout.bounds_R1[:-1]]  # the longest of its row
        rows.append(int(np.argmax(lengths[first_of_row])))
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
