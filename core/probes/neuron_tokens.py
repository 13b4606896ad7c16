"""Neuron tokens: which words a neuron pushes up and down, read off its output weight (Geva 2022).

Legend: D d_model, N chosen neurons, V vocabulary.

A neuron adds activation · w_down to the stream; through the frozen norm and the unembedding that is a push on every
logit at once. Which input turns the neuron on is another question, and so is what later layers make of its output.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.experts import down_weight
from core.models.weights import neuron_weight
from core.probes._logit_split import Neurons, Split, freeze_at, reader, split_logit
from core.probes._norm_fold import project
from core.probes._provenance import provenance
from core.probes._residual_parts import ResidualParts, residual_parts
from core.probes._targets import resolve_distractor, resolve_position, resolve_token
from core.probes._tokens import encode, token_texts
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


class NeuronTokensSettings(Settings):
    """Which neurons, and how many of their words."""

    target: str = Field(
        "", description="Pick the neurons that add most to this token's logit; empty: the top prediction"
    )
    distractor: str = Field("", description="…or to the difference target − distractor; empty: none")
    neurons: int = Field(10, ge=1, le=50, description="How many neurons to pick")
    layer: int = Field(-1, ge=-1, le=512, description="Show one neuron: its layer; −1 picks by the prompt")
    neuron: int = Field(0, ge=0, le=200_000, description="Show one neuron: its index, used when layer is set")
    expert: int = Field(0, ge=0, le=1024, description="Show one neuron: its expert, in a mixture of experts")
    tokens: int = Field(8, ge=1, le=40, description="Tokens shown per neuron, at each end")
    position: int = Field(
        -1, ge=-1, le=2047, description="Token position that predicts, from 0; −1 is the last"
    )


@method(
    "probe",
    title="Neuron tokens",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2203.14680",
    answers="What does this layer know?",
    examples=(
        Example(
            "A neuron of are against is",
            Prompt("The keys to the cabinet"),
            {"target": " are", "distractor": " is"},
        ),
        Example("Neurons of colours", Prompt("She opened the box and found a red, green, and")),
        Example(
            "A neuron that holds France back",
            Prompt("The capital of France is"),
            {"layer": 29, "neuron": 864},
        ),
    ),
    cost=lambda anatomy, n_tokens, settings: Cost(
        forwards=1.5 + 0.1 * settings.neurons,
        extra_bytes=16 * anatomy.vocab_size * settings.neurons + (64 << 20),
    ),
)
def neuron_tokens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: NeuronTokensSettings
) -> Result:
    """List the tokens that a neuron promotes and suppresses, for the neurons that matter here or for a chosen one.

    Neuron n of a layer adds a_n · w_n to the residual stream, w_n its row of W_down. On the logits that is
    a_n · W_U · (γ ⊙ w_n) / σ, with the norms' scales frozen as in this run; the mean over the vocabulary, which changes
    no probability, is taken off. The order is that of the push in this run: a negative activation turns it round.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    position = resolve_position(settings.position, encoded.n_tokens)
    with loaded.lock, torch.inference_mode():
        parts = residual_parts(loaded, encoded, position)
        target = resolve_token(loaded, settings.target, logits_V=parts.logits_V)
        distractor = resolve_distractor(loaded, settings.distractor, target)
        read = reader(loaded, target, distractor, minus_mean=False)
        split = split_logit(loaded, parts, read)
        chosen = _one(loaded, split, settings) if settings.layer >= 0 else _most(split, settings.neurons)
        progress(1, 2, "reading the neurons as tokens")
        logits_NV = _read(loaded, parts, chosen)
        units = [float(read(unit_V)) / read.scale for unit_V in logits_NV]
    gap = max(
        abs(unit * neuron.activation - neuron.contribution)
        for unit, neuron in zip(units, chosen, strict=True)
    )
    tokens = _token_table(loaded, chosen, logits_NV, settings.tokens)
    return Result(
        frames={"main": _neuron_table(chosen, tokens), "tokens": tokens},
        views=_VIEWS,
        metrics=(Metric("neurons", float(len(chosen)), "neurons"),),
        provenance=provenance(
            loaded,
            prompt,
            method="neuron_tokens",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens, "position": position, "target": target.text},
            exactness_gap=gap,
            exactness_check="largest |push on the target read here − the neuron's direct logit attribution|",
        ),
        notes=(
            f"Contribution is to {target.text!r}"
            + (f" minus {distractor.text!r}" if distractor else "")
            + f" after {encoded.texts[position]!r}; pushes are relative to the mean over the vocabulary.",
        ),
    )


_VIEWS = (
    View(
        "table",
        x="component",
        color="contribution",
        text="promotes",
        title="Neurons and the tokens they push",
        unit="logits",
        midpoint=0,
        tooltip=("suppresses", "activation", "layer", "neuron"),
    ),
    View(
        "table",
        x="component",
        y="side",
        color="push",
        text="token",
        frame="tokens",
        title="Push on each token",
        unit="logits",
        midpoint=0,
        tooltip=("rank", "push_per_activation", "token_id"),
    ),
)


