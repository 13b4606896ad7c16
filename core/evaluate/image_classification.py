"""Image-classification quality of a variant against its base: KL, agreement, accuracy and flips over labelled pictures.

Knows logits and labels. How a picture becomes pixel values is ``core.images``' knowledge. Legend: N pictures, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput, CannotMeasure
from core.evaluate._class_scores import by_class, class_metrics, flip, scores_of
from core.evaluate._comparison import provenance
from core.evaluate._intervals import Bootstrap, Floats, Interval
from core.images.classes import class_logits, refuse_without_classes
from core.images.labelled import LabelledImages
from core.images.pixels import to_pixels
from core.journal import Journal
from core.lazy import torch
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Progress, Result, View, content_hash

if TYPE_CHECKING:
    from torch import Tensor

    from core.images.pictures import Picture

BATCH = 32
MAX_ROWS = 2000
"""Pictures kept in the result's table: those that moved most."""
PROTOCOL_TEXT = (
    "Both models see the same pictures, each processed by its own checkpoint's image processor. KL: KL(base || variant) "
    "of the class distribution, nats, mean over pictures. Top-1 agreement: share of pictures where both models rank the "
    "same class first. Accuracy: share where the first class is the label. Flips: share where exactly one of the two "
    "models is right. Intervals: 95 %, pictures resampled, both models on the same draws."
)
PROTOCOL = f"image classification, version 1 ({content_hash(PROTOCOL_TEXT)[:8]})"


