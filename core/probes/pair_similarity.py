"""Pair similarity: which tokens make two texts similar to a sentence encoder.

Legend: A, B tokens of the first and second text, D d_model.

The decomposition is exact for what a token's final vector adds; that vector has already mixed with its neighbours, so
every token is also left out in turn, which is exact too and answers another question.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import NeedsInput, SlimscopeError
from core.lazy import torch
from core.models.embed import embed
from core.probes._batching import in_batches
from core.probes._provenance import provenance
from core.probes._tokens import MAX_CELLS, MAX_TOKENS, Encoded, encode
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]


class PairSimilaritySettings(Settings):
    """How much is computed beside the decomposition."""

    leave_out: bool = Field(True, description="Also leave each token out in turn: one forward pass per token")
    special_tokens: bool = Field(True, description="Show special tokens; they count in the sum in any case")


def _cost(anatomy: Anatomy, n_tokens: int, settings: PairSimilaritySettings) -> Cost:
    return Cost(forwards=4 + (n_tokens if settings.leave_out else 0))


@method(
    "probe",
    title="Pair similarity",
    needs=["encoder", "text"],
    paper="https://arxiv.org/abs/1908.10084",
    answers="Why this token?",
    examples=(
        Example(
            "Similar words, other meaning",
            Prompt("The bank raised its interest rates.", "We sat on the bank of the river."),
        ),
        Example("Other words, similar meaning", Prompt("A man is eating food.", "Someone has lunch.")),
    ),
    cost=_cost,
)
def pair_similarity(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: PairSimilaritySettings
) -> Result:
    """Split the cosine similarity of two texts into contributions of their tokens.

    A sentence vector is the mean of token vectors (or the class token's), so the cosine is a sum over pairs of tokens,
    cos = Σ_ij a_i · b_j / (n · m · ‖ā‖ ‖b̄‖): each pair's term is exact, and a token's contribution is its row's sum. Token
    vectors have seen their whole sentence, so each token is also left out in turn (no other token sees it, and it is not in
    the mean): the effect is cos − cos without it. A large contribution with a small effect means that other tokens carry
    the same content.
    """
    started = time.perf_counter()
    first, second = _both(loaded, prompt)
    texts = (prompt.text, str(prompt.second))
    with loaded.lock, torch.inference_mode():
        sides = [_Side.of(loaded, encoded) for encoded in (first, second)]
        terms_AB = sides[0].share_AD @ sides[1].share_AD.T
        cosine = float(terms_AB.sum())
        known = embed(loaded, texts, max_tokens=MAX_TOKENS).double()
        effects: list[Floats | None] = [None, None]
        if settings.leave_out:
            total = sum(len(side.words) for side in sides)
            for index, (side, other) in enumerate((sides, sides[::-1])):
                began = index * len(sides[0].words) / total
                ends = began + len(side.words) / total
                reported = part_of(progress, began, ends)
                effects[index] = cosine - _cosines_without(loaded, side, other, reported)
    frames = {"main": pd.DataFrame()}
    for name, index in (("first", 0), ("second", 1)):
        frames[name] = _token_frame(sides[index], terms_AB.sum(1 - index), effects[index], name, settings)
    main = pd.concat([frames["first"], frames["second"]], ignore_index=True)
    frames["main"] = main.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)
    shows_map = terms_AB.size <= MAX_CELLS
    if shows_map:
        frames["pairs"] = _pair_frame(sides, terms_AB, settings)
    return Result(
        frames=frames,
        views=_views(settings, shows_map=shows_map),
        metrics=_metrics(cosine, sides, terms_AB, main),
        provenance=provenance(
            loaded,
            prompt,
            method="pair_similarity",
            settings=settings,
            started=started,
            conditions={
                "tokens": [first.n_tokens, second.n_tokens],
                "pooling": loaded.pooling,
            },
            exactness_gap=abs(cosine - float(known[0] @ known[1])),
            exactness_check="|Σ contributions − cosine of the two sentence vectors made in one batch|",
        ),
        notes=_notes(loaded, shows_map=shows_map),
    )


@dataclass(frozen=True)
class _Side:
    """One text: its tokens' shares of the unit sentence vector, which is their sum."""

    encoded: Encoded
    pool_A: Tensor
    share_AD: Floats
    words: tuple[int, ...]
    """Positions of tokens that stand for text, not special ones."""

    @classmethod
    def of(cls, loaded: LoadedModel, encoded: Encoded) -> _Side:
        """Run the encoder on one text."""
        vectors_AD = loaded.model.base_model(**encoded.inputs).last_hidden_state[0].double()
        pool_A = _pooling(loaded, encoded)
        pooled_D = pool_A.double() @ vectors_AD
        if not pooled_D.isfinite().all() or not float(pooled_D.norm()):
            raise SlimscopeError(
                "the sentence vector is zero or not finite (NaN or infinity), so it has no cosine; "
                "open the model in float32, or check its weights"
            )
        share_AD = (pool_A.double()[:, None] * vectors_AD / pooled_D.norm()).cpu().numpy()
        words = tuple(n for n, n_bytes in enumerate(encoded.n_bytes) if n_bytes)  # [UNK] stands for text too
        return cls(encoded, pool_A, share_AD, words)

    @property
    def unit_D(self) -> Floats:
        """The sentence vector, of length 1."""
        vector_D: Floats = self.share_AD.sum(0)
        return vector_D


def _pooling(loaded: LoadedModel, encoded: Encoded) -> Tensor:
    """Weight [A] of each token's vector in the sentence vector."""
    weight_A = torch.zeros(encoded.n_tokens, device=loaded.model.device)
    if loaded.pooling == "cls":
        weight_A[0] = 1
        return weight_A
    return weight_A + 1 / encoded.n_tokens


def _both(loaded: LoadedModel, prompt: Prompt) -> tuple[Encoded, Encoded]:
    if prompt.second is None or not prompt.second.strip():
        raise NeedsInput("a similarity needs two texts; type the second one too")
    return encode(loaded, Prompt(prompt.text, image=prompt.image)), encode(loaded, Prompt(prompt.second))


def _cosines_without(loaded: LoadedModel, side: _Side, other: _Side, progress: Progress) -> Floats:
    """Cosine with each of the side's words unseen by all others and out of the mean."""
    n, words = side.encoded.n_tokens, side.words
    unit_D = torch.tensor(other.unit_D, device=loaded.model.device)
    each = 4 * n * (8 * loaded.anatomy.d_model + 2 * loaded.anatomy.d_ff + loaded.anatomy.n_heads * n)

    def run(start: int, stop: int) -> Floats:
        progress(start, len(words), "leaving out one token at a time")
        seen_WA = torch.ones(stop - start, n, dtype=torch.long, device=loaded.model.device)
        seen_WA[torch.arange(stop - start), list(words[start:stop])] = 0
        inputs = {name: values.expand(stop - start, -1) for name, values in side.encoded.inputs.items()}
        vectors_WAD = loaded.model.base_model(**{**inputs, "attention_mask": seen_WA}).last_hidden_state
        pooled_WD = torch.einsum("wa,wad->wd", (side.pool_A * seen_WA).double(), vectors_WAD.double())
        return np.asarray((pooled_WD @ unit_D / pooled_WD.norm(dim=-1)).cpu().numpy())

    found = in_batches(len(words), run, bytes_each=each, device=loaded.device, at_most_bytes=64 << 20)
    return np.concatenate(found)


def _token_frame(
    side: _Side, contribution_A: Floats, effect: Floats | None, name: str, settings: PairSimilaritySettings
) -> pd.DataFrame:
    """One row per token of one text."""
    frame = pd.DataFrame(
        {
            "text": name,
            "position": np.arange(side.encoded.n_tokens),
            "token": side.encoded.texts,
            "special": [n not in set(side.words) for n in range(side.encoded.n_tokens)],
            "contribution": contribution_A,
        }
    )
    if effect is not None:
        frame["effect_of_leaving_out"] = pd.Series(effect, index=list(side.words))
    return frame if settings.special_tokens else frame[~frame["special"]].reset_index(drop=True)


def _pair_frame(sides: list[_Side], terms_AB: Floats, settings: PairSimilaritySettings) -> pd.DataFrame:
    """One row per pair of tokens."""
    rows, columns = (
        list(range(side.encoded.n_tokens)) if settings.special_tokens else list(side.words) for side in sides
    )
    first, second = (np.array(side.encoded.texts, dtype=object) for side in sides)
    a, b = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
    return pd.DataFrame(
        {
            "first": a,
            "second": b,
            "first_token": first[a],
            "second_token": second[b],
            "contribution": terms_AB[a, b],
        }
    )


def _metrics(cosine: float, sides: list[_Side], terms_AB: Floats, main: pd.DataFrame) -> tuple[Metric, ...]:
    special = [[n for n in range(side.encoded.n_tokens) if n not in set(side.words)] for side in sides]
    by_words = float(terms_AB[np.ix_(sides[0].words, sides[1].words)].sum())
    found = [
        Metric("cosine", cosine, "cosine"),
        Metric("from_words", by_words, "cosine", n=len(sides[0].words) * len(sides[1].words)),
        Metric("from_special_tokens", cosine - by_words, "cosine", n=sum(map(len, special))),
    ]
    agreement = _rank_correlation(main)
    if agreement is not None:
        found.append(Metric("rank_agreement", agreement, "correlation", n=int((~main["special"]).sum())))
    return tuple(found)


def _rank_correlation(main: pd.DataFrame) -> float | None:
    """Spearman's correlation of contribution and effect over words; None where it is not defined."""
    if "effect_of_leaving_out" not in main:
        return None
    words = main.loc[~main["special"], ["contribution", "effect_of_leaving_out"]]
    ranks = words.rank()
    if len(words) < 3 or (ranks.nunique() < 2).any():
        return None
    return float(np.corrcoef(ranks.to_numpy().T)[0, 1])


def _notes(loaded: LoadedModel, *, shows_map: bool) -> tuple[str, ...]:
    found = [
        "Contributions over both texts' special tokens included sum to the cosine, for each text by itself."
    ]
    if loaded.pooling == "cls":
        found.append(
            "This encoder's sentence vector is its class token's alone: only the effects of leaving out speak of words."
        )
    if not shows_map:
        found.append(
            f"The map of token pairs has more than {MAX_CELLS:,} cells and is left out; shorten the texts."
        )
    return tuple(found)


def _views(settings: PairSimilaritySettings, *, shows_map: bool) -> tuple[View, ...]:
    tooltip = ("effect_of_leaving_out",) if settings.leave_out else ()
    strips = tuple(
        View(
            "tokens",
            x="position",
            color="contribution",
            text="token",
            frame=name,
            title=f"Contribution of each token of the {name} text to the cosine",
            unit="cosine",
            midpoint=0.0,
            tooltip=tooltip,
        )
        for name in ("first", "second")
    )
    pairs = View(
        "heatmap",
        x="second",
        y="first",
        color="contribution",
        frame="pairs",
        title="Contribution of each pair of tokens",
        unit="cosine",
        midpoint=0.0,
        tooltip=("first_token", "second_token"),
    )
    ranked = View(
        "table", x="position", y="contribution", text="token", title="Ranked", tooltip=("text", *tooltip)
    )
    return (*strips, pairs, ranked) if shows_map else (*strips, ranked)
