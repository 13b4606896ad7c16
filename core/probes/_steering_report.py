"""What steering did, as tables: each way's continuation, and the next tokens that it moved. It steers nothing.

Legend: R ways to steer (the first is none), V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from core.probes._steered import Continuations, Ways, mean_surprisal
from core.probes._tokens import Encoded, token_texts
from core.types import View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

SHOWN_TOKENS = 15


def ways_table(loaded: LoadedModel, encoded: Encoded, ways: Ways, said: Continuations) -> pd.DataFrame:
    """One row per way to steer: what it says, and how far it is from the unsteered model."""
    log_p_RV = said.logits_RV.log_softmax(-1)
    kl_R = (log_p_RV[0].exp() * (log_p_RV[0] - log_p_RV)).sum(-1).clamp(min=0)
    top = log_p_RV.max(-1)
    assert loaded.tokenizer is not None
    return pd.DataFrame(
        {
            "way": ways.names,
            "strength": ways.strengths,
            "continuation": [loaded.tokenizer.decode(ids) for ids in said.ids],
            "kl_nats": kl_R.cpu().numpy(),
            "next_token": token_texts(loaded.tokenizer, top.indices.tolist()),
            "p_next_token": top.values.exp().cpu().numpy(),
            "surprisal_nats": [mean_surprisal(loaded, encoded, ids) for ids in said.ids],
            "new_tokens": [len(ids) for ids in said.ids],
        }
    )


def changed_tokens(loaded: LoadedModel, before_V: Tensor, after_V: Tensor) -> pd.DataFrame:
    """The next tokens whose probability changes most, the largest change first."""
    p_before_V, p_after_V = before_V.softmax(-1), after_V.softmax(-1)
    ids = (p_after_V - p_before_V).abs().topk(min(2 * SHOWN_TOKENS, len(before_V))).indices
    return pd.DataFrame(
        {
            "token": token_texts(loaded.tokenizer, ids.tolist()),
            "p_change": (p_after_V - p_before_V)[ids].cpu().numpy(),
            "p_before": p_before_V[ids].cpu().numpy(),
            "p_after": p_after_V[ids].cpu().numpy(),
            "logit_before": before_V[ids].cpu().numpy(),
            "logit_after": after_V[ids].cpu().numpy(),
            "logit_change": (after_V - before_V)[ids].cpu().numpy(),
        }
    )


def most_moved(loaded: LoadedModel, logits_RV: Tensor, chosen: int) -> pd.DataFrame:
    """The tokens of the whole vocabulary whose logit rises and falls most, likely or not."""
    change_V = logits_RV[chosen] - logits_RV[0]
    k = min(SHOWN_TOKENS, len(change_V) // 2)
    up, down = change_V.topk(k), (-change_V).topk(k)
    ids = [*up.indices.tolist(), *down.indices.tolist()]
    return pd.DataFrame(
        {
            "token": token_texts(loaded.tokenizer, ids),
            "logit_change": np.concatenate([up.values.cpu().numpy(), -down.values.cpu().numpy()]),
            "moved": ["up"] * k + ["down"] * k,
            "rank": [*range(1, k + 1), *range(1, k + 1)],
        }
    )


VIEWS = (
    View(
        "table",
        x="way",
        y="kl_nats",
        text="continuation",
        title="How the prompt goes on",
        unit="nats",
        tooltip=("next_token", "p_next_token", "surprisal_nats"),
    ),
    View(
        "bar",
        x="token",
        y="p_change",
        frame="tokens",
        title="Change of the next token's probability",
        unit="probability",
        tooltip=("p_before", "p_after", "logit_change"),
    ),
    View(
        "bar",
        x="token",
        y="logit_change",
        color="moved",
        frame="promoted",
        title="Tokens whose logit moves most",
        unit="logit",
    ),
    View(
        "table",
        x="prompt",
        y="side",
        color="list",
        frame="prompts",
        title="Do the two lists separate? Each prompt against the means of the others",
        unit="half distances",
        tooltip=("is_right",),
    ),
)