class ImageClassificationSettings(Settings):
    """How many pictures."""

    max_images: int = Field(1000, ge=8, le=100_000, description="Pictures used, the first of the set")
    bootstrap_draws: int = Field(
        2000, ge=500, le=100_000, description="Resamplings of pictures for the intervals"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the resampling")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


@method(
    "evaluate",
    title="Image classification",
    needs=("vision",),
    paper="Dutta et al., Accuracy is Not All You Need, arXiv:2407.09141",
)
def run(
    base: LoadedModel,
    variant: LoadedModel,
    images: LabelledImages,
    journal: Journal,
    progress: Progress,
    settings: ImageClassificationSettings,
) -> Result:
    """How far a variant's class predictions moved from its base's, and how many pictures it still names right.

    KL(base‖variant) = Σ p ln(p/q) over the classes, in nats per picture, says how far the predicted distribution moved;
    agreement and flips count pictures where the answer changed, and where it changed between right and wrong; accuracy
    is against the labels. Intervals resample pictures; the difference in accuracy is resampled in pairs.

    Finished batches are kept in ``journal``. Raises ``BadInput`` for labels that are no classes of the model and for a
    variant with other classes, ``CannotMeasure`` for a model without a classifier and for logits that are not numbers.
    """
    began = time.perf_counter()
    classes = _classes(base, variant)
    label_N = _labels(classes, images, base)
    with fast_fp32(settings.fp32_path) as path:
        asked = [
            PROTOCOL,
            base.fingerprint,
            base.dtype,
            variant.fingerprint,
            variant.dtype,
            base.device,
            path.name,
        ]
        scores = _score(base, variant, images, label_N, journal, progress, asked)
    bootstrap = Bootstrap(len(label_N), draws=settings.bootstrap_draws, seed=settings.seed, unit="pictures")
    one_N = np.ones(len(label_N))

    def share(hits_N: Floats) -> Interval:
        return bootstrap.share(hits_N, one_N, of="pictures")

    frame = _frame(images, classes, scores)
    return Result(
        frames={"images": frame.head(MAX_ROWS), "classes": by_class(frame, counted="pictures")},
        views=_VIEWS,
        metrics=class_metrics(
            scores, label_N, bootstrap, example="picture", share=share, same=variant is base
        ),
        provenance=provenance(
            base,
            variant,
            images,
            method="image_classification",
            protocol=PROTOCOL,
            settings=settings,
            began=began,
            role="images",
            conditions={"pictures": len(label_N), "classes": len(classes), "fp32_path": path.name},
        ),
    )


_VIEWS = (
    View(
        "table",
        x="image",
        y="kl",
        text="label",
        frame="images",
        title="Pictures whose prediction moved most",
        unit="nats",
        tooltip=("answer_base", "answer", "p_label_base", "p_label", "flip"),
    ),
    View(
        "bar",
        x="label",
        y="accuracy",
        frame="classes",
        title="Accuracy of the variant by class",
        unit="share",
        tooltip=("pictures", "accuracy_base", "kl"),
    ),
)


def _classes(base: LoadedModel, variant: LoadedModel) -> list[str]:
    """The class names, by index, that both models share."""
    for loaded in (base, variant):
        refuse_without_classes(loaded)
    first, second = (
        {int(n): str(name) for n, name in m.model.config.id2label.items()} for m in (base, variant)
    )
    if first != second:
        raise BadInput(
            f"{base.ref} and {variant.ref} do not name the same classes ({len(first)} and {len(second)}); "
            "choose a variant of this base"
        )
    return [first[n] for n in range(len(first))]


def _labels(classes: list[str], images: LabelledImages, base: LoadedModel) -> NDArray[np.int64]:
    """Each picture's class index; a label may be a class's name or its number."""
    index = {**{str(n): n for n in range(len(classes))}, **{name: n for n, name in enumerate(classes)}}
    unknown = sorted(set(images.labels) - set(index))
    if unknown:
        known = ", ".join(classes[:5])
        raise BadInput(
            f"{images.name}: {unknown[0]!r} is no class of {base.ref}, which knows {len(classes)}: {known} …; "
            "name the subfolders by class name or number"
        )
    return np.array([index[label] for label in images.labels])


def _score(
    base: LoadedModel,
    variant: LoadedModel,
    images: LabelledImages,
    label_N: NDArray[np.int64],
    journal: Journal,
    progress: Progress,
    asked: list[Any],
) -> pd.DataFrame:
    """One row per picture: both answers, both probabilities of the label, and the KL; from the journal where it is there."""
    rows: dict[str, list[float]] = {}
    n = len(label_N)
    for start in range(0, n, BATCH):
        stop = min(start + BATCH, n)
        progress(start, n, f"picture {start + 1} of {n}")
        key = content_hash([asked, list(images.fingerprints[start:stop]), label_N[start:stop].tolist()])
        batch = journal.get(key)
        if batch is None:
            batch = _score_batch(base, variant, images.read(start, stop), label_N[start:stop])
            journal.put(key, batch)
        for name, values in batch.items():
            rows.setdefault(name, []).extend(values)
    return pd.DataFrame(rows)


def _score_batch(
    base: LoadedModel, variant: LoadedModel, pictures: Sequence[Picture], label_B: NDArray[np.int64]
) -> dict[str, list[float]]:
    log_p_BC = _log_p(base, pictures)
    log_q_BC = log_p_BC if variant is base else _log_p(variant, pictures)
    return scores_of(log_p_BC, log_q_BC, label_B)


def _log_p(loaded: LoadedModel, pictures: Sequence[Picture]) -> Tensor:
    """Log probabilities [B, C] in float64 on the CPU."""
    pixels = to_pixels(loaded, pictures)
    with loaded.lock, torch.inference_mode():
        try:
            logits_BC = class_logits(loaded, pixels.values_NCHW)
        except CannotMeasure as error:
            raise CannotMeasure(f"pictures {pictures[0].name} to {pictures[-1].name}: {error}") from None
    return logits_BC.cpu().double().log_softmax(-1)


def _frame(images: LabelledImages, classes: list[str], scores: pd.DataFrame) -> pd.DataFrame:
    """One row per picture, the one that moved most first."""
    label = pd.Series(images.labels)
    names = np.array(classes, dtype=object)
    answer_base, answer = names[scores["top_base"].astype(int)], names[scores["top"].astype(int)]
    was, is_ = answer_base == label, answer == label
    frame = pd.DataFrame(
        {
            "image": images.sources,
            "label": label,
            "answer_base": answer_base,
            "answer": answer,
            "flip": flip(was, is_),
            **{name: scores[name] for name in ("p_label_base", "p_label", "kl")},
        }
    )
    return frame.sort_values("kl", ascending=False, kind="stable", ignore_index=True)
