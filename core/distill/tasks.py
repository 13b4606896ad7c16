"""Which task a training is of: what the rows ask decides, and the model is given what the task needs.

Labelled rows make a text classifier, with a new head where it has none of these classes; scored pairs train the sentence
vectors of an encoder, whose body stays as it is; text and conversations train the next token of a decoder.
"""

from __future__ import annotations

from collections.abc import Callable

from core.corpus.rows import Rows
from core.distill.classification_objective import ClassificationObjective
from core.distill.heads import give_class_head
from core.distill.losses.logit_gradient import Terms
from core.distill.losses.named import named
from core.distill.material import Material, Sides
from core.distill.objective import Objective
from core.distill.settings import DistilSettings, TrainingSettings
from core.distill.similarity_objective import SimilarityObjective
from core.distill.teaching import features, language_aim, matches_inside, plain_language_aim
from core.errors import BadInput, CannotCompress
from core.models.classify import class_names
from core.models.loaded import LoadedModel
from core.types import Progress

Aim = Callable[[], Objective]
ANSWERS = {"labelled": "classifier", "pairs": "encoder", "text": "decoder", "instruction": "decoder"}
"""Kind of rows → family of the model that learns from them."""


def prepare_student(loaded: LoadedModel, rows: Rows, settings: TrainingSettings) -> tuple[str, ...] | None:
    """Give the model what the rows' task needs; returns the classes in the order of its answers, if it has any.

    Raises ``BadInput`` or ``CannotCompress`` where this model cannot learn from such rows.
    """
    if rows.kind == "labelled":
        return give_class_head(loaded, rows.classes, seed=settings.seed)
    if loaded.family != ANSWERS[rows.kind]:
        need = {"decoder": "a decoder, e.g. demo:smollm2", "encoder": "an encoder, e.g. demo:minilm"}
        raise CannotCompress(
            f"{loaded.ref} is a {loaded.family}, and {rows.name} has {rows.kind} rows, from which "
            f"{need[ANSWERS[rows.kind]]} learns; name other rows, or another model"
        )
    return None


def plain_aim(loaded: LoadedModel, both: Sides) -> Aim:
    """How to make the objective of a training without a teacher."""
    kind = both.source.kind
    if kind == "labelled":
        terms = Terms(named("forward_kl"), kd_weight=0.0, task_weight=1.0)
        return lambda: ClassificationObjective(loaded, None, terms)
    if kind == "pairs":
        return lambda: SimilarityObjective(
            loaded, None, kd_weight=0.0, task_weight=1.0, scores=score_range(both.train)
        )
    return lambda: plain_language_aim(loaded)


def taught_as(student: LoadedModel, teacher: LoadedModel, settings: DistilSettings) -> None:
    """Give a student without a head its teacher's classes, where the teacher is a classifier."""
    if teacher.family == "classifier" and student.family != "classifier":
        give_class_head(student, class_names(teacher), seed=settings.seed)


def aim(
    student: LoadedModel,
    teacher: LoadedModel,
    both: Sides,
    read: Material,
    settings: DistilSettings,
    progress: Progress,
) -> tuple[Aim, tuple[str, ...]]:
    """How to make a student's objective, and notes.

    Raises ``BadInput`` where rows and models are of different tasks, or nothing is to be learned.
    """
    kind = both.source.kind
    if teacher.family != ANSWERS[kind]:
        raise BadInput(
            f"{both.source.name} has {kind} rows, and the teacher {teacher.ref} is a {teacher.family}: it has nothing to say "
            f"of them; give a {ANSWERS[kind]} as teacher, or rows of another kind"
        )
    if kind not in ("labelled", "pairs"):
        return language_aim(student, teacher, read, settings, progress)
    if not settings.kd_weight and not settings.task_weight and not matches_inside(settings):
        raise BadInput("every weight is 0: nothing would be learned; set kd_weight, task_weight or another")

    terms = Terms(
        named(settings.loss, beta=settings.beta, alpha=settings.alpha),
        settings.temperature,
        settings.kd_weight,
        settings.task_weight,
    )
    says = teacher if settings.kd_weight or matches_inside(settings) else None

    def made() -> Objective:
        inside = features(student, teacher, settings, count="tokens")
        if kind == "labelled":
            return ClassificationObjective(student, says, terms, features=inside)
        return SimilarityObjective(
            student, says, kd_weight=settings.kd_weight, task_weight=settings.task_weight,
            scores=score_range(both.train), features=inside,
        )  # fmt: skip

    return made, () if says else ("No loss against the teacher: this is plain training, the control.",)


def score_range(rows: Rows) -> tuple[float, float]:
    """The lowest and the highest score of the rows, which stand for cosines 0 and 1; raises ``BadInput`` for one score."""
    scores = [row.score for row in rows.rows]
    lowest, highest = min(scores), max(scores)
    if lowest == highest:
        raise BadInput(
            f"all {len(scores):,} pairs of {rows.name} have the score {lowest:g}; nothing is to be learned"
        )
    return lowest, highest