@dataclass(frozen=True)
class _Chosen:
    """One neuron, and what it did here."""

    name: str
    layer: int
    expert: int | None
    neuron: int
    activation: float
    contribution: float

    @classmethod
    def of(cls, neurons: Neurons, index: int) -> _Chosen:
        return cls(
            neurons.name(index),
            neurons.layer,
            neurons.expert,
            index,
            float(neurons.activation_N[index]),
            float(neurons.contribution_N[index]),
        )


def _most(split: Split, count: int) -> list[_Chosen]:
    """The neurons with the largest contributions either way."""
    found = [
        _Chosen.of(neurons, index)
        for neurons in split.neurons
        for index in np.argsort(-np.abs(neurons.contribution_N), kind="stable")[:count].tolist()
    ]
    return sorted(found, key=lambda neuron: -abs(neuron.contribution))[:count]


def _one(loaded: LoadedModel, split: Split, settings: NeuronTokensSettings) -> list[_Chosen]:
    """The neuron that was asked for; of an expert that this position did not choose, with activation 0."""
    anatomy = loaded.anatomy
    layer, neuron, expert = settings.layer, settings.neuron, settings.expert
    if layer >= anatomy.n_layers:
        raise BadInput(
            f"layer {layer} does not exist: {loaded.ref} has {anatomy.n_layers}, from 0 to {anatomy.n_layers - 1}"
        )
    here = [neurons for neurons in split.neurons if neurons.layer == layer]
    width = len(here[0].activation_N)
    if neuron >= width:
        raise BadInput(f"neuron {neuron} does not exist: layer {layer} has {width}, from 0 to {width - 1}")
    if here[0].expert is None:
        return [_Chosen.of(here[0], neuron)]
    if expert >= anatomy.n_experts:
        raise BadInput(
            f"expert {expert} does not exist: layer {layer} has {anatomy.n_experts}, from 0 to {anatomy.n_experts - 1}"
        )
    ran = [neurons for neurons in here if neurons.expert == expert]
    idle = Neurons(layer, expert, np.zeros(width), np.zeros(width))
    return [_Chosen.of(ran[0] if ran else idle, neuron)]


def _read(loaded: LoadedModel, parts: ResidualParts, chosen: list[_Chosen]) -> Tensor:
    """Push of one unit of activation on every logit, float64 [N, V]."""
    model, anatomy = loaded.model, loaded.anatomy
    final = freeze_at(loaded, str(anatomy.final_norm), parts.final_D, parts.normed_D)
    vectors = []
    for neuron in chosen:
        written = parts.blocks[neuron.layer]
        if neuron.expert is None:
            vector_D = neuron_weight(model, written.block)[neuron.neuron].double()
        else:
            experts = model.get_submodule(str(written.block.experts))
            vector_D = down_weight(experts, neuron.expert)[neuron.neuron].double()
        vector_D = vector_D * anatomy.residual_scale
        if anatomy.norm_place == "sandwich":
            after = freeze_at(loaded, written.block.mlp_write, written.mlp_fed_D, written.mlp_D)
            vector_D = after.apply(vector_D)
        vectors.append(final.apply(vector_D))
    weight_VD = model.get_submodule(str(anatomy.unembedding)).weight
    return project(weight_VD, torch.stack(vectors).T).T * anatomy.logit_scale


def _token_table(loaded: LoadedModel, chosen: list[_Chosen], logits_NV: Tensor, count: int) -> pd.DataFrame:
    """Both ends of every neuron's push on the vocabulary."""
    count = min(count, logits_NV.shape[-1])
    rows = []
    for neuron, logits_V in zip(chosen, logits_NV, strict=True):
        unit_V = logits_V - logits_V.mean()
        push_V = unit_V * (neuron.activation or 1.0)
        for side, ends in (("promotes", push_V.topk(count)), ("suppresses", (-push_V).topk(count))):
            ids = ends.indices.tolist()
            for rank, (id_, text) in enumerate(
                zip(ids, token_texts(loaded.tokenizer, ids), strict=True), start=1
            ):
                unit = float(unit_V[id_])
                rows.append((neuron.name, side, rank, text, id_, unit * neuron.activation, unit))
    columns = ["component", "side", "rank", "token", "token_id", "push", "push_per_activation"]
    return pd.DataFrame(rows, columns=columns)


def _neuron_table(chosen: list[_Chosen], tokens: pd.DataFrame) -> pd.DataFrame:
    words = tokens.groupby(["component", "side"])["token"].agg(lambda texts: "  ".join(map(repr, texts)))
    return pd.DataFrame(
        [
            {
                "component": neuron.name,
                "contribution": neuron.contribution,
                "promotes": words[neuron.name, "promotes"],
                "suppresses": words[neuron.name, "suppresses"],
                "activation": neuron.activation,
                "layer": neuron.layer,
                "neuron": neuron.neuron,
            }
            for neuron in chosen
        ]
    )
