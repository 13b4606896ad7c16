"""Linear probes: at which layer can a label be read off the residual stream by a linear classifier (Alain & Bengio 2016).

Legend: S layers (embedding, then after each block), N texts, D d_model, T targets fitted together, P prompt positions.

A high accuracy alone says little: the classifier may have learned the words by heart. So every layer is also asked for
a control task (Hewitt & Liang 2019), for shuffled labels, and for a twin of the model with random weights. It does
not say that the model uses what can be read.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.errors import BadInput
from core.lazy import torch
from core.probes._linear_fit import (
    Classifier,
    Fit,
    Ints,
    fit,
    one_thread,
    out_of_fold,
    seen_groups,
    unseen_groups,
)
from core.probes._probe_report import Layers, metrics, notes, table, views
from core.probes._provenance import provenance
from core.probes._random_twin import random_twin
from core.probes._read_texts import Position, read_texts
from core.probes._tokens import encode, limit_cells
from core.registry import Example, Settings, method
from core.text.labelled import Labelled, load_labelled
from core.types import Cost, Progress, Prompt, Result, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

CONTROL_TASKS = 2
"""Control tasks drawn; their accuracies are averaged."""


class LinearProbeSettings(Settings):
    """What is asked of every layer, and how."""

    data: str = Field(
        "builtin:number",
        description="Labelled texts: builtin:number, builtin:tense, builtin:sentiment, builtin:language, or a .csv, "
        ".tsv or .jsonl file with text, label and, where known, group (what must not be learned by heart)",
    )
    position: Position = Field(
        "last",
        description="Which of a text's residuals is read: its last token's, the mean, or its first token's",
    )
    classifier: Classifier = Field("logistic", description="Kind of linear classifier")
    l2: float = Field(
        1.0, gt=0, le=1e6, description="L2 penalty on the weights of standardised features, per feature"
    )
    folds: int = Field(5, ge=2, le=10, description="Folds of the cross-validation, split by group")
    twin: Literal["random", "none"] = Field(
        "random", description="Also probe a model of the same shape with random weights"
    )
    layer: int = Field(
        -1, ge=-1, le=1024, description="Layer whose probe reads the prompt; -1 is the best layer"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of splits, control labels and random weights")

    @property
    def reads_prompt(self) -> bool:
        """It reads the labelled texts."""
        return False


def _cost(anatomy: Anatomy, n_tokens: int, settings: LinearProbeSettings) -> Cost:
    """Texts of about ten tokens, read once or twice, and the fits."""
    n_texts = 300
    with suppress(BadInput):
        n_texts = len(load_labelled(settings.data).texts)
    models = 2 if settings.twin == "random" else 1
    reading = models * n_texts * 10 / max(1, n_tokens)
    per_block = 4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff
    parameters = anatomy.n_layers * per_block + anatomy.vocab_size * anatomy.d_model
    n_fits = (anatomy.n_layers + 1) * settings.folds * 5
    fitting = n_fits * 300 * 8 * n_texts * min(n_texts, anatomy.d_model) / (2 * parameters * max(1, n_tokens))
    vectors = models * 12 * (anatomy.n_layers + 1) * n_texts * anatomy.d_model
    return Cost(reading + fitting, vectors + (4 * parameters if models == 2 else 0))


@method(
    "probe",
    title="Linear probe",
    needs=["text"],
    paper="https://aclanthology.org/D19-1275/",
    answers="What does this layer know?",
    examples=(
        Example(
            "Which layer knows the subject's number?",
            Prompt("The keys to the old wooden cabinet"),
            {"data": "builtin:number"},
        ),
        Example(
            "Which layer knows that it is the past?",
            Prompt("The teacher wrote a letter to her friend in the city"),
            {"data": "builtin:tense"},
        ),
        Example(
            "Which layer knows that an opinion is good?",
            Prompt("The hotel was dirty and loud, said my brother on the phone"),
            {"data": "builtin:sentiment"},
        ),
    ),
    cost=_cost,
)
def linear_probe(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: LinearProbeSettings
) -> Result:
    """Find the layers from which a label can be read by a linear classifier, with the controls that make it mean something.

    At every layer a classifier softmax(W h + b) is trained on labelled texts and tested on groups of texts (new nouns,
    new verbs) that it has not met. Controls: the majority label; labels shuffled; the same model with random weights;
    and a control task, in which every group gets a random label, to be learned by heart from texts of the same groups.
    Selectivity is the accuracy on new groups minus the control task's. The prompt is then read by every layer's probe,
    token by token; at tokens unlike those that the probes were trained on, their answers are an extrapolation.
    """
    started = time.perf_counter()
    data = load_labelled(settings.data)
    if settings.layer > loaded.anatomy.n_layers:
        raise BadInput(
            f"layer {settings.layer} does not exist: {loaded.ref} has 0 to {loaded.anatomy.n_layers}"
        )
    n_prompt = encode(loaded, prompt).n_tokens
    limit_cells(loaded.anatomy.n_layers + 1, n_prompt)
    has_twin = settings.twin == "random"
    reading_ends = 0.5 if has_twin else 0.3
    vectors_SND = _vectors(
        loaded, data, settings, part_of(progress, 0.0, reading_ends / (2 if has_twin else 1))
    )
    twin_SND = None
    if has_twin:
        with random_twin(loaded, seed=settings.seed) as twin:
            twin_SND = _vectors(twin, data, settings, part_of(progress, reading_ends / 2, reading_ends))
    with one_thread():
        layers = _probe_layers(vectors_SND, twin_SND, data, settings, part_of(progress, reading_ends, 0.95))
        fits = [_final_fit(x_ND, layers.labels_N, settings) for x_ND in vectors_SND]
    frame = table(layers, data)
    best = int(frame["accuracy"].to_numpy().argmax())
    chosen = best if settings.layer < 0 else settings.layer
    reading = _read_prompt(loaded, prompt, fits, data)
    return Result(
        frames={"main": frame, **_curves(frame), "prompt": reading, "tokens": _strip(reading, chosen)},
        views=views(data, chosen),
        metrics=metrics(frame, layers, best),
        provenance=provenance(
            loaded,
            prompt,
            method="linear_probe",
            settings=settings,
            started=started,
            conditions={
                "data": data.name,
                "data_fingerprint": data.fingerprint,
                "texts": len(data.texts),
                "groups": len(set(data.groups)),
            },
            exactness_gap=max(layers.gradient, *(one.gradient for one in fits)),
            exactness_check="largest |gradient| of any classifier's mean loss at its solution",
        ),
        notes=notes(data, layers, chosen),
        flags=layers.flags(frame),
    )


def _vectors(
    loaded: LoadedModel, data: Labelled, settings: LinearProbeSettings, progress: Progress
) -> Tensor:
    message = f"reading {len(data.texts)} texts"
    vectors = read_texts(loaded, data.texts, position=settings.position, progress=progress, message=message)
    return vectors.double()


def _probe_layers(
    vectors_SND: Tensor,
    twin_SND: Tensor | None,
    data: Labelled,
    settings: LinearProbeSettings,
    progress: Progress,
) -> Layers:
    """Out-of-fold predictions of all tasks at every layer."""
    generator = np.random.default_rng(settings.seed)
    labels_N = np.array([data.classes.index(label) for label in data.labels])
    unseen_N = unseen_groups(data.groups, labels_N, folds=settings.folds, generator=generator)
    seen_N = seen_groups(data.groups, labels_N, folds=settings.folds, generator=generator)
    shuffled_N = generator.permutation(labels_N)
    controls = [_control_labels(data, labels_N, generator) for _ in range(CONTROL_TASKS)]
    layers = Layers(labels_N, shuffled_N, np.stack(controls), data)

    def predict(x_ND: Tensor, *targets: Ints, fold_N: Ints) -> Ints:
        predicted_TN, gradient = out_of_fold(
            x_ND,
            np.stack(targets),
            fold_N,
            n_classes=len(data.classes),
            classifier=settings.classifier,
            l2=settings.l2 * x_ND.shape[1],
        )
        layers.gradient = max(layers.gradient, gradient)
        return predicted_TN

    for layer, x_ND in enumerate(vectors_SND):
        progress(layer, len(vectors_SND), f"training the probes of layer {layer}")
        unseen = predict(x_ND, labels_N, shuffled_N, fold_N=unseen_N)
        seen = predict(x_ND, *controls, fold_N=seen_N)
        twin = None if twin_SND is None else predict(twin_SND[layer], labels_N, fold_N=unseen_N)[0]
        layers.add(unseen, seen, twin)
    return layers


def _control_labels(data: Labelled, labels_N: Ints, generator: np.random.Generator) -> Ints:
    """A random label per group, drawn from the labels' own frequencies; never all alike."""
    groups = sorted(set(data.groups))
    while True:
        label_of = dict(zip(groups, generator.choice(labels_N, size=len(groups)), strict=True))
        control_N = np.array([label_of[group] for group in data.groups])
        if len(set(control_N.tolist())) > 1:
            return control_N


