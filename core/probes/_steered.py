"""A decoder run with its residual stream steered, every row of a batch in its own way, and its greedy continuation.

Legend: R rows, P positions, D d_model, V vocabulary. Knows nothing of where a direction comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.capture import capture
from core.intervene import intervene
from core.lazy import torch
from core.probes._tokens import Encoded
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@contextmanager
def add_vectors(loaded: LoadedModel, vectors_RD: Tensor, *, layer: int) -> Iterator[None]:
    """Add row r's vector to every position of the residual stream after ``layer`` blocks; rows of zeros change nothing."""
    blocks = loaded.anatomy.blocks
    path, inputs = (blocks[0].path, True) if layer == 0 else (blocks[layer - 1].path, False)

    def add(path: str, stream_RPD: Tensor) -> Tensor:
        return stream_RPD + vectors_RD[:, None].to(stream_RPD.dtype)

    with intervene(loaded.model, [path], add, inputs=inputs):
        yield


@contextmanager
def remove_directions(loaded: LoadedModel, units_RD: Tensor) -> Iterator[None]:
    """Keep row r's unit vector out of the residual stream (Arditi et al. 2024); a row of zeros is left as it is.

    x − r̂ r̂ᵀ x is applied to the embedding and to all that attention and MLPs write, so that no layer ever meets the
    direction: the same as removing it from every weight that writes to the stream.
    """
    blocks = loaded.anatomy.blocks
    writes = [path for block in blocks for path in (block.attention_write, block.mlp_write)]

    def project(path: str, written: Tensor) -> Tensor:
        rows_RPD = written.reshape(len(units_RD), -1, units_RD.shape[-1])  # OPT's MLP flattens positions
        unit_R1D = units_RD[:, None].to(written.dtype)
        along_RP1 = (rows_RPD * unit_R1D).sum(-1, keepdim=True)
        return (rows_RPD - along_RP1 * unit_R1D).reshape(written.shape)

    with ExitStack() as both:
        both.enter_context(intervene(loaded.model, [blocks[0].path], project, inputs=True))
        both.enter_context(intervene(loaded.model, writes, project))
        yield


@dataclass(frozen=True)
class Ways:
    """The batch: how each row is steered."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    vectors_RD: Tensor
    """What is added (``add``), or the unit vector that is removed (``ablate``)."""
    chosen: int
    """The row at the strength that was asked for."""


@dataclass(frozen=True)
class Continuations:
    """What every row says next."""

    logits_RV: Tensor
    """Of the first new token, float32."""
    final_RPD: Tensor
    """The residual stream of the prompt after the last block, before the final norm."""
    ids: list[list[int]]
    """New tokens per row, up to but without the end of text."""


def continue_greedily(
    loaded: LoadedModel, encoded: Encoded, n_rows: int, *, max_new_tokens: int, progress: Progress
) -> Continuations:
    """Continue the prompt ``n_rows`` times at once, always by the likeliest token; steering is the caller's block."""
    model, last = loaded.model, loaded.anatomy.blocks[-1].path
    ends = _end_tokens(loaded)
    ids_RP = encoded.inputs["input_ids"].expand(n_rows, -1)
    new: list[list[int]] = [[] for _ in range(n_rows)]
    open_rows = set(range(n_rows))
    with capture(model, [last]) as residual:
        output = model(ids_RP, use_cache=True, logits_to_keep=1)
    logits_RV = output.logits[:, -1].float()
    first_RV = logits_RV
    for step in range(max_new_tokens):
        progress(step, max_new_tokens, f"token {step + 1} of {max_new_tokens}")
        next_R = logits_RV.argmax(-1)
        for row in tuple(open_rows):
            token = int(next_R[row])
            if token in ends:
                open_rows.discard(row)
            else:
                new[row].append(token)
        if not open_rows or step == max_new_tokens - 1:
            break
        output = model(
            next_R[:, None], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1
        )
        logits_RV = output.logits[:, -1].float()
    return Continuations(first_RV, residual[last], new)


def mean_surprisal(loaded: LoadedModel, encoded: Encoded, new: list[int]) -> float:
    """Nats per token that a continuation costs the model as it is now; 0.0 for an empty one."""
    if not new:
        return 0.0
    ids_1P = torch.tensor([[*encoded.ids, *new]], device=loaded.device)
    logits_PV = loaded.model(ids_1P, use_cache=False, logits_to_keep=len(new) + 1).logits[0, :-1].float()
    targets = torch.tensor(new, device=loaded.device)
    return float(torch.nn.functional.cross_entropy(logits_PV, targets))


def _end_tokens(loaded: LoadedModel) -> set[int]:
    """Ids that end a text, from the model's generation config or its tokenizer."""
    config: Any = getattr(loaded.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None and loaded.tokenizer is not None:
        ends = loaded.tokenizer.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {ends}
