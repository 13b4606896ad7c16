"""Path patching: what one head tells a later head's query, key or value, or the output, directly (Wang et al. 2022).

Only the direct path through the residual stream is patched: heads and MLPs in between keep what they said. It
needs a receiver; which heads matter at all is activation patching's question.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._direct_path import Head, hooked_path_logits, received, sent
from core.probes._patch_grid import PairSettings, record_ends
from core.probes._patch_metric import PatchMetric
from core.probes._patch_report import INDIRECT_OBJECT, headline, ranked
from core.probes._prompt_pair import PromptPair, encode_pair
from core.probes._provenance import provenance
from core.probes._recording import Node, Recording
from core.probes._replay import Patch, Row, last_residuals
from core.registry import Example, method
from core.types import Cost, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Receiver = Literal["logits", "q", "k", "v"]
ALL = -1


class PathPatchingSettings(PairSettings):
    """Both ends of the path."""

    receiver: Receiver = Field(
        "logits", description="Where the path ends: the output, or a head's query, key or value"
    )
    receiver_layer: int = Field(0, ge=0, le=1023, description="Layer of the receiving head, from 0")
    receiver_head: int = Field(0, ge=0, le=1023, description="Receiving head, from 0")
    sender_layer: int = Field(ALL, ge=ALL, le=1023, description="Layer of the sending head; −1 tries all")
    sender_head: int = Field(ALL, ge=ALL, le=1023, description="Sending head; −1 tries all")


def _cost(anatomy: Anatomy, n_tokens: int, settings: PathPatchingSettings) -> Cost:
    layers = anatomy.n_layers if settings.receiver == "logits" else settings.receiver_layer
    senders = 1 if settings.sender_head != ALL else layers * anatomy.n_heads
    each = 0.02 if settings.receiver == "logits" else 0.6 * (1 - settings.receiver_layer / anatomy.n_layers)
    return Cost(5 + each * senders, 4 * n_tokens * anatomy.d_model * (senders + 8 * anatomy.n_layers))


@method(
    "probe",
    title="Path patching",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2211.00593",
    answers="Which heads matter?",
    cost=_cost,
    examples=(
        Example(
            "Indirect object: which heads write the name to the output?",
            INDIRECT_OBJECT.prompt,
            INDIRECT_OBJECT.settings,
        ),
        Example(
            "Indirect object: who tells head 24.4, which writes against the name, what to look for?",
            INDIRECT_OBJECT.prompt,
            {**INDIRECT_OBJECT.settings, "receiver": "q", "receiver_layer": 24, "receiver_head": 4},
        ),
    ),
)
def path_patching(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: PathPatchingSettings
) -> Result:
    """Change what one head tells another, and nothing else, and measure how much of the answer comes along.

    The sender's output takes its value from the source run. All other heads and MLPs keep their recorded outputs, so
    the change reaches the receiver through the residual stream alone. The receiver's query, key or value becomes what it
    computes from that; then everything after it runs freely. With the logits as receiver this is the sender's direct
    effect. Effect: share of the gap between both prompts, 1 all of it.
    """
    started = time.perf_counter()
    with loaded.lock, torch.inference_mode():
        pair, source, base, metric = _prepare(loaded, prompt, settings)
        receiver = _receiver(loaded.anatomy, settings)
        senders = _senders(loaded.anatomy, settings)
        changes = [sent(loaded, source, base, head) for head in senders]
        final_SD = _finals(loaded, base, changes, receiver, min(pair.differing), progress)
        values = metric.of_residuals(final_SD).double().cpu().numpy()
        base_value = metric.corrupted if settings.direction == "denoising" else metric.clean
        step = metric.gap if settings.direction == "denoising" else -metric.gap
        effects = (values - base_value) / step
        best = int(np.abs(effects).argmax())
        inputs = (pair.corrupted if settings.direction == "denoising" else pair.clean).inputs
        logits_V = hooked_path_logits(loaded, inputs, source, base, senders[best], receiver)
        gap = abs(float(metric.of_logits(logits_V[None])[0]) - float(values[best]))
    frame = pd.DataFrame(senders, columns=["layer", "head"]).assign(metric=values, effect=effects)
    return Result(
        frames={"ranked": ranked(frame), "main": frame},
        views=_views(settings, metric),
        metrics=headline(metric, effects),
        provenance=provenance(
            loaded,
            prompt,
            method="path_patching",
            settings=settings,
            started=started,
            conditions={
                "tokens": pair.n_tokens,
                "measured": metric.label,
            },
            exactness_gap=gap,
            exactness_check=f"|strongest path − the same path by whole forwards with every other head and MLP held|, {metric.unit}",
        ),
        notes=_notes(loaded.anatomy, settings, metric),
    )


def _prepare(
    loaded: LoadedModel, prompt: Prompt, settings: PathPatchingSettings
) -> tuple[PromptPair, Recording, Recording, PatchMetric]:
    """Both prompts, the run that is sent from, the run that is patched, and the metric between them."""
    pair = encode_pair(loaded, prompt, settings.corrupted)
    nodes: tuple[Node, ...] = ("z", "attention_out", "mlp_out")
    return pair, *record_ends(loaded, pair, settings, nodes)


def _receiver(anatomy: Anatomy, settings: PathPatchingSettings) -> tuple[int, Node, int] | None:
    """Layer, node and head of the receiver (keys and values by their shared head); None for the logits."""
    if settings.receiver == "logits":
        return None
    _check("receiver", (settings.receiver_layer, settings.receiver_head), anatomy)
    if settings.receiver_layer == 0:
        raise BadInput("a head of layer 0 has no head before it; choose a receiver_layer of at least 1")
    head = settings.receiver_head
    return (
        settings.receiver_layer,
        settings.receiver,
        head if settings.receiver == "q" else anatomy.kv_head(head),
    )


def _senders(anatomy: Anatomy, settings: PathPatchingSettings) -> list[Head]:
    last = anatomy.n_layers if settings.receiver == "logits" else settings.receiver_layer
    layers = range(last) if settings.sender_layer == ALL else [settings.sender_layer]
    heads = range(anatomy.n_heads) if settings.sender_head == ALL else [settings.sender_head]
    _check("sender", (max(layers), max(heads)), anatomy)
    if max(layers) >= last:
        raise BadInput(
            f"a head of layer {max(layers)} cannot tell layer {last} anything: layers run in order; "
            f"choose a sender_layer from 0 to {last - 1}"
        )
    return [(layer, head) for layer in layers for head in heads]


def _check(role: str, head: Head, anatomy: Anatomy) -> None:
    for name, value, n in zip(("layer", "head"), head, (anatomy.n_layers, anatomy.n_heads), strict=True):
        if value >= n:
            raise BadInput(f"{role}_{name} {value} does not exist: this model has {n}, from 0 to {n - 1}")


def _finals(
    loaded: LoadedModel,
    base: Recording,
    changes: list[Tensor],
    receiver: tuple[int, Node, int] | None,
    start: int,
    progress: Progress,
) -> Tensor:
    """Final residual at the last position for each sender's change, [S, D]; before ``start`` no change is."""
    if receiver is None:
        last_D = base.at("residual", loaded.anatomy.n_layers)[-1]
        return torch.stack([last_D + change_PD[-1] for change_PD in changes])
    layer, node, head = receiver
    heard = received(loaded, base, changes, layer=layer, node=node, head=head)
    rows: list[Row] = [(Patch(layer, node, start, value[start:], head),) for value in heard]
    return last_residuals(loaded, base, rows, progress=progress)


