"""Whether one model can teach another: the same tokens, and a teacher that is not the smaller one.

Logits, hidden states and relations are compared token by token, so both models must cut a text into the same pieces
with the same numbers. What is not known here is how a student was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import BadInput
from core.models.loaded import LoadedModel

ALLOWED_LARGER = 1.05
"""An upcycled student has routers, and a classifier a head, that its teacher has not."""
SAMPLES = (
    "The capital of France is Paris. ", "  def f(x):\n\treturn x**2  # naïve\n\n", "ΑΒΓ 東京 привет 🙂", "1234567.89e-10",
    "DON'T   stop\r\n",
)  # fmt: skip
"""Texts that tokenizers of equal tokens cut differently where they treat spaces, case, accents or digits otherwise."""


def refuse_unfit(student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise ``BadInput`` where the teacher cannot teach this student, with the reason."""
    if student.family != teacher.family:
        raise BadInput(
            f"{teacher.ref} is a model of family {teacher.family} and {student.ref} of family {student.family}: what they "
            "give is not comparable; choose a teacher of the student's family"
        )
    shared_vocabulary(student, teacher)
    refuse_larger(student, teacher)


def refuse_larger(student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise ``BadInput`` where the student is the larger model: of a mixture, what a token of one expert passes counts."""
    ours, theirs = _smallest(student), sum(p.numel() for p in teacher.model.parameters())
    if ours > ALLOWED_LARGER * theirs:
        raise BadInput(
            f"the teacher {teacher.ref} has {theirs / 1e6:.1f} M parameters and its student {student.ref} "
            f"{ours / 1e6:.1f} M: a student learns from a larger model; exchange the two, or choose another teacher"
        )


def shared_vocabulary(student: LoadedModel, teacher: LoadedModel) -> int:
    """How many of both models' logits speak of the same tokens: the first so many. Raises ``BadInput`` where none do.

    Models of one tokenizer may be padded to different sizes (151,936 and 152,064 rows within one family); rows behind
    the tokenizer's last token mean nothing, and those that only one model has are left out of a comparison.
    """
    ours, theirs = (_known_tokens(loaded) for loaded in (student, teacher))
    different = [token for token, number in ours.items() if theirs.get(token) != number]
    different += [token for token in theirs if token not in ours]
    if different:
        example = different[0]
        raise BadInput(
            f"the tokenizers of {student.ref} ({len(ours):,} tokens) and {teacher.ref} ({len(theirs):,}) differ in "
            f"{len(different):,} tokens: {example!r} is number {ours.get(example, 'none')} in one and "
            f"{theirs.get(example, 'none')} in the other. Logits of different tokens cannot be compared; choose a teacher "
            "with the student's tokenizer"
        )
    for text in SAMPLES:
        one, other = (_ids(loaded.tokenizer, text) for loaded in (student, teacher))
        if one != other:
            raise BadInput(
                f"the tokenizers of {student.ref} and {teacher.ref} know the same tokens and cut {text!r} differently, into "
                f"{len(one)} and {len(other)}; choose a teacher with the student's tokenizer"
            )
    shared = min(student.anatomy.vocab_size, teacher.anatomy.vocab_size)
    if shared <= max(ours.values()):
        raise BadInput(
            f"the tokenizer of {student.ref} knows {max(ours.values()) + 1:,} tokens, and one of the models only "
            f"{shared:,}; choose models that have a row for every token"
        )
    return shared


def _known_tokens(loaded: LoadedModel) -> Mapping[str, int]:
    if loaded.tokenizer is None:
        raise BadInput(
            f"{loaded.ref} has no tokenizer, so it cannot be compared token by token; choose a text model"
        )
    known: Mapping[str, int] = loaded.tokenizer.get_vocab()
    return known


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _smallest(loaded: LoadedModel) -> int:
    """Parameters that a token passes which is routed to one expert of each layer."""
    total = sum(int(parameter.numel()) for parameter in loaded.model.parameters())
    for block in loaded.anatomy.blocks:
        if block.experts is not None:
            of_experts = sum(int(p.numel()) for p in loaded.model.get_submodule(block.experts).parameters())
            total -= of_experts * (loaded.anatomy.n_experts - 1) // loaded.anatomy.n_experts
    return total
