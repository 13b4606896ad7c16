"""The experts that a model asks for while it reads prompts and then writes on by itself.

Legend: L MoE layers, T tokens, K slots.

Decoding is real: greedy generation with the model's own cache, token by token, because the experts of a written text
are not those of a text that is read at once. It knows no cache of experts and no statistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.lazy import torch, transformers
from core.probes._routed_text import Texts
from core.routing.lens import Routed, routed
from core.types import Progress

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Session:
    """One prompt and what followed: its experts by block index, [T, K], -1 where a slot was not used."""

    prefill: dict[int, Ints]
    decode: dict[int, Ints]
    written: str


def decode_sessions(
    loaded: LoadedModel,
    texts: Texts,
    progress: Progress,
    *,
    sessions: int,
    prompt_tokens: int,
    new_tokens: int,
) -> list[Session]:
    """Read the beginning of each of the first texts, and write ``new_tokens`` on; hold the lock.

    An end-of-sequence token does not end a session: every trace has its ``new_tokens`` steps. Raises ``BadInput``
    where the model's context has no room, or no text has a token.
    """
    room = loaded.anatomy.context_length - new_tokens
    if room < 1:
        raise BadInput(
            f"new_tokens={new_tokens} leaves no room for a prompt: this model's context is "
            f"{loaded.anatomy.context_length} tokens; write at most {loaded.anatomy.context_length - 1}"
        )
    if texts.prompt is not None:
        prompts = [list(texts.prompt.ids)[-room:]]
    else:
        assert loaded.tokenizer is not None, "the registry's `needs` keep models without tokenizer away"
        limit = min(prompt_tokens, room)
        read = (loaded.tokenizer(text, verbose=False)["input_ids"] for text in texts.texts[:sessions])
        prompts = [ids[:limit] for ids in read if ids]
    if not prompts:
        raise BadInput(f"{texts.name} has no text that becomes a token; give other text")
    found = []
    for number, ids in enumerate(prompts):
        progress(number, len(prompts), f"writing {new_tokens} tokens after prompt {number + 1}")
        found.append(_session(loaded, ids, new_tokens))
    return found


def _session(loaded: LoadedModel, ids: list[int], new_tokens: int) -> Session:
    calls: dict[int, list[Ints]] = {}

    def keep(seen: Routed) -> None:
        calls.setdefault(seen.layer, []).append(seen.experts_TK.cpu().numpy())

    given_1P = torch.tensor([ids], device=loaded.model.device)
    # The last token written is not read any more: one more is asked for, so that as many steps are decoded as wanted.
    configured: Any = transformers.GenerationConfig
    how = configured(
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=loaded.tokenizer.eos_token_id if loaded.tokenizer else None,
    )
    with routed(loaded, keep):
        written = loaded.model.generate(
            given_1P, attention_mask=torch.ones_like(given_1P), generation_config=how
        )
    text = loaded.tokenizer.decode(written[0, len(ids) : -1]) if loaded.tokenizer else ""
    prefill = {layer: parts[0] for layer, parts in calls.items()}
    assert all(len(part) == len(ids) for part in prefill.values()), "the prompt is read in one pass"
    decode = {layer: np.concatenate(parts[1:]) for layer, parts in calls.items()}
    assert all(len(part) == new_tokens for part in decode.values()), "one pass per written token"
    return Session(prefill, decode, text)
