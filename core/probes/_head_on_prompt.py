"""One head on one prompt: the scores of its pairs of positions, and what it writes, read as tokens.

Legend: P positions, H heads, K head_dim, D d_model, V vocabulary, R rows unembedded at once.

Every look rebuilds the layer's scores and the sum of its heads, and keeps how far either is from the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from core.capture import capture
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.probes import _head_circuit as circuit
from core.probes._distribution import rows_at_once
from core.probes._head_weights import dense_weight
from core.probes._norm_fold import freeze
from core.probes._recording import Recording, record
from core.probes._tokens import Encoded, token_texts

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Source = Literal["stream", "embedding"]
"""What a value is read from: the residual stream as the head sees it, or the source token's embedding alone."""
MAX_SOURCES = 256
"""Source positions that are read as tokens, those with the largest weight."""


@dataclass(frozen=True)
class HeadOnPrompt:
    """The chosen layer on the prompt."""

    layer: int
    recording: Recording
    scores_PP: np.ndarray
    """The chosen head's, rebuilt."""
    visible_PP: np.ndarray
    pattern_PP: np.ndarray
    written_PD: Tensor
    """v · W_O of the chosen head per source position, before any norm behind attention."""
    attention_PD: Tensor
    """What the output projection gave."""
    scores_gap: float
    heads_gap: float


def observe(loaded: LoadedModel, encoded: Encoded, *, layer: int, head: int, source: Source) -> HeadOnPrompt:
    """One forward pass; the layer's scores rebuilt and compared, and the heads' writes summed and compared."""
    model, anatomy = loaded.model, loaded.anatomy
    block = anatomy.blocks[layer]
    with (
        eager_attention(model),
        circuit.softmax_inputs(anatomy.n_heads, encoded.n_tokens) as handed,
        capture(model, [block.o]) as output,
    ):
        recording = record(loaded, encoded.inputs, ("attention_out",))
    captured_HPP = handed[layer][0]
    read_PD = circuit.read_by(model, block, recording.at("residual", layer))
    visible_PP = recording.masks[layer][0, 0] == 0
    rebuilt_HPP = circuit.rebuilt_scores(model, anatomy, block, read_PD, recording)
    pattern_HPP = captured_HPP.softmax(-1, dtype=torch.promote_types(captured_HPP.dtype, torch.float32))
    v_PHK = circuit.values(model, anatomy, block, read_PD)
    o_HKD = dense_weight(model.get_submodule(block.o)).view(anatomy.n_heads, anatomy.head_dim, -1)
    mixed_PHK = torch.einsum("hqk,khd->qhd", pattern_HPP, v_PHK.to(pattern_HPP.dtype))
    summed_PD = torch.einsum("qhk,hkd->qd", mixed_PHK, o_HKD)
    bias_D = model.get_submodule(block.o).bias
    attention_PD = output[block.o].reshape(summed_PD.shape)
    off_PD = summed_PD + (0 if bias_D is None else bias_D) - attention_PD
    if source == "embedding":
        ids_P = torch.tensor(encoded.ids, device=loaded.device)
        embedded_PD = model.get_submodule(anatomy.embedding).weight[ids_P] * anatomy.embedding_scale
        v_PHK = circuit.values(model, anatomy, block, circuit.read_by(model, block, embedded_PD))
    return HeadOnPrompt(
        layer,
        recording,
        rebuilt_HPP[head].float().cpu().numpy(),
        visible_PP.cpu().numpy(),
        pattern_HPP[head].float().cpu().numpy(),
        v_PHK[:, head].to(o_HKD.dtype) @ o_HKD[head],
        attention_PD,
        circuit.scores_gap(rebuilt_HPP, captured_HPP, visible_PP),
        float(off_PD.abs().max() / attention_PD.abs().max()),
    )