def _final_fit(x_ND: Tensor, labels_N: Ints, settings: LinearProbeSettings) -> Fit:
    """The classifier that reads the prompt: trained on all texts."""
    n_classes = int(labels_N.max()) + 1
    return fit(
        x_ND,
        labels_N[None],
        n_classes=n_classes,
        classifier=settings.classifier,
        l2=settings.l2 * x_ND.shape[1],
    )


def _read_prompt(loaded: LoadedModel, prompt: Prompt, fits: list[Fit], data: Labelled) -> pd.DataFrame:
    """What every layer's probe says at every position of the prompt: one row per layer and position."""
    encoded = encode(loaded, prompt)
    with loaded.lock, torch.inference_mode(), capture_residual(loaded) as residual:
        loaded.model(**encoded.inputs)
    parts = []
    for layer, (stream, fitted) in enumerate(zip(residual.values(), fits, strict=True)):
        p_PC = fitted.scores(stream[0].double().cpu())[0].softmax(-1).numpy()
        answer_P = p_PC.argmax(-1)
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "position": np.arange(encoded.n_tokens),
                    "token": encoded.texts,
                    "answer": np.array(data.classes, dtype=object)[answer_P],
                    "score": p_PC[:, -1] if len(data.classes) == 2 else p_PC.max(-1),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _strip(reading: pd.DataFrame, layer: int) -> pd.DataFrame:
    return reading[reading["layer"] == layer].reset_index(drop=True)


def _curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The table once more, one row per layer and series, for the line chart."""
    series = {
        "accuracy": "the label, new groups",
        "control_accuracy": "control task",
        "twin_accuracy": "random weights",
        "shuffled_accuracy": "shuffled labels",
        "majority": "majority label",
    }
    shown = frame[["layer", *(name for name in series if name in frame)]].rename(columns=series)
    return {"curves": shown.melt("layer", var_name="series", value_name="share_right")}
