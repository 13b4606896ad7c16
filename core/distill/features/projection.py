"""From the student's width to the teacher's: one learned matrix for all layers, since a residual stream has one basis.

It starts as the map that takes the student's token embeddings closest to the teacher's (least squares), which needs no
data: a student whose residual dimensions are some of the teacher's starts with exactly those in their places.

Legend: ``V`` tokens, ``S`` student's and ``T`` teacher's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 16_384
RIDGE = 1e-6
"""Added to the diagonal, as a share of its mean: embeddings of fewer tokens than dimensions have a solution too."""


def projection(student: LoadedModel, teacher: LoadedModel) -> Any | None:
    """A trainable matrix [T, S], float32, or None where both are equally wide."""
    if student.anatomy.d_model == teacher.anatomy.d_model:
        return None
    with torch.inference_mode(False), torch.no_grad():
        n = min(student.anatomy.vocab_size, teacher.anatomy.vocab_size)
        ours_VS, theirs_VT = (_embeddings(loaded, n).to(student.device) for loaded in (student, teacher))
        gram_SS = ours_VS.T @ ours_VS
        gram_SS.diagonal().add_(RIDGE * gram_SS.diagonal().mean())
        return torch.nn.Parameter(torch.linalg.solve(gram_SS, ours_VS.T @ theirs_VT).T.contiguous().float())


def _embeddings(loaded: LoadedModel, n: int) -> Tensor:
    """Rows of the first ``n`` tokens' embedding as the stream gets them, evenly spaced where there are very many."""
    weight: Tensor = loaded.model.get_submodule(loaded.anatomy.embedding).weight
    return weight[: n : -(-n // MOST_TOKENS)].double() * loaded.anatomy.embedding_scale
