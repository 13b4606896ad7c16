"""Expert vocabulary: the tokens an expert is for, as they come in and as the model predicts them.

Legend: G groups of documents, L MoE layers, T tokens, V tokens of the vocabulary seen often enough, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    Counted,
    chosen_place,
    conservation_gap,
    count_choices,
    counted_by,
    layer_by_expert,
    share_ends,
    shown_layers,
    shown_note,
    text_flags,
    text_notes,
    text_provenance,
)
from core.probes._tokens import token_texts
from core.registry import Example, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats, Ints

RANKED = 100
SHUFFLES = 3
Reads = Literal["input", "predicted"]
KINDS: dict[Reads, str] = {"input": "token that comes in", "predicted": "token that the model predicts"}


class ExpertVocabularySettings(TextSettings):
    """Whose vocabulary, of which tokens, on what text."""

    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) of the expert; -1: the layer that knows tokens best",
    )
    expert: int = Field(
        -1, ge=-1, le=4096, description="Expert whose tokens are listed; -1: the layer's pickiest"
    )
    reads: Reads = Field(
        "input", description="Tokens that come in at a position, or those the model itself predicts there"
    )
    min_count: int = Field(10, ge=2, le=1000, description="Tokens seen less often are left out")
    max_tokens: int = Field(8192, ge=64, le=65_536, description="Tokens of the text that are read at most")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that were seen often enough, and where; counts are made layer by layer, all at once would not fit."""

    choices: Choices
    token_V: Ints
    """Token ids."""
    place_T: Ints
    """Which of them each position holds; -1 for one that is too rare."""

    @classmethod
    def of(cls, choices: Choices, token_T: Ints, *, min_count: int) -> Vocabulary:
        """Find the tokens to count; raises ``BadInput`` where none is seen often enough."""
        ids, number_T, counts = np.unique(token_T, return_inverse=True, return_counts=True)
        often = counts >= min_count
        if not often.any():
            raise BadInput(
                f"no token is seen {min_count} times in {len(token_T)} tokens; read more tokens, or lower min_count"
            )
        return cls(choices, ids[often], np.where(often, np.cumsum(often) - 1, -1)[number_T])

    def shuffled(self, generator: np.random.Generator) -> Vocabulary:
        """The same tokens at other positions: what is left of a specialisation is chance."""
        return Vocabulary(self.choices, self.token_V, generator.permutation(self.place_T))

    @property
    def seen_GV(self) -> Ints:
        """Occurrences of each token, by group of documents."""
        cell_T, n_groups = self._cells()
        seen = np.bincount(cell_T, minlength=n_groups * len(self.token_V))
        return seen.reshape(n_groups, -1)

    def routed_GVE(self, place: int) -> Ints:
        """Of those, the ones that each expert of one layer was given."""
        cell_T, n_groups = self._cells()
        chosen_1TK = self.choices.experts_LTK[place : place + 1, self.place_T >= 0]
        counted = counted_by(chosen_1TK, cell_T, n_groups * len(self.token_V), self.choices.n_experts)
        return counted.reshape(n_groups, len(self.token_V), -1)

    def _cells(self) -> tuple[Ints, int]:
        """Number of (group, token) of each counted position, and how many groups there are."""
        group_T = self.choices.group_T
        kept_T = self.place_T >= 0
        return group_T[kept_T] * len(self.token_V) + self.place_T[kept_T], int(group_T.max()) + 1

    def specialisation(self) -> Counted:
        """Per layer the mean over tokens of the largest share P(e | t) that one expert gets."""
        seen_GV1 = self.seen_GV[..., None]
        found = [
            Counted.of(np.concatenate([self.routed_GVE(place), seen_GV1], axis=-1), _mean_largest_share)
            for place in range(len(self.choices.layers))
        ]
        return Counted(
            np.array([one.value for one in found]), np.array([one.half for one in found]), len(seen_GV1)
        )


def _mean_largest_share(both_BVX: Any) -> Floats:
    """Mean over tokens of max_e routed / seen; ``seen`` is the last column. A token without occurrence is left out."""
    seen_BV = both_BVX[..., -1]
    share_BV = both_BVX[..., :-1].max(-1) / np.maximum(seen_BV, 1)
    mean_B: Floats = (share_BV * (seen_BV > 0)).sum(-1) / (seen_BV > 0).sum(-1)
    return mean_B