def _views(settings: PathPatchingSettings, metric: PatchMetric) -> tuple[View, ...]:
    end = (
        "the output"
        if settings.receiver == "logits"
        else f"the {settings.receiver} of head {settings.receiver_layer}.{settings.receiver_head}"
    )
    return (
        View(
            "table",
            x="rank",
            y="effect",
            frame="ranked",
            title=f"Heads that move {metric.label} by what they tell {end}",
            unit="share of the gap",
            tooltip=("layer", "head", "metric"),
        ),
        View(
            "heatmap",
            x="head",
            y="layer",
            color="effect",
            title=f"Effect of each head through {end}",
            unit="share of the gap",
            midpoint=0.0,
            tooltip=("metric",),
        ),
    )


def _notes(anatomy: Anatomy, settings: PathPatchingSettings, metric: PatchMetric) -> tuple[str, ...]:
    notes = [
        f"{metric.label}: {metric.clean:.4g} on the clean, {metric.corrupted:.4g} on the corrupted prompt.",
        "Direct paths only: what reaches the receiver through other heads or through MLPs is left out.",
    ]
    if settings.receiver in ("k", "v") and anatomy.n_kv_heads < anatomy.n_heads:
        shared = anatomy.n_heads // anatomy.n_kv_heads
        notes.append(
            f"The receiver's {settings.receiver} serves {shared} query heads; all of them read the change."
        )
    return tuple(notes)
