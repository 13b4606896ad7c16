"""Which aim a student has: made of the settings, of what the student is, and of what kind of rows it reads.

A teacher whose top-k answers are kept runs once over the training rows, and its answers are shared by every student
that reads them. Losses on what goes on inside need it to run at every update; texts that a student writes itself, at
those updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.distill.features.feature_match import FeatureMatch, feature_match
from core.distill.language_objective import LanguageObjective
from core.distill.layer_map import layer_map
from core.distill.live_teacher import LiveTeacher, Teacher
from core.distill.losses.logit_gradient import Terms
from core.distill.losses.named import named
from core.distill.material import Material
from core.distill.objective import Objective
from core.distill.on_policy import OnPolicy
from core.distill.processes import Processes
from core.distill.settings import DistilSettings
from core.distill.students import shared_vocabulary
from core.distill.teacher_cache import TeacherCache, build
from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.types import Progress

if TYPE_CHECKING:
    from core.distill.features.feature_match import Counted

INSIDE = ("hidden_weight", "relation_weight", "router_weight", "expert_weight")


def language_aim(
    student: LoadedModel,
    teacher: LoadedModel,
    read: Material,
    settings: DistilSettings,
    progress: Progress,
) -> tuple[Callable[[], Objective], tuple[str, ...]]:
    """How to make a decoder's objective, and notes; reads the training rows with the teacher where that is kept.

    Raises ``BadInput`` where nothing is to be learned, or the teacher speaks of other tokens.
    """
    if not settings.kd_weight and not settings.task_weight and not matches_inside(settings):
        raise BadInput("every weight is 0: nothing would be learned; set kd_weight, task_weight or another")
    vocabulary = shared_vocabulary(student, teacher)
    live = LiveTeacher(teacher, vocabulary=vocabulary)
    taught_by, notes = _teacher(live, read, settings, progress)
    terms = Terms(
        named(settings.loss, beta=settings.beta, alpha=settings.alpha),
        settings.temperature,
        settings.kd_weight,
        settings.task_weight,
    )

    writes_itself = settings.kd_weight > 0 and settings.on_policy > 0

    def aim() -> Objective:
        return LanguageObjective(
            student, taught_by, terms, held_out_teacher=live, vocabulary=vocabulary,
            features=features(student, teacher, settings, count="targets"),
            on_policy=OnPolicy(student, live, settings.on_policy) if writes_itself else None,
        )  # fmt: skip

    return aim, notes


def plain_language_aim(student: LoadedModel) -> Objective:
    """The objective of a decoder without a teacher: the next token."""
    terms = Terms(named("forward_kl"), kd_weight=0.0, task_weight=1.0)
    return LanguageObjective(student, None, terms)


def matches_inside(settings: DistilSettings) -> bool:
    """Whether anything but what models say is compared."""
    return any(getattr(settings, name) for name in INSIDE)


def features(
    student: LoadedModel, teacher: LoadedModel, settings: DistilSettings, *, count: Counted
) -> FeatureMatch | None:
    """The losses on what goes on inside that the settings weigh; None where there are none."""
    if not matches_inside(settings):
        return None
    return feature_match(
        student, teacher, layer_map(settings.layer_map, student, teacher), count=count,
        hidden_weight=settings.hidden_weight, hidden_loss=settings.hidden_loss,
        relation_weight=settings.relation_weight, relations=settings.relations,
        relation_heads=settings.relation_heads, router_weight=settings.router_weight,
        expert_weight=settings.expert_weight, expert_loss=settings.expert_loss,
    )  # fmt: skip


def _teacher(
    live: LiveTeacher, read: Material, settings: DistilSettings, progress: Progress
) -> tuple[Teacher | None, tuple[str, ...]]:
    """Who answers for training rows: nobody, the teacher itself, or what was kept of it."""
    always = not settings.top_k or settings.on_policy == 1
    if matches_inside(settings) or (settings.kd_weight and always):
        return live, ("The teacher ran at every update, over the whole vocabulary.",)
    if not settings.kd_weight:
        return None, ("No loss against the teacher: this is plain training, the control.",)
    with Processes().first_goes_first():
        kept: TeacherCache = build(
            live, read.training, top_k=settings.top_k, temperature=settings.temperature,
            progress=progress,
        )  # fmt: skip
    said = (
        f"The teacher read the training rows once: its {kept.key.top_k} likeliest tokens and the mass of all others are "
        f"kept for each target, {kept.bytes_per_token} bytes each, {kept.nbytes / 1e6:.1f} MB. The loss over them is a "
        "lower bound of the one over the whole vocabulary; what is held out is measured over all of it."
    )
    return kept, (said,)
