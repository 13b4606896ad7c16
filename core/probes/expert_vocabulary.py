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
from core.evaluate._intervals import wilson
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    Counted,
    chosen_place,
    conservation_gap,
    count_choices,
    counted_by,
    layer_by_expert,
    shown,
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
    """How often each token that was seen often enough went to each expert."""

    token_V: Ints
    """Token ids."""
    seen_GV: Ints
    """Occurrences by group of documents."""
    routed_GLVE: Ints
    """Of those, the ones that each expert was given."""

    @classmethod
    def of(cls, choices: Choices, token_T: Ints, *, min_count: int) -> Vocabulary:
        """Count the choices by the token at each position; raises ``BadInput`` where none is seen often enough."""
        ids, number_T, counts = np.unique(token_T, return_inverse=True, return_counts=True)
        often = counts >= min_count
        if not often.any():
            raise BadInput(
                f"no token is seen {min_count} times in {len(token_T)} tokens; read more tokens, or lower min_count"
            )
        n_often = int(often.sum())
        place_T = np.where(often, np.cumsum(often) - 1, -1)[number_T]
        group_T, kept_T = choices.group_T, place_T >= 0
        n_groups = int(group_T.max()) + 1
        cell_T = group_T[kept_T] * n_often + place_T[kept_T]
        routed = counted_by(choices.experts_LTK[:, kept_T], cell_T, n_groups * n_often, choices.n_experts)
        seen = np.bincount(cell_T, minlength=n_groups * n_often).reshape(n_groups, n_often)
        shape = (n_groups, n_often, *routed.shape[1:])
        return cls(ids[often], seen, routed.reshape(shape).swapaxes(1, 2))

    def specialisation(self) -> Counted:
        """Per layer the mean over tokens of the largest share P(e | t) that one expert gets."""
        values, halves = [], []
        for place in range(
            self.routed_GLVE.shape[1]
        ):  # one at a time: together they would not fit where there are many layers
            both_GVX = np.concatenate([self.routed_GLVE[:, place], self.seen_GV[..., None]], axis=-1)
            found = Counted.of(both_GVX, _mean_largest_share)
            values.append(found.value)
            halves.append(found.half)
        return Counted(np.array(values), np.array(halves), len(self.seen_GV))


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
    layers = _layers(choices, vocabularies, ids, settings.min_count)
    load_LE = count_choices(choices).sum(0)
    chosen = vocabularies[settings.reads]
    cells = expert_table(chosen, load_LE, choices, loaded)
    known = layers[layers["series"] == KINDS[settings.reads]].reset_index(drop=True)
    place = chosen_place(
        settings.layer, choices.layers, int((known["largest_share"] - known["shuffled"]).to_numpy().argmax())
    )
    of_layer = cells[cells["layer"] == choices.layers[place]]
    expert = int(of_layer["picky"].to_numpy().argmax()) if settings.expert < 0 else settings.expert
    places = [choices.layers[at] for at in shown(choices.layers, choices.n_experts)]
    return Result(
        frames={
            "ranked": token_table(chosen, place, expert, load_LE, choices, loaded),
            "main": cells[cells["layer"].isin(places)].reset_index(drop=True),
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
    routed_LVE = vocabulary.routed_GLVE.sum(0)
    seen_V = vocabulary.seen_GV.sum(0)
    share_LVE = routed_LVE / seen_V[:, None]
    best_LE = share_LVE.argmax(1)
    names = np.array(token_texts(loaded.tokenizer, vocabulary.token_V.tolist()), dtype=object)
    of_expert_LVE = routed_LVE / np.maximum(routed_LVE.sum(1, keepdims=True), 1)
    of_text_V1 = (seen_V / seen_V.sum())[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_LVE = np.where(of_expert_LVE > 0, of_expert_LVE * np.log(of_expert_LVE / of_text_V1), 0.0)
    best_share_LE = np.take_along_axis(share_LVE, best_LE[:, None], 1)[:, 0]
    return pd.DataFrame(
        {
            **layer_by_expert(choices.layers, choices.n_experts),
            "token": names[best_LE.ravel()],
            "share_of_token": best_share_LE.ravel(),
            "picky": terms_LVE.sum(1).ravel(),
            "load": (load_LE / choices.n_tokens).ravel(),
            "tokens": load_LE.ravel(),
        }
    )


def token_table(
    vocabulary: Vocabulary, place: int, expert: int, load_LE: Ints, choices: Choices, loaded: LoadedModel
) -> pd.DataFrame:
    """The tokens of which one expert gets the largest share, by the lower end of the interval."""
    routed_GV = vocabulary.routed_GLVE[:, place, :, expert]
    seen_V, routed_V = vocabulary.seen_GV.sum(0), routed_GV.sum(0)
    low_V, high_V = Counted.share(routed_GV, vocabulary.seen_GV).ends(high=1.0)
    wilson_V2 = np.array([wilson(int(hits), int(n)) for hits, n in zip(routed_V, seen_V, strict=True)])
    share_V = routed_V / seen_V
    frame = pd.DataFrame(
        {
            "token": token_texts(loaded.tokenizer, vocabulary.token_V.tolist()),
            "p_expert_given_token": share_V,
            "low": np.fmin(low_V, wilson_V2[:, 0]),
            "high": np.fmax(high_V, wilson_V2[:, 1]),
            "over_load": share_V / max(load_LE[place, expert] / choices.n_tokens, 1e-12),
            "routed": routed_V,
            "seen": seen_V,
            "share_of_expert": routed_V / max(1, load_LE[place, expert]),
            "token_id": vocabulary.token_V,
        }
    )
    return frame.sort_values(["low", "seen"], ascending=False, ignore_index=True).head(RANKED)


def _layers(
    choices: Choices, vocabularies: dict[Reads, Vocabulary], ids: dict[Reads, Ints], min_count: int
) -> pd.DataFrame:
    """Per layer and kind of token the mean largest share with its interval, and the same of shuffled tokens."""
    generator = np.random.default_rng(0)
    parts = []
    for name, vocabulary in vocabularies.items():
        shuffled = [
            Vocabulary.of(choices, generator.permutation(ids[name]), min_count=min_count)
            .specialisation()
            .value
            for _ in range(SHUFFLES)
        ]
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
