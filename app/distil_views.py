"""What the Distil page shows of a student before it exists, as plain functions: its blocks, its sizes, what training takes.

Everything here is counted from a model card and a recipe; what only a run can tell is said not to be known.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from app import format as fmt
from core.compress.drop_layers import DropLayersSettings, named_blocks
from core.distill.layer_map import LayerMap
from core.distill.settings import DistilSettings
from core.errors import SlimscopeError
from core.models.anatomy import Anatomy
from core.models.sizes import ModelCard
from core.prediction import Parts, predicted_parts
from core.recipe import Recipe, Step
from core.registry import get
from core.reshape.depth import evenly

TRAINING = ("distil", "fine_tune")
"""Steps that train: the steps before them make the student."""
IN_BLOCKS = ("attention", "mlp", "router", "experts", "shared_expert", "norm")
MATRICES = ("attention", "mlp", "experts", "shared_expert", "head")
"""Components whose work grows with their size; an embedding is looked up."""
TEXT = ("pydoc", "stdlib", "domain")
"""How sources of plain text begin that are no file of the user's."""
STRUCTURAL = ("hidden_weight", "relation_weight", "router_weight", "expert_weight")
"""Weights of losses for which the teacher must run at every update."""


# --- the student ----------------------------------------------------------------------------------------


def training_index(recipe: Recipe) -> int | None:
    """The place of the step that trains; None where none does."""
    return next((at for at, step in enumerate(recipe.steps) if step.method in TRAINING), None)


@dataclass(frozen=True)
class Student:
    """A student before its training, beside its teacher."""

    kept: tuple[int, ...] | None
    """The teacher's blocks that it is made of; None where only the step itself can tell."""
    n_layers: int
    targets: tuple[int, ...] | None
    """Per student block, the teacher block whose output it is to give; None where hidden states are not compared."""
    parts: Parts | None
    """Components of both; None where a step does not say what it leaves."""
    width: float
    """Share of a block's numbers that a student block has, 0–1."""
    bits: float | None
    """Bits per number of the student's blocks where they are stored on a grid."""
    changed: tuple[str, ...]
    """Titles of the steps that make it."""


def student_of(card: ModelCard, recipe: Recipe) -> Student:
    """The student that a recipe's steps before its training make."""
    anatomy, at = card.anatomy, training_index(recipe)
    before = recipe.steps[: len(recipe.steps) if at is None else at]
    kept: tuple[int, ...] | None = tuple(range(anatomy.n_layers))
    n_layers = anatomy.n_layers
    for step in before:
        settings = step.parsed()
        if isinstance(settings, DropLayersSettings):
            kept = None if kept is None or n_layers != anatomy.n_layers else kept_blocks(anatomy, settings)
            n_layers = max(1, n_layers - settings.count) if kept is None else len(kept)
        elif "layers" in type(settings).model_fields and "hidden_size" in type(settings).model_fields:
            kept, n_layers = None, int(getattr(settings, "layers", 0)) or n_layers
    parts = predicted_parts(card, before)
    width, bits = 1.0, None
    if parts is not None:
        of_blocks = [c for c in parts.before if c in IN_BLOCKS]
        whole = sum(parts.before[c] for c in of_blocks) * n_layers / anatomy.n_layers
        left = {c: parts.left[c] for c in of_blocks}
        width = min(1.0, sum(left.values()) / whole) if whole else 1.0
        mean = sum(n * parts.bits[c] for c, n in left.items()) / max(1.0, sum(left.values()))
        bits = mean if mean < 16 else None
    titles = tuple(get("compress", step.method).title for step in before)
    return Student(kept, n_layers, _targets(anatomy, recipe, kept, n_layers), parts, width, bits, titles)


def kept_blocks(anatomy: Anatomy, settings: DropLayersSettings) -> tuple[int, ...] | None:
    """The blocks that stay, where their place decides; None where text or a seed does, or the step will be refused."""
    try:
        gone = named_blocks(anatomy, settings)
    except SlimscopeError:
        return None
    return None if gone is None else tuple(layer for layer in range(anatomy.n_layers) if layer not in gone)


def _targets(
    anatomy: Anatomy, recipe: Recipe, kept: tuple[int, ...] | None, n_layers: int
) -> tuple[int, ...] | None:
    at = training_index(recipe)
    settings = None if at is None else recipe.steps[at].parsed()
    if not isinstance(settings, DistilSettings) or not any(getattr(settings, name) for name in STRUCTURAL):
        return None
    try:
        if settings.layer_map == "auto":
            twins = evenly(n_layers, anatomy.n_layers) if kept is None else kept
            return LayerMap(twins, anatomy.n_layers, "taken").outputs
        if settings.layer_map in ("even", "last"):
            maker = LayerMap.even if settings.layer_map == "even" else LayerMap.last
            return maker(n_layers, anatomy.n_layers).outputs
        return LayerMap.listed(settings.layer_map, n_layers, anatomy.n_layers).outputs
    except SlimscopeError:
        return None  # the step will refuse it, with the reason