def ov_frames(
    loaded: LoadedModel, encoded: Encoded, seen: HeadOnPrompt, query: int, *, top_k: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Per source position what the head promotes when it looks there; and each one's top tokens."""
    shown = np.argsort(-seen.pattern_PP[query], kind="stable")[: min(MAX_SOURCES, encoded.n_tokens)]
    pulled_PD = _to_unembedding(loaded, seen, query)[torch.as_tensor(shown.copy(), device=loaded.device)]
    weight_DV = dense_weight(loaded.model.get_submodule(str(loaded.anatomy.unembedding)))
    own_P = torch.tensor([encoded.ids[position] for position in shown], device=loaded.device)
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("ids", "logits", "low_ids", "low", "own", "rank")
    }
    step = rows_at_once(loaded.anatomy.vocab_size)
    for first in range(0, len(shown), step):
        logits_RV = (pulled_PD[first : first + step] @ weight_DV).float() * loaded.anatomy.logit_scale
        logits_RV -= logits_RV.mean(-1, keepdim=True)
        top, low = logits_RV.topk(top_k), logits_RV.topk(1, largest=False)
        own_R1 = logits_RV.gather(-1, own_P[first : first + step, None])
        columns["ids"].append(top.indices)
        columns["logits"].append(top.values)
        columns["low_ids"].append(low.indices[:, 0])
        columns["low"].append(low.values[:, 0])
        columns["own"].append(own_R1[:, 0])
        columns["rank"].append(1 + (logits_RV > own_R1).sum(-1))
    found = {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}
    texts = np.array(encoded.texts, dtype=object)
    weight = seen.pattern_PP[query][shown]
    sources = pd.DataFrame(
        {
            "source": shown,
            "source_token": texts[shown],
            "weight": weight,
            "promoted": token_texts(loaded.tokenizer, found["ids"][:, 0].tolist()),
            "promoted_logit": found["logits"][:, 0],
            "effect": weight * found["logits"][:, 0],
            "own_logit": found["own"],
            "own_rank": found["rank"],
            "suppressed": token_texts(loaded.tokenizer, found["low_ids"].tolist()),
            "suppressed_logit": found["low"],
        }
    )
    k = top_k
    promoted = pd.DataFrame(
        {
            "source": np.repeat(shown, k),
            "source_token": np.repeat(texts[shown], k),
            "rank": np.tile(np.arange(1, k + 1), len(shown)),
            "token": token_texts(loaded.tokenizer, found["ids"].ravel().tolist()),
            "logit": found["logits"].ravel(),
        }
    )
    return sources, promoted


def _to_unembedding(loaded: LoadedModel, seen: HeadOnPrompt, query: int) -> Tensor:
    """The head's writes [P, D] as the unembedding meets them: through the norms that follow, frozen at the query."""
    model, anatomy = loaded.model, loaded.anatomy
    final_D = seen.recording.at("residual", anatomy.n_layers)[query]
    rows_PD = seen.written_PD.double() * anatomy.residual_scale
    steps: list[tuple[str, Tensor, Tensor]] = []
    if anatomy.norm_place == "sandwich":
        path = anatomy.blocks[seen.layer].attention_write
        after_D = seen.recording.at("attention_out", seen.layer)[query]
        steps.append((path, seen.attention_PD[query], after_D))
    if anatomy.final_norm is not None:
        norm = model.get_submodule(anatomy.final_norm)
        steps.append((anatomy.final_norm, final_D, norm(final_D)))
    for path, fed_D, output_D in steps:
        frozen = freeze(
            model.get_submodule(path), path, offset=anatomy.norm_offset, fed_D=fed_D, output_D=output_D
        )
        rows_PD = rows_PD - rows_PD.mean(-1, keepdim=True) if frozen.centred else rows_PD
        rows_PD = rows_PD * frozen.scale_D
    return rows_PD.to(seen.written_PD.dtype)


def pair_frame(encoded: Encoded, seen: HeadOnPrompt, *, pairs: int, skip_first: bool) -> pd.DataFrame:
    """The best matching pairs of positions, by score above the mean of what the query sees."""
    allowed_PP = seen.visible_PP.copy()
    if skip_first and encoded.n_tokens > 1:
        allowed_PP[:, 0] = False
    mean_P1 = np.where(seen.visible_PP, seen.scores_PP, 0).sum(1, keepdims=True)
    mean_P1 = mean_P1 / seen.visible_PP.sum(1, keepdims=True)
    over_PP = np.where(allowed_PP, seen.scores_PP - mean_P1, -np.inf)
    n = min(pairs, int(allowed_PP.sum()))
    query, key = np.unravel_index(np.argsort(-over_PP, axis=None, kind="stable")[:n], over_PP.shape)
    texts = np.array(encoded.texts, dtype=object)
    return pd.DataFrame(
        {
            "query": query,
            "query_token": texts[query],
            "key": key,
            "key_token": texts[key],
            "above_row_mean": over_PP[query, key],
            "score": seen.scores_PP[query, key],
            "weight": seen.pattern_PP[query, key],
        }
    )
