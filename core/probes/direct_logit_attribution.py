"""Direct logit attribution: which heads, neurons and layers wrote the answer (Elhage 2021).

Legend: D d_model, H heads, K head_dim, N neurons, E chosen experts, V vocabulary.

The final logit is a sum over everything that was ever added to the residual stream, once the norms' scales are frozen
at their real values (``_norm_fold.py``). Weights are never changed, so it works on any opened model as it is. It says
what was *written*, not why: a head that only feeds another head gets no credit here (activation patching gives it).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.probes._logit_split import Neurons, Split, reader, split_logit
from core.probes._provenance import provenance
from core.probes._residual_parts import ResidualParts, residual_parts
from core.probes._targets import (
    Token,
    resolve_distractor,
    resolve_position,
    resolve_token,
    spelling_note,
)
from core.probes._tokens import MAX_CELLS, encode
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel


ROUNDED = 1e-3
"""A gap above this share of the logit is said aloud."""


class DirectLogitAttributionSettings(Settings):
    """Which logit to split, and how finely."""

    target: str = Field(
        "", description="Token whose logit is split, with its leading space; empty: the top prediction"
    )
    distractor: str = Field(
        "",
        description="Token to compare with: the logit difference target − distractor is split; empty: none",
    )
    relative_to: Literal["zero", "vocabulary_mean"] = Field(
        "zero",
        description="zero: the logit itself; vocabulary_mean: how far the logit is above the mean over the vocabulary, "
        "which leaves out what lifts all tokens alike (no effect with a distractor)",
    )
    position: int = Field(
        -1, ge=-1, le=2047, description="Token position that predicts, from 0; −1 is the last"
    )
    top_neurons: int = Field(40, ge=0, le=1000, description="Neurons shown, those that add or take most")


@method(
    "probe",
    title="Direct logit attribution",
    needs=["decoder", "text", "heads"],
    paper="https://transformer-circuits.pub/2021/framework/index.html",
    answers="Why this token?",
    examples=(
        Example(
            "Capital: one head writes Paris",
            Prompt("The capital of France is"),
            {"target": " Paris", "distractor": " London"},
        ),
        Example(
            "Agreement: keys … are",
            Prompt("The keys to the cabinet"),
            {"target": " are", "distractor": " is"},
        ),
        Example(
            "Indirect object: Mary, not John",
            Prompt("When Mary and John went to the store, John gave a drink to"),
            {"target": " Mary", "distractor": " John"},
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=1.5, extra_bytes=8 * anatomy.n_layers * (anatomy.d_ff + 4 * anatomy.d_model) + (64 << 20)
    ),
)
def direct_logit_attribution(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: DirectLogitAttributionSettings
) -> Result:
    """Split one logit, or the difference of two, into what each head, neuron and layer wrote.

    The residual stream is a sum of parts c_j: h = Σ c_j. With the final norm's σ frozen at its real value the logit of
    token t is Σ_j W_U[t] · γ ⊙ (c_j − mean c_j) / σ + W_U[t] · β + b_U[t] (RMSNorm: no mean, no β; Gemma: 1 + γ). In
    models that norm after a sublayer, a part is taken after that norm, whose σ is frozen too. A logit scale is applied;
    a softcap is not linear, so the logit *before* it is split. The exactness gap is |Σ parts − the model's logit|.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    position = resolve_position(settings.position, encoded.n_tokens)
    with loaded.lock, torch.inference_mode():
        parts = residual_parts(loaded, encoded, position)
        target = resolve_token(loaded, settings.target, logits_V=parts.logits_V)
        distractor = resolve_distractor(loaded, settings.distractor, target)
        progress(1, 2, "splitting the logit")
        read = reader(loaded, target, distractor, minus_mean=settings.relative_to == "vocabulary_mean")
        split = split_logit(loaded, parts, read)
    frames = _frames(split, settings.top_neurons)
    return Result(
        frames=frames,
        views=tuple(view for view in _VIEWS if view.frame in frames),
        metrics=_metrics(split, parts, target),
        provenance=provenance(
            loaded,
            prompt,
            method="direct_logit_attribution",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "position": position,
                "target": target.text,
                "target_id": target.id,
                "distractor": distractor.text if distractor else "",
            },
            exactness_gap=abs(split.total - split.logit),
            exactness_check="|Σ heads, neurons, embeddings and biases − the model's own logit or difference|",
        ),
        notes=_notes(loaded, settings, parts, split, target, distractor, encoded.texts[position]),
    )


