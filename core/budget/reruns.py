"""A model run again from a later block, on hidden states that were kept: what one changed layer does to the output.

A change in block l leaves all blocks before it as they were. One whole run keeps the residual stream between blocks;
a rerun lets the blocks before l pass their input on unchanged and hands block l what it got then. The model's own
code runs, embeddings and head included, so no family needs special care. The output is compared with the whole run's:
KL of the next token for a decoder, 1 - cosine of the sentence vector for an encoder.

Legend: W windows of equal length, P positions, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.capture import capture_residual
from core.errors import BadInput, CannotMeasure
from core.evaluate._intervals import Bootstrap
from core.evaluate._token_scores import compare_logits
from core.lazy import torch
from core.types import Documents

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
FEWEST = 2
DRAWS = 1000
INTERVAL = f"bootstrap over windows of different documents, {DRAWS} draws, expanded percentile"
AT_ONCE = 2048
"""Tokens that run together: more are no faster on a processor."""


def equal_windows(loaded: LoadedModel, documents: Documents, *, samples: int, sample_tokens: int) -> Tensor:
    """The beginnings [W, P] of the first documents that are long enough, one window each: independent samples.

    Raises ``BadInput`` saying how much text there is and how much is wanted.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None, "the registry's `needs` keep models without tokenizer away"
    size = min(sample_tokens, loaded.anatomy.context_length)
    rows: list[list[int]] = []
    for text in documents.texts:
        ids = tokenizer(text, truncation=True, max_length=size)["input_ids"]
        if len(ids) == size:
            rows.append(ids)
        if len(rows) == samples:
            break
    if len(rows) < FEWEST:
        raise BadInput(
            f"{documents.name} has {len(rows)} documents of {size} tokens or more, and at least {FEWEST} are needed; "
            "give longer text, or fewer sample_tokens"
        )
    return torch.tensor(rows, device=loaded.model.device)


def output_of(loaded: LoadedModel, ids_BP: Tensor) -> Tensor:
    """Logits [B, P, V] of a decoder; unit sentence vectors [B, D] of an encoder."""
    if loaded.family == "decoder":
        logits: Tensor = loaded.model(input_ids=ids_BP, use_cache=False).logits
        return logits
    mask_BP = torch.ones_like(ids_BP)
    tokens_BPD = loaded.model.base_model(input_ids=ids_BP, attention_mask=mask_BP).last_hidden_state
    pooled_BD = tokens_BPD[:, 0] if loaded.pooling == "cls" else tokens_BPD.mean(1)
    return torch.nn.functional.normalize(pooled_BD.float(), dim=-1)


def bytes_per_token(loaded: LoadedModel, ids_WP: Tensor) -> float | None:
    """UTF-8 bytes of text per token of these windows; None for an encoder, which predicts none."""
    if loaded.family != "decoder":
        return None
    texts = loaded.tokenizer.batch_decode(ids_WP, skip_special_tokens=True)  # type: ignore[union-attr]
    return sum(len(text.encode()) for text in texts) / ids_WP.numel()


class Reruns:
    """The whole run of some windows, and reruns from any block, compared with it. Hold the model's lock throughout."""

    def __init__(self, loaded: LoadedModel, ids_WP: Tensor) -> None:
        self._loaded = loaded
        size = max(1, AT_ONCE // ids_WP.shape[1])
        self._batches = torch.split(ids_WP, size)
        self._residuals: list[list[Tensor]] = []
        """Per batch, what enters each block and what leaves the last."""
        self._outputs: list[Tensor] = []
        self._bootstrap = Bootstrap(len(ids_WP), draws=DRAWS, seed=0, unit="windows of different documents")
        self._tuples = _returns_tuple(loaded)
        for ids_BP in self._batches:
            with torch.inference_mode(), capture_residual(loaded) as residual:
                self._outputs.append(output_of(loaded, ids_BP))
            self._residuals.append(list(residual.values()))

    def summed_up(self, loss_W: Floats) -> dict[str, float | None]:
        """The mean ``loss`` over windows with its 95 % interval ``loss_low`` to ``loss_high``, None below eight windows."""
        found = self._bootstrap.ratio(loss_W, np.ones_like(loss_W))
        return {"loss": float(loss_W.mean()), "loss_low": found.low, "loss_high": found.high}

    def loss_W(self, layer: int) -> Floats:
        """Mean loss per window against the whole run, of the model as it is now, begun at block ``layer``.

        ``layer`` n_layers reruns the head alone. Raises ``CannotMeasure`` where the output is not finite.
        """
        return self._losses(layer, ())

    def loss_without_W(self, layer: int) -> Floats:
        """The same without block ``layer``: its input is passed on."""
        return self._losses(layer, (layer,))

    def _losses(self, layer: int, left_out: Sequence[int]) -> Floats:
        found = []
        for ids_BP, residuals, before in zip(self._batches, self._residuals, self._outputs, strict=True):
            with torch.inference_mode(), self._begun_at(layer, residuals, left_out):
                after = output_of(self._loaded, ids_BP)
            found.append(self._compared(before, after))
        loss_W = np.concatenate(found)
        if not np.isfinite(loss_W).all():
            raise CannotMeasure("the changed model's output is not finite; open the model in float32")
        return loss_W

    def _compared(self, before: Tensor, after: Tensor) -> Floats:
        if self._loaded.family != "decoder":
            # Half the squared distance of unit vectors is 1 - cosine, without its cancellation.
            apart_B = (before - after).double().square().sum(-1) / 2
            return np.asarray(apart_B.cpu().numpy())
        n_windows, n_positions, _ = before.shape
        targets_N = torch.zeros(n_windows * n_positions, dtype=torch.long, device=before.device)
        scores = compare_logits(before.flatten(0, 1), after.flatten(0, 1), targets_N)
        return np.asarray(scores.kl.reshape(n_windows, n_positions).mean(1))

    @contextmanager
    def _begun_at(self, layer: int, residuals: Sequence[Tensor], left_out: Sequence[int]) -> Iterator[None]:
        """Blocks before ``layer`` pass on; the last of them gives what ``layer`` got in the whole run."""
        model, blocks = self._loaded.model, self._loaded.anatomy.blocks
        with ExitStack() as stack:
            for index in {*range(layer), *left_out}:
                given = residuals[layer] if index == layer - 1 else None
                module = model.get_submodule(blocks[index].path)
                stack.enter_context(_forward_of(module, _pass_on(given, as_tuple=self._tuples)))
            yield


def _pass_on(given: Tensor | None, *, as_tuple: bool) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if given is None else given
        return (hidden,) if as_tuple else hidden

    return forward


@contextmanager
def _forward_of(module: Any, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _returns_tuple(loaded: LoadedModel) -> bool:
    """Whether this model's blocks return (hidden, …) rather than the hidden state itself."""
    found: list[bool] = []
    block = loaded.model.get_submodule(loaded.anatomy.blocks[0].path)
    handle = block.register_forward_hook(lambda module, args, output: found.append(isinstance(output, tuple)))
    try:
        ids_12 = torch.ones((1, 2), dtype=torch.long, device=loaded.model.device)
        with torch.inference_mode():
            loaded.model(input_ids=ids_12)
    finally:
        handle.remove()
    return found[0]
