"""Students and teachers of a tiny family, batches of one, and one forward pass of both."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from core.corpus.batches import IGNORE, Batch
from core.distill.features.feature_match import FeatureMatch, Matched
from core.models.loaded import LoadedModel
from tests.tiny import tiny_model

LENGTHS = (7, 5)


def twin(loaded: LoadedModel) -> LoadedModel:
    """A second model with the same weights."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def other(loaded: LoadedModel, *, seed: int = 1, by: float = 0.02) -> LoadedModel:
    """A second model whose weights are some way off."""
    found = twin(loaded)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return found


def text(length: int, seed: int) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(5, 512, (length,), generator=torch.Generator().manual_seed(seed))


def alone(ids: torch.Tensor, *, prompt: int = 0) -> Batch:
    """One text in a row of its own, of which the first tokens are given and not learned."""
    targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
    targets[: max(0, prompt - 1)] = IGNORE
    ones, places = torch.ones_like(ids), torch.arange(len(ids))
    return Batch(ids[None], ones[None], places[None], targets[None], torch.zeros(1, dtype=torch.long))


def packed(parts: list[Batch], *, padding: int = 0) -> Batch:
    """Rows of one text each end to end in one row, with padding behind."""
    n = sum(part.ids_BP.shape[1] for part in parts)
    segments = [torch.full_like(part.ids_BP, number) for number, part in enumerate(parts, 1)]
    empty = torch.zeros(1, padding, dtype=torch.long)
    return Batch(
        torch.cat([*(part.ids_BP for part in parts), empty + 9], 1),
        torch.cat([*segments, empty], 1),
        torch.cat([*(part.positions_BP for part in parts), torch.arange(padding)[None] + n], 1),
        torch.cat([*(part.targets_BP for part in parts), empty + IGNORE], 1),
        torch.zeros(1, dtype=torch.long),
    )


def batch() -> Batch:
    """Two texts and padding in one row."""
    return packed([alone(text(n, n)) for n in LENGTHS], padding=3)


def matched(match: FeatureMatch, of: Batch) -> Matched:
    """One forward pass of both models, and the loss; the student's parameters collect gradients where they want them."""
    with match.captured():
        with torch.no_grad():
            match.teacher.model(**of.inputs(match.teacher.family))
        match.student.model(**of.inputs(match.student.family))
    return match.loss(of)


def gradients(student: LoadedModel, found: Matched) -> list[torch.Tensor]:
    """Of the loss by every parameter of the student that it depends on."""
    wanted = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(found.loss, wanted, allow_unused=True) if g is not None]


def pair(family: str) -> tuple[LoadedModel, LoadedModel]:
    """A trainable student some way off its teacher."""
    teacher = tiny_model(family)
    student = other(teacher)
    student.model.requires_grad_(True)
    return student, teacher
