"""Class lens: what a vision transformer would name a picture if it stopped after each layer.

The logit lens read at the class token: the model's own final norm and classifier on every layer's residual stream.
Legend: L layers (embedding first), C classes, D d_model.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.images.classes import class_logits
from core.lazy import torch
from core.models.readout import unembed
from core.probes._image import encode_image
from core.probes._provenance import provenance
from core.probes._targets import named, resolve_token
from core.probes._tokens import MAX_CELLS
from core.registry import Example, Settings, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


class ClassLensSettings(Settings):
    """Which classes to show."""

    target: str = Field(
        "", description="Class to follow, by name or number; empty takes the model's own answer"
    )
    classes: int = Field(
        20, ge=2, le=200, description="Most classes shown: those that rank highest at any layer"
    )


@method(
    "probe",
    title="Class lens",
    needs=["vision"],
    paper="https://arxiv.org/abs/2303.08112",
    answers="What does this layer know?",
    examples=(
        Example("At which layer does it become a 7?", Prompt(image="digits:1348")),
        Example("An 8 it nearly takes for a 9", Prompt(image="digits:1491")),
    ),
)
def class_lens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ClassLensSettings
) -> Result:
    """Read every layer's class token as an answer.

    The class token's residual stream h_l after layer l goes through the model's own final norm and classifier:
    softmax(W · norm(h_l) + b). Layer 0 is the embedding, where the class token has seen no picture; the last layer is the
    model's real answer. KL is KL(last layer ‖ this layer) in nats; rank 1 is the top class. Layers before the last were
    never trained to be read like this, so an early layer that says nothing here may still know.
    """
    started = time.perf_counter()
    encoded = encode_image(loaded, prompt)
    with loaded.lock, torch.inference_mode():
        with capture_residual(loaded, reduce=lambda path, stream: stream[0, 0].clone()) as class_token:
            answer_C = class_logits(loaded, encoded.inputs["pixel_values"])[0]
        read_LC = torch.stack(
            [unembed(loaded.model, loaded.anatomy, h_D) for h_D in class_token.values()]
        ).float()
    target = resolve_token(loaded, settings.target, logits_V=answer_C)
    frame = _frame(loaded, read_LC, min(settings.classes, MAX_CELLS // len(read_LC)), target.id)
    layers = _layers(loaded, read_LC, target.id)
    return Result(
        frames={"main": layers, "classes": frame},
        views=_views(target.text),
        metrics=_metrics(layers),
        provenance=provenance(
            loaded,
            prompt,
            method="class_lens",
            settings=settings,
            started=started,
            conditions={"positions": encoded.n_tokens},
            exactness_gap=float((read_LC[-1] - answer_C).abs().max()),
            exactness_check="largest |lens at the last layer − the model's own logits|",
        ),
        notes=(
            *encoded.notes,
            *((f"The data set's label is {encoded.picture.label}.",) if encoded.picture.label else ()),
            "Layer 0 is the embedding; layer l is the residual stream after l blocks.",
        ),
    )


def _layers(loaded: LoadedModel, read_LC: Tensor, target: int) -> pd.DataFrame:
    """One row per layer: its answer, how sure it is, how far from the end, and how the followed class stands."""
    log_p_LC = read_LC.log_softmax(-1)
    p_LC = log_p_LC.exp()
    kl_L = (p_LC[-1] * (log_p_LC[-1] - log_p_LC)).sum(-1).clamp(min=0)
    top_L = read_LC.argmax(-1).tolist()
    columns = {
        "p_top1": p_LC.amax(-1),
        "entropy_nats": -(p_LC * log_p_LC).sum(-1),
        "kl_to_final_nats": kl_L,
        "target_logit": read_LC[:, target],
        "p_target": p_LC[:, target],
        "rank_of_target": 1 + (read_LC > read_LC[:, target, None]).sum(-1),
    }
    return pd.DataFrame(
        {
            "layer": range(len(read_LC)),
            "answer": [named(loaded, class_).text for class_ in top_L],
            **{name: values.cpu().numpy() for name, values in columns.items()},
        }
    )


def _frame(loaded: LoadedModel, read_LC: Tensor, most: int, target: int) -> pd.DataFrame:
    """One row per layer and shown class: the followed class, and those that reach the best rank at any layer."""
    best_rank_C = read_LC.argsort(-1, descending=True).argsort(-1).amin(0)
    best_rank_C[target] = -1
    shown = sorted(best_rank_C.argsort(stable=True)[:most].tolist())
    p_LC = read_LC.softmax(-1)[:, shown]
    n = len(read_LC)
    return pd.DataFrame(
        {
            "layer": np.repeat(range(n), len(shown)),
            "class": np.tile(np.array([named(loaded, class_).text for class_ in shown], dtype=object), n),
            "probability": p_LC.cpu().numpy().ravel(),
            "logit": read_LC[:, shown].cpu().numpy().ravel(),
        }
    )


def _metrics(layers: pd.DataFrame) -> tuple[Metric, ...]:
    answers = layers["answer"].tolist()
    settled = next(layer for layer in range(len(answers)) if len(set(answers[layer:])) == 1)
    last = layers.iloc[-1]
    return (
        Metric("settling_layer", float(settled), "layer"),
        Metric("p_target", float(last["p_target"]), "probability"),
        Metric("final_entropy", float(last["entropy_nats"]), "nats"),
    )


def _views(target: str) -> tuple[View, ...]:
    tooltip = ("answer", "p_top1", "entropy_nats", "kl_to_final_nats", "rank_of_target")
    return (
        View(
            "line",
            x="layer",
            y="p_target",
            title=f"Probability of “{target}” if the model stopped at each layer",
            unit="probability",
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="class",
            y="layer",
            color="probability",
            frame="classes",
            title="Probability of each class at each layer",
            unit="probability",
            tooltip=("logit",),
        ),
        View("table", x="layer", y="p_top1", text="answer", title="All layers", tooltip=tooltip[2:]),
    )