_VIEWS = (
    View(
        "table",
        x="component",
        color="contribution",
        title="Parts that wrote the answer",
        unit="logits",
        midpoint=0,
        tooltip=("kind", "share"),
    ),
    View(
        "heatmap",
        x="head",
        y="layer",
        color="contribution",
        frame="heads",
        title="What each head wrote",
        unit="logits",
        midpoint=0,
        tooltip=("component", "share"),
    ),
    View(
        "bar",
        x="layer",
        y="contribution",
        color="kind",
        frame="layers",
        title="What each layer wrote",
        unit="logits",
        tooltip=("share",),
    ),
    View(
        "line",
        x="layer",
        y="total_after",
        frame="running",
        title="The sum after each layer",
        unit="logits",
        tooltip=("contribution",),
    ),
    View(
        "table",
        x="component",
        color="contribution",
        frame="neurons",
        title="Neurons that wrote the answer",
        unit="logits",
        midpoint=0,
        tooltip=("layer", "neuron", "activation", "share"),
    ),
)


def _frames(split: Split, top_neurons: int) -> dict[str, pd.DataFrame]:
    """The sum as tables: every part by size, heads as a map, layers in order, and the neurons that count most."""
    parts = pd.DataFrame(
        {
            "component": [part.name for part in split.parts],
            "contribution": [part.contribution for part in split.parts],
            "share": [_share(part.contribution, split) for part in split.parts],
            "kind": [part.kind for part in split.parts],
            "layer": [part.layer for part in split.parts],
            "head": pd.array([part.head for part in split.parts], dtype="Int64"),
        }
    )
    order = parts["contribution"].abs().sort_values(ascending=False, kind="stable").index
    layers = parts.assign(kind=parts["kind"].map(_SUBLAYER)).groupby(["layer", "kind"], sort=False)
    summed = layers["contribution"].sum().reset_index()
    running = summed.groupby("layer", sort=True)["contribution"].sum().reset_index()
    frames = {
        "main": parts.loc[order].head(MAX_CELLS).reset_index(drop=True),
        "heads": parts[parts["kind"] == "attention head"].reset_index(drop=True),
        "layers": summed.assign(share=[_share(value, split) for value in summed["contribution"]]),
        "running": running.assign(total_after=running["contribution"].cumsum()),
    }
    if top_neurons:
        frames["neurons"] = _top_neurons(split, top_neurons)
    return frames


_SUBLAYER = {
    "embedding": "embedding",
    "attention head": "attention",
    "MLP": "MLP",
    "expert": "MLP",
    "bias": "bias",
}


def _share(contribution: float, split: Split) -> float:
    """Part of the logit, 1 is all of it; 0 of a logit that is exactly 0."""
    return contribution / split.logit if split.logit else 0.0


def _top_neurons(split: Split, count: int) -> pd.DataFrame:
    """The neurons with the largest contributions either way, over all layers."""
    picked: list[tuple[float, float, Neurons, int]] = []
    for layer in split.neurons:
        for neuron in np.argsort(-np.abs(layer.contribution_N), kind="stable")[:count].tolist():
            value = float(layer.contribution_N[neuron])
            picked.append((value, float(layer.activation_N[neuron]), layer, neuron))
    picked.sort(key=lambda row: -abs(row[0]))
    return pd.DataFrame(
        [
            {
                "component": layer.name(neuron),
                "contribution": value,
                "share": _share(value, split),
                "layer": layer.layer,
                "neuron": neuron,
                "activation": activation,
            }
            for value, activation, layer, neuron in picked[:count]
        ]
    )


def _metrics(split: Split, parts: ResidualParts, target: Token) -> tuple[Metric, ...]:
    by_kind = dict.fromkeys(("embedding", "attention", "MLP", "bias"), 0.0)
    for part in split.parts:
        by_kind[_SUBLAYER[part.kind]] += part.contribution
    probability = float(parts.logits_V.double().softmax(-1)[target.id])
    return (
        Metric("attributed_logit", split.logit, "logits"),
        Metric("target_probability", probability, "probability"),
        *(Metric(f"from_{kind.lower()}", value, "logits") for kind, value in by_kind.items()),
    )


def _notes(
    loaded: LoadedModel,
    settings: DirectLogitAttributionSettings,
    parts: ResidualParts,
    split: Split,
    target: Token,
    distractor: Token | None,
    last_token: str,
) -> tuple[str, ...]:
    what = f"the logit of {target.text!r}"
    if distractor is not None:
        what += f" minus that of {distractor.text!r}"
    elif settings.relative_to == "vocabulary_mean":
        what += " minus the mean over the vocabulary"
    notes = [
        f"Split: {what} after {last_token!r}, {split.logit:.4f}; shares are of this number, and parts may cancel.",
        "Layer −1 is the embedding; norms are held at the scale they had in this run.",
    ]
    if loaded.anatomy.logit_softcap is not None:
        notes.append(
            f"This model caps its logits at ±{loaded.anatomy.logit_softcap:g} by a tanh, which has no parts: "
            f"the logit before the cap is split; after it the target's is {float(parts.logits_V[target.id]):.4f}."
        )
    gap = abs(split.total - split.logit)
    if gap > ROUNDED * max(1.0, abs(split.logit)):
        notes.append(
            f"The parts miss the model's logit by {gap:.2g}: {loaded.dtype} rounds every addition to the stream; "
            "open the model in float32 for parts that add up."
        )
    return (*notes, *spelling_note(loaded, target, parts.logits_V))