def toggled(recipe: Recipe, card: ModelCard, block: int) -> Recipe | None:
    """The recipe after a click on a teacher's block: dropped if it was kept, kept if it was dropped.

    The step that drops then names its blocks. None where no step drops blocks, it is not known which, or none would be left.
    """
    at = next((i for i, step in enumerate(recipe.steps) if step.method == "drop_layers"), None)
    student = student_of(card, recipe)
    if at is None or student.kept is None:
        return None
    n = card.anatomy.n_layers
    gone = sorted(set(range(n)).difference(student.kept) ^ {block})
    if not 0 < len(gone) < n:
        return None
    settings = {
        **recipe.steps[at].settings,
        "criterion": "listed",
        "count": len(gone),
        "layers": ", ".join(map(str, gone)),
        "keep_ends": 0 not in gone and n - 1 not in gone,
    }
    steps = [*recipe.steps[:at], Step(method="drop_layers", settings=settings), *recipe.steps[at + 1 :]]
    return Recipe.parse({"steps": [step.model_dump() for step in steps], "calibration": recipe.calibration})


def misfit(card: ModelCard, recipe: Recipe) -> str | None:
    """Why a model cannot learn from the rows that come with Slimscope; None where it can, or only the file can tell."""
    at = training_index(recipe)
    assert at is not None, "the page shows recipes that train"
    step, family = recipe.steps[at], card.family
    data = str(step.settings["data"]).strip()
    if data.startswith(TEXT) and family != "decoder":
        rows = "of two texts and a score" if family == "encoder" else "with a text and a label"
        return (
            f"{data} is plain text, from which a decoder learns; for this {family} name a file of rows {rows}"
        )
    own_head = step.settings.get("teacher", "auto") == "auto" and family != "classifier"
    if data.startswith("builtin:") and step.method == "distil" and own_head and step.settings["kd_weight"]:
        return f"{data} has labels, of which this {family} says nothing; make the teacher of a task first, then its students"
    return None


# --- sizes ----------------------------------------------------------------------------------------------


def parts_frame(card: ModelCard, parts: Parts) -> pd.DataFrame:
    """One row per component: numbers and megabytes of teacher and student, and the student's share of the bytes.

    The teacher's bytes are its share of the files that were opened; the student's those of what will be stored.
    """
    width = card.file_bytes / sum(parts.before.values())
    rows = [
        {
            "component": fmt.label(component),
            "teacher": n,
            "student": parts.left[component],
            "bits": parts.bits[component],
            "teacher_mb": n * width / 1e6,
            "student_mb": parts.left[component] * parts.bits[component] / 8e6,
        }
        for component, n in parts.before.items()
    ]
    frame = pd.DataFrame(rows).sort_values("teacher_mb", ascending=False, ignore_index=True)
    frame["share"] = frame["student_mb"] / frame["teacher_mb"]
    return frame


def work_share(card: ModelCard, parts: Parts) -> float:
    """Work of one token in the student as a share of the teacher's: numbers of the matrices it passes."""

    def work(numbers: dict[str, float]) -> float:
        active = card.anatomy.experts_per_token / card.anatomy.n_experts if card.anatomy.n_experts else 1.0
        if parts.left.get("router") == 0 and numbers is parts.left:
            active = 1.0  # made dense: every token passes all that is left
        head = numbers.get("embedding", 0.0) if card.anatomy.tied else 0.0
        return head + sum(n * (active if c == "experts" else 1) for c, n in numbers.items() if c in MATRICES)

    whole = work(parts.before)
    return work(parts.left) / whole if whole else 1.0


# --- in words -------------------------------------------------------------------------------------------


def size_line(card: ModelCard, student: Student) -> str:
    """Numbers and bytes of the student against the teacher's; of the file as it will be stored."""
    if student.parts is None:
        return "Size not known before the steps run"
    n = sum(student.parts.left.values())
    return (
        f"{fmt.count(n)} of {fmt.count(card.parameters)} parameters, about {fmt.size(student.parts.bytes)}, "
        f"{student.parts.bytes / card.file_bytes:.0%} of the teacher's {fmt.size(card.file_bytes)}"
    )


def speed_line(card: ModelCard, student: Student) -> str:
    """What one token costs, and the pace this promises: an estimate from the teacher's measured one."""
    if student.parts is None or card.pace is None or card.pace.per_token_s <= 0:
        return "Speed not predicted"
    share = work_share(card, student.parts)
    now = 1 / card.pace.per_token_s
    return (
        f"{share:.0%} of the teacher's work per token: an estimated {fmt.count(now / share)} tokens/s read, the teacher "
        f"{fmt.count(now)} ({card.pace.threads} thread{'s' * (card.pace.threads > 1)}, float32)"
    )