@method(
    "probe",
    title="Expert vocabulary",
    needs=["moe", "decoder", "text"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("The pickiest expert of all kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example(
            "By what the model predicts",
            Prompt("(the text is read; the prompt is not)"),
            {"reads": "predicted"},
        ),
        Example(
            "The first layer on Python",
            Prompt("(the text is read; the prompt is not)"),
            {"text": "domain:python", "layer": 0},
        ),
    ),
    cost=text_cost,
)
def expert_vocabulary(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertVocabularySettings
) -> Result:
    """List the tokens an expert is for, and say how much experts are for tokens at all.

    P(e | t) is the share of token t's occurrences that expert e was given, among tokens seen at least 10 times; a router
    that knew nothing of tokens would give the expert's load. A layer's vocabulary specialisation is the mean over tokens of the
    largest P(e | t) (Muennighoff et al. 2024), for tokens that come in and for those the model predicts at the same
    position. As the largest of several shares is high by chance too, the same is computed with tokens shuffled among positions.
    The interval of a token is the wider of that over documents and Wilson's.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens, predicted=True)
    assert choices.predicted_T is not None
    if settings.expert >= choices.n_experts:
        raise BadInput(f"expert {settings.expert} does not exist; there are 0 to {choices.n_experts - 1}")
    ids: dict[Reads, Ints] = {"input": choices.ids_T, "predicted": choices.predicted_T}
    vocabularies = {
        name: Vocabulary.of(choices, ids_T, min_count=settings.min_count) for name, ids_T in ids.items()
    }
    layers = _layers(choices, vocabularies)
    load_LE = count_choices(choices).sum(0)
    chosen = vocabularies[settings.reads]
    cells = expert_table(chosen, load_LE, choices, loaded)
    known = layers[layers["series"] == KINDS[settings.reads]].reset_index(drop=True)
    place = chosen_place(
        settings.layer, choices.layers, int((known["largest_share"] - known["shuffled"]).to_numpy().argmax())
    )
    of_layer = cells[cells["layer"] == choices.layers[place]]
    expert = int(of_layer["picky"].to_numpy().argmax()) if settings.expert < 0 else settings.expert
    mapped = shown_layers(choices.layers, choices.n_experts)
    return Result(
        frames={
            "ranked": token_table(chosen, place, expert, load_LE, choices, loaded),
            "main": cells[cells["layer"].isin(mapped)].reset_index(drop=True),
            "layers": layers,
        },
        views=_views(choices.layers[place], expert, KINDS[settings.reads]),
        metrics=_metrics(known.iloc[place], chosen, expert, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_vocabulary",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(load_LE, choices),
            exactness_check=CONSERVED,
        ),
        notes=(
            *text_notes(texts, choices),
            f"{len(chosen.token_V)} tokens are seen at least {settings.min_count} times: "
            + f"{chosen.seen_GV.sum() / choices.n_tokens:.0%} of the text.",
            *shown_note(choices.layers, choices.n_experts),
        ),
        flags=text_flags(choices),
    )


def expert_table(
    vocabulary: Vocabulary, load_LE: Ints, choices: Choices, loaded: LoadedModel
) -> pd.DataFrame:
    """One row per layer and expert: the token it gets the largest share of, and how far its tokens are from the text's.

    ``picky`` is KL(tokens of the expert ‖ tokens of the text) in nats.
    """
    seen_V1 = vocabulary.seen_GV.sum(0)[:, None]
    names = np.array(token_texts(loaded.tokenizer, vocabulary.token_V.tolist()), dtype=object)
    rows = []
    for place in range(len(choices.layers)):
        routed_VE = vocabulary.routed_GVE(place).sum(0)
        share_VE = routed_VE / seen_V1
        of_expert_VE = routed_VE / np.maximum(routed_VE.sum(0), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms_VE = of_expert_VE * np.log(of_expert_VE / (seen_V1 / seen_V1.sum()))
        best_E = share_VE.argmax(0)
        picky_E = np.where(of_expert_VE > 0, terms_VE, 0.0).sum(0)
        rows.append((names[best_E], share_VE.max(0), picky_E))
    token_L, share_L, picky_L = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            **layer_by_expert(choices.layers, choices.n_experts),
            "token": np.concatenate(token_L),
            "share_of_token": np.concatenate(share_L),
            "picky": np.concatenate(picky_L),
            "load": (load_LE / choices.n_tokens).ravel(),
            "tokens": load_LE.ravel(),
        }
    )


def token_table(
    vocabulary: Vocabulary, place: int, expert: int, load_LE: Ints, choices: Choices, loaded: LoadedModel
) -> pd.DataFrame:
    """The tokens of which one expert gets the largest share, by the lower end of the interval."""
    routed_GV, seen_GV = vocabulary.routed_GVE(place)[..., expert], vocabulary.seen_GV
    seen_V, routed_V = seen_GV.sum(0), routed_GV.sum(0)
    low_V, high_V = share_ends(routed_GV, seen_GV)
    share_V = routed_V / seen_V
    frame = pd.DataFrame(
        {
            "token": token_texts(loaded.tokenizer, vocabulary.token_V.tolist()),
            "p_expert_given_token": share_V,
            "low": low_V,
            "high": high_V,
            "over_load": share_V / max(load_LE[place, expert] / choices.n_tokens, 1e-12),
            "routed": routed_V,
            "seen": seen_V,
            "share_of_expert": routed_V / max(1, load_LE[place, expert]),
            "token_id": vocabulary.token_V,
        }
    )
    return frame.sort_values(["low", "seen"], ascending=False, ignore_index=True).head(RANKED)


def _layers(choices: Choices, vocabularies: dict[Reads, Vocabulary]) -> pd.DataFrame:
    """Per layer and kind of token the mean largest share with its interval, and the same of shuffled tokens."""
    generator = np.random.default_rng(0)
    parts = []
    for name, vocabulary in vocabularies.items():
        shuffled = [vocabulary.shuffled(generator).specialisation().value for _ in range(SHUFFLES)]
        parts.append(
            pd.DataFrame(
                {
                    "layer": choices.layers,
                    "series": KINDS[name],
                    **vocabulary.specialisation().columns("largest_share", high=1.0),
                    "shuffled": np.mean(shuffled, axis=0),
                    "vocabulary": len(vocabulary.token_V),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _metrics(row: pd.Series, vocabulary: Vocabulary, expert: int, choices: Choices) -> tuple[Metric, ...]:
    low, high = float(row["largest_share_low"]), float(row["largest_share_high"])
    known = np.isfinite(low)
    return (
        Metric("layer", float(row["layer"]), "layer"),
        Metric("expert", float(expert), "expert"),
        Metric(
            "vocabulary_specialisation",
            float(row["largest_share"]),
            "share",
            n=len(vocabulary.token_V),
            low=low if known else None,
            high=high if known else None,
            interval=f"jackknife over documents, {choices.n_tokens} tokens" if known else "",
        ),
        Metric("shuffled_tokens", float(row["shuffled"]), "share", n=len(vocabulary.token_V)),
    )


def _views(layer: int, expert: int, kind: str) -> tuple[View, ...]:
    return (
        View(
            "table",
            x="token",
            color="p_expert_given_token",
            frame="ranked",
            title=f"Expert {expert} of layer {layer}: its tokens ({kind})",
            unit="share",
            tooltip=("low", "high", "over_load", "routed", "seen", "share_of_expert"),
        ),
        View(
            "heatmap",
            x="expert",
            y="layer",
            color="picky",
            text="token",
            title="How far an expert's tokens are from the text's, and the token it gets most of",
            unit="nats",
            tooltip=("share_of_token", "load", "tokens"),
        ),
        View(
            "line",
            x="layer",
            y="largest_share",
            color="series",
            frame="layers",
            title="Vocabulary specialisation: mean largest P(expert | token)",
            unit="share",
            tooltip=("largest_share_low", "largest_share_high", "shuffled", "vocabulary"),
        ),
    )
