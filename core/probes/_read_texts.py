"""One vector per layer for each of many texts: the residual stream at its last token, its first, or their mean.

Legend: S layers (embedding, then after each block), N texts, B texts of a batch, P positions, D d_model.

Texts of equal token counts run together, so that nothing is padded: batched numbers are those of one text alone.
Special tokens (BOS, CLS, SEP) count for ``first`` only; a decoder's first position, which sees nothing but itself and is
often an attention sink of a hundred times the usual norm, does not count for the mean. Knows nothing of what the
vectors are for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from core.capture import capture_residual
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.probes._batching import in_batches
from core.probes._tokens import Encoded, encode
from core.types import Progress, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Position = Literal["last", "mean", "first"]
_TOKENS_AT_ONCE = 1024
"""Larger batches are no faster on a processor and leave its caches."""


def read_texts(
    loaded: LoadedModel, texts: Sequence[str], *, position: Position, progress: Progress, message: str
) -> Tensor:
    """Residuals [S, N, D] in float32 on the CPU.

    Raises ``BadInput`` naming a text that is empty or too long, ``SlimscopeError`` when a residual is not finite.
    """
    encoded = [_encode(loaded, text, number) for number, text in enumerate(texts, start=1)]
    of_length: dict[int, list[int]] = defaultdict(list)
    for index, one in enumerate(encoded):
        of_length[one.n_tokens].append(index)
    anatomy = loaded.anatomy
    vectors_SND = torch.empty(anatomy.n_layers + 1, len(texts), anatomy.d_model)
    done = 0
    for length, members in sorted(of_length.items()):
        before = done

        def run(start: int, stop: int, members: list[int] = members, before: int = before) -> int:
            progress(before + start, len(texts), message)
            batch = members[start:stop]
            vectors_SND[:, batch] = residual_vectors(loaded, [encoded[i] for i in batch], position)
            return len(batch)

        per_token = 4 * (16 * anatomy.d_model + 3 * anatomy.d_ff + anatomy.n_heads * length)
        bytes_each = length * per_token + 12 * anatomy.vocab_size
        cached = bytes_each * max(1, _TOKENS_AT_ONCE // length) if loaded.device == "cpu" else None
        counts = in_batches(
            len(members), run, bytes_each=bytes_each, device=loaded.device, at_most_bytes=cached
        )
        done += sum(counts)
    if not torch.isfinite(vectors_SND).all():
        raise SlimscopeError(
            "a residual is not finite (NaN or infinity), so nothing can be learned from it; "
            "open the model in float32, or check its weights"
        )
    return vectors_SND


def residual_vectors(loaded: LoadedModel, batch: Sequence[Encoded], position: Position) -> Tensor:
    """Residuals [S, B, D] in float32 on the CPU, of texts with equally many tokens."""
    inputs = {name: torch.cat([one.inputs[name] for one in batch]) for name in batch[0].inputs}
    weights_BP = torch.stack([_weights(one, position, causal=loaded.anatomy.causal) for one in batch]).to(
        loaded.device
    )

    def reduce(path: str, stream_BPD: Tensor) -> Tensor:
        return torch.einsum("bp,bpd->bd", weights_BP, stream_BPD.float()).cpu()

    # The logits are not wanted: with one position kept, the unembedding of all others is never computed.
    options = {"use_cache": False, "logits_to_keep": 1} if loaded.family == "decoder" else {}
    with loaded.lock, torch.inference_mode(), capture_residual(loaded, reduce=reduce) as residual:
        loaded.model(**inputs, **options)
    return torch.stack(list(residual.values()))


def _weights(encoded: Encoded, position: Position, *, causal: bool) -> Tensor:
    """How much each position counts [P]; sums to 1."""
    ordinary = [p for p, n in enumerate(encoded.n_bytes) if n] or list(range(encoded.n_tokens))
    averaged = [p for p in ordinary if p] if causal and ordinary != [0] else ordinary
    chosen = {"last": ordinary[-1:], "first": [0], "mean": averaged}[position]
    weights_P = torch.zeros(encoded.n_tokens)
    weights_P[chosen] = 1 / len(chosen)
    return weights_P


def _encode(loaded: LoadedModel, text: str, number: int) -> Encoded:
    try:
        return encode(loaded, Prompt(text))
    except BadInput as error:
        raise BadInput(f"text {number} ({text[:40]!r}): {error}") from None
