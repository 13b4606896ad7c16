"""What a training is expected to take, what it is told, and what it should be held against, as plain functions.

An estimate from the model's measured pace; numbers that are compared are measured by the profile afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from app import format as fmt
from app.distil_views import STRUCTURAL, Student, student_of, training_index, work_share
from core.distill.settings import DistilSettings, TrainingSettings
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import Method

FULL, INPUT_ONLY, HEAD_ONLY = 3.0, 2.0, 1.1
"""A training pass in forward passes: with gradients of weights and inputs, of inputs alone, of the last matrix."""
PASSES = {"lora": INPUT_ONLY, "dora": INPUT_ONLY, "norms": INPUT_ONLY, "head": HEAD_ONLY}
MASTER_BYTES = 24
"""Of a trained number in float32: itself, its gradient, AdamW's two moments, the best so far, and what it was."""


@dataclass(frozen=True)
class Training:
    """An estimate of what a training takes on this machine; ``tokens`` is a limit, early stopping may end it before."""

    tokens: int
    tokens_per_s: float
    """Of the student's updates, the teacher's share aside where it runs beforehand."""
    teacher_s: float
    """Of the teacher's one pass over the text; 0 where it runs with every update, or there is none."""
    seconds: float
    memory_bytes: int
    cache_bytes: int
    """On disk, of the teacher's kept logits."""


