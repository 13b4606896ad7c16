"""Sparse-autoencoder features: which of a trained dictionary's features a prompt turns on, and what they stand for.

Legend: P positions, K active features of a position, F features, D d_model, V vocabulary, T shown features.

It reads an artifact of ``core/train/sparse_autoencoder.py`` and trains nothing. The text's first position and
attention sinks are not encoded, as in training.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._active_features import ActiveFeatures, read_layer
from core.probes._norm_fold import FrozenNorm
from core.probes._provenance import provenance
from core.probes._tokens import encode, token_texts
from core.registry import Example, Settings, method
from core.train._feature_tables import marked
from core.train._sparse_code import METHOD, SparseCode, feature_direction
from core.train._trained import Learned, load
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SHOWN_SNIPPETS = 5


class SaeFeaturesSettings(Settings):
    """Which autoencoder, and how many of its features."""

    artifact: str = Field(
        "",
        description="Trained sparse autoencoder: its artifact's hash, or a folder",
        json_schema_extra={"trained_by": "sparse_autoencoder"},
    )
    features: int = Field(20, ge=1, le=100, description="Features shown, the strongest on this prompt first")
    feature: int = Field(-1, ge=-1, le=10_000_000, description="Feature shown in detail; −1: the strongest")
    max_density: float = Field(
        0.1, gt=0, le=1, description="Leave out features active at a larger share of training tokens"
    )
    tokens: int = Field(8, ge=1, le=40, description="Promoted and suppressed tokens per feature")
    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")


@method(
    "probe",
    title="Sparse features",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2406.04093",
    answers="What does this layer know?",
    examples=(
        Example(
            "What a definition turns on", Prompt("A for loop is used to iterate over the items of a list")
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=1.2, extra_bytes=4 * anatomy.d_model * 8 * (2 * anatomy.d_model + n_tokens)
    ),
)
def sae_features(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: SaeFeaturesSettings
) -> Result:
    """Name what a layer holds at each token: the few active features of a trained sparse autoencoder.

    The residual stream after the autoencoder's layer is written as a sum of at most k feature directions,
    z = TopK(ReLU(W_e (h − b))). A feature is known by the training text where it is strongest (its snippets), by the
    tokens its direction pushes, W_U · norm(d_f), and by its density, the share of tokens where it is active. The
    feature named by its number here can steer the model: direction sae:ARTIFACT:FEATURE.
    """
    started = time.perf_counter()
    learned = load(settings.artifact, method=METHOD, loaded=loaded)
    code, layer = SparseCode.of(learned), int(learned.facts["layer"])
    encoded = encode(loaded, prompt)
    if encoded.n_tokens < 2:
        raise BadInput(
            "the prompt is a single token, and a text's first position is not encoded; type two words"
        )
    with loaded.lock, torch.inference_mode():
        read = read_layer(loaded, encoded, layer)
        seen = ActiveFeatures.of(read, code, encoded)
        shown = seen.strongest(learned, n=settings.features, max_density=settings.max_density)
        detail = settings.feature if settings.feature >= 0 else shown[0]
        feature_direction(learned, detail)
        pushes = _pushes(loaded, read.norm, code, [*shown, detail], settings.tokens)
    table = _feature_table(seen, learned, shown, pushes)
    start = encoded.start(settings.positions)
    return Result(
        frames={
            "main": table,
            "map": seen.map(shown, start),
            "tokens": seen.strip(detail, start),
            "snippets": _snippets(learned, detail),
            "snippet_tokens": _snippet_tokens(learned, detail),
            "pushes": pushes[pushes["feature"] == detail].drop_duplicates().reset_index(drop=True),
        },
        views=_VIEWS,
        metrics=(
            Metric("l0", seen.l0, "features/token", n=seen.n_readable),
            Metric("fvu", seen.fvu, "", "lower", n=seen.n_readable),
            Metric("fvu_in_training", float(learned.facts["fvu"]), "", "lower"),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="sae_features",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens, "layer": layer},
            exactness_gap=seen.gap,
            exactness_check="largest |sum of the active features' directions − dense reconstruction|, of the largest |ĥ|",
        ),
        notes=_notes(loaded, learned, layer, detail, encoded.n_tokens - seen.n_readable),
        flags=("unlike_training_text",) if seen.fvu > 2 * float(learned.facts["fvu"]) else (),
    )


_VIEWS = (
    View(
        "table",
        x="feature",
        color="activation",
        text="promotes",
        title="Strongest features of this prompt",
        tooltip=("token", "share_of_max", "density", "suppresses", "snippet"),
    ),
    View(
        "heatmap",
        x="position",
        y="feature",
        color="activation",
        frame="map",
        title="Where each feature is active",
        tooltip=("token",),
    ),
    View(
        "tokens", x="position", color="activation", text="token", frame="tokens", title="The chosen feature"
    ),
    View(
        "table",
        x="rank",
        color="activation",
        text="snippet",
        frame="snippets",
        title="Training text where the chosen feature is strongest",
        tooltip=("document",),
    ),
    View(
        "heatmap",
        x="offset",
        y="rank",
        color="activation",
        text="token",
        frame="snippet_tokens",
        title="The chosen feature around those places",
    ),
    View(
        "bar",
        x="push",
        y="token",
        color="side",
        frame="pushes",
        title="Tokens the chosen feature pushes",
        unit="logits per unit",
        midpoint=0,
    ),
)


def _feature_table(
    seen: ActiveFeatures, learned: Learned, shown: list[int], pushes: pd.DataFrame
) -> pd.DataFrame:
    """One row per shown feature, the strongest first."""
    facts = learned.tables["features"].set_index("feature").loc[shown]
    snippets = learned.tables["snippets"]
    first = snippets[snippets["rank"] == 1].set_index("feature").loc[shown]
    here = [seen.activation(feature) for feature in shown]
    peaks = [int(values.argmax()) for values in here]
    strongest = [float(values.max()) for values in here]
    sides = (
        pushes.drop_duplicates(["feature", "side", "token_id"])
        .groupby(["feature", "side"])["token"]
        .agg("·".join)
    )
    return pd.DataFrame(
        {
            "feature": shown,
            "activation": strongest,
            "position": peaks,
            "token": [seen.encoded.texts[peak] for peak in peaks],
            "share_of_max": np.array(strongest) / facts["max_activation"].to_numpy(),
            "density": facts["density"].to_numpy(),
            "promotes": [sides[feature, "promoted"] for feature in shown],
            "suppresses": [sides[feature, "suppressed"] for feature in shown],
            "snippet": [marked(*place) for place in zip(first["tokens"], first["peak"], strict=True)],
        }
    )


def _pushes(
    loaded: LoadedModel, norm: FrozenNorm, code: SparseCode, features: list[int], n: int
) -> pd.DataFrame:
    """The tokens whose logits each feature's direction raises and lowers most, relative to the mean logit.

    Two rows through the head, one of them zero: its bias drops out, whatever its kernel.
    """
    anatomy = loaded.anatomy
    assert anatomy.unembedding is not None
    head = loaded.model.get_submodule(anatomy.unembedding)
    parts = []
    for feature in dict.fromkeys(features):
        folded_D = norm.apply(code.decoder_FD[feature].double()[None] * code.scale)[0].to(loaded.model.dtype)
        pair_2V = head(torch.stack([folded_D, torch.zeros_like(folded_D)])).float()
        push_V = (pair_2V[0] - pair_2V[1]) * anatomy.logit_scale
        push_V = push_V - push_V.mean()
        for side, sign in (("promoted", 1), ("suppressed", -1)):
            top = (sign * push_V).topk(min(n, len(push_V)))
            ids = top.indices.tolist()
            parts.append(
                pd.DataFrame(
                    {
                        "feature": feature,
                        "side": side,
                        "token": token_texts(loaded.tokenizer, ids),
                        "token_id": ids,
                        "push": sign * top.values.cpu().numpy(),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def _snippets(learned: Learned, feature: int) -> pd.DataFrame:
    table = learned.tables["snippets"]
    rows = table[table["feature"] == feature]
    lines = [marked(*place) for place in zip(rows["tokens"], rows["peak"], strict=True)]
    return rows[["rank", "document", "activation"]].assign(snippet=lines).reset_index(drop=True)


def _snippet_tokens(learned: Learned, feature: int) -> pd.DataFrame:
    """The same places token by token, offset 0 the strongest."""
    table = learned.tables["snippets"]
    parts = [
        pd.DataFrame(
            {
                "rank": row["rank"],
                "offset": np.arange(len(row["tokens"])) - row["peak"],
                "token": row["tokens"],
                "activation": row["activations"],
            }
        )
        for row in table[table["feature"] == feature].to_dict("records")
    ]
    return pd.concat(parts, ignore_index=True)


def _notes(
    loaded: LoadedModel, learned: Learned, layer: int, detail: int, n_left_out: int
) -> tuple[str, ...]:
    notes = [
        f"The residual stream after {layer} of {loaded.anatomy.n_layers} blocks; in detail: feature {detail}.",
        f"{n_left_out} positions (the first, and attention sinks) are not encoded.",
        "Pushes are of the feature's direction straight on the logits, with the final norm frozen as at the last position.",
    ]
    if learned.facts["base_fingerprint"] != loaded.fingerprint:
        notes.append(
            "The autoencoder was trained on the model this variant was made from, not on the variant."
        )
    return tuple(notes)