def training_of(card: ModelCard, recipe: Recipe, *, n_tokens: int | None = None) -> Training | None:
    """What the recipe's training is expected to take; ``n_tokens`` are those of the data, where they are counted.

    None where nothing is known: no step that trains, no measured pace, or a student of unknown size. Text that a student
    generates itself (``on_policy``) is not counted.
    """
    at = training_index(recipe)
    student = student_of(card, recipe)
    if at is None or card.pace is None or student.parts is None:
        return None
    settings = recipe.steps[at].parsed()
    assert isinstance(settings, TrainingSettings)
    share = work_share(card, student.parts)
    rows = settings.micro_batch * min(settings.window, card.anatomy.context_length)
    forward_s = card.pace.seconds(rows) / rows
    # Updates behind a grid's rounding need the gradient of the whole weight.
    passes = PASSES.get(settings.train, FULL) if student.bits is None else FULL
    passes += 1.0 if settings.gradient_checkpointing else 0.0
    tokens = settings.max_tokens if n_tokens is None else min(settings.max_tokens, n_tokens * settings.epochs)
    live, cached = _teacher_passes(settings)
    per_token_s = forward_s * (share * passes + live)
    teacher_s = forward_s * min(tokens, n_tokens or tokens) * cached
    measured = 2 + (tokens // settings.evaluate_every if settings.evaluate_every else 0)
    held_out_s = measured * settings.held_out_tokens * forward_s * share
    held_out_s += settings.held_out_tokens * forward_s if live or cached else 0.0
    return Training(
        tokens,
        1 / per_token_s,
        teacher_s,
        tokens * per_token_s + teacher_s + held_out_s,
        _memory(card, student, settings, rows, teacher=bool(live or cached)),
        int(cached * min(tokens, n_tokens or tokens) * _cache_bytes(card, settings)),
    )


def _teacher_passes(settings: TrainingSettings) -> tuple[float, float]:
    """Forward passes of the teacher per token: with every update, and once beforehand."""
    if not isinstance(settings, DistilSettings):
        return 0.0, 0.0
    inside = any(getattr(settings, name) for name in STRUCTURAL)
    if inside or (settings.kd_weight and (settings.top_k == 0 or settings.on_policy == 1)):
        return 1.0, 0.0
    return (settings.on_policy, 1.0) if settings.kd_weight else (0.0, 0.0)


def _cache_bytes(card: ModelCard, settings: TrainingSettings) -> float:
    """Of one token: ids of 2 or 4 bytes, log-probabilities of 2, and the tail's; answers to whole texts stay in memory."""
    if not isinstance(settings, DistilSettings) or card.family != "decoder":
        return 0.0
    return settings.top_k * ((2 if card.anatomy.vocab_size <= 65_536 else 4) + 2) + 2


def _memory(
    card: ModelCard, student: Student, settings: TrainingSettings, rows: int, *, teacher: bool
) -> int:
    """Weights of both, gradients, moments, and what a micro-batch keeps for its backward pass."""
    assert student.parts is not None
    anatomy, n = card.anatomy, sum(student.parts.left.values())
    width = 2 if settings.precision == "bfloat16" else 4
    # About what a block of a Llama keeps per token: inputs and outputs of its matrices and norms, and the pattern.
    kept = 12 * anatomy.d_model + 5 * anatomy.d_ff * student.width + 2 * anatomy.n_heads * settings.window
    layers = 2 if settings.gradient_checkpointing else student.n_layers
    moved = n if settings.train in ("all", "straight_through") else 0.02 * n
    weights = n * 4 + moved * (MASTER_BYTES - 4) + (n * 2 if width == 2 else 0)
    return int(weights + (card.parameters * 4 if teacher else 0) + rows * layers * kept * width)


def training_lines(training: Training | None, *, counted: bool) -> list[str]:
    """The estimate in short sentences; ``counted`` where the data's tokens are known."""
    if training is None:
        return ["Time and memory not predicted"]
    most = "" if counted else " at most"
    pace = f"{fmt.count(training.tokens)} tokens{most} at ≈ {fmt.count(training.tokens_per_s)} tokens/s"
    lines = [f"{pace}: ≈ {fmt.seconds(training.seconds)} on this machine"]
    if training.teacher_s:
        lines.append(
            f"≈ {fmt.seconds(training.teacher_s)} of it for the teacher, once{'' if counted else ' over new text'}; "
            f"{fmt.size(training.cache_bytes)} kept on disk for other students{'' if counted else ', at most'}"
        )
    lines.append(f"≈ {fmt.size(training.memory_bytes)} of memory at the peak")
    return lines


def control_of(recipe: Recipe) -> Recipe | None:
    """The same student trained on the data alone; None where the recipe has no teacher."""
    at = training_index(recipe)
    if at is None or recipe.steps[at].method != "distil":
        return None
    plain = dict.fromkeys(("kd_weight", *STRUCTURAL), 0.0)
    step = recipe.steps[at].model_copy(
        update={"settings": {**recipe.steps[at].settings, **plain, "task_weight": 1.0}}
    )
    control = recipe.model_copy(update={"steps": (*recipe.steps[:at], step, *recipe.steps[at + 1 :])})
    return None if control == recipe else control


def equal_bytes(nbytes: float) -> Recipe:
    """The quantized model of so many bytes: the baseline a student has to beat."""
    return Recipe.of("mixed_precision", budget=f"{nbytes / 1e6:.2f}MB")


def sections_of(method: Method) -> dict[str, tuple[str, ...]]:
    """The settings of a training by what they are about; those under "" are always shown."""
    known = method.settings.model_fields
    wanted = {title: tuple(n for n in names if n in known) for title, names in SECTIONS.items()}
    placed = {name for names in wanted.values() for name in names}
    rest = tuple(name for name in known if name not in placed)
    found = {**wanted, "More": rest}
    return {title: names for title, names in found.items() if names}


SECTIONS: dict[str, tuple[str, ...]] = {
    "": ("data", "max_tokens", "loss", "train", "learning_rate", "teacher"),
    "Rows": ("held_out", "held_out_tokens", "epochs", "window", "packing"),
    "Distance to the teacher": (
        "temperature", "beta", "alpha", "kd_weight", "task_weight", "hidden_weight", "hidden_loss", "relation_weight",
        "relations", "relation_heads", "router_weight", "expert_weight", "expert_loss", "layer_map", "top_k",
        "teacher_precision", "on_policy",
    ),
    "Descent": (
        "batch_tokens", "micro_batch", "schedule", "warmup", "weight_decay", "clip", "precision",
        "gradient_checkpointing", "lora_rank", "lora_alpha", "lora_targets",
    ),
    "Watching it": ("evaluate_every", "patience", "samples", "checkpoint_minutes", "seed"),
}  # fmt: skip
