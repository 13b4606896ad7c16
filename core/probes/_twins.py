"""Two models on the same input: what must hold before one may be read beside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core.errors import BadInput
from core.probes._tokens import Encoded, encode
from core.registry import Example
from core.types import Prompt

if TYPE_CHECKING:
    from core.models.fp32_path import Fp32Path
    from core.models.loaded import LoadedModel

FACTS_AND_NAMES = Example(
    "Facts and names",
    Prompt(
        "The capital of France is Paris. The capital of Italy is Rome. When Mary and John went to the "
        "store, John gave a drink to Mary."
    ),
)


def encode_for_both(loaded: LoadedModel, reference: LoadedModel, prompt: Prompt) -> Encoded:
    """The prompt's tokens, which must be the same for both; raises ``BadInput`` where layers or tokens differ."""
    refuse_another_shape(loaded, reference)
    encoded, other = encode(loaded, prompt), encode(reference, prompt)
    refuse_other_tokens(loaded, reference, encoded.ids, other.ids)
    return encoded


def refuse_another_shape(loaded: LoadedModel, reference: LoadedModel) -> None:
    """Raise ``BadInput`` unless both models' layers can be laid side by side."""
    ours, theirs = loaded.anatomy, reference.anatomy
    for name, a, b in (
        ("family", ours.family, theirs.family),
        ("layers", ours.n_layers, theirs.n_layers),
        ("residual width", ours.d_model, theirs.d_model),
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
    ):
        if a != b:
            raise BadInput(
                f"{loaded.ref} and {reference.ref} differ in {name} ({a} and {b}), so their layers cannot be laid side "
                "by side; pick a variant of the same base that kept its shape, or compare both by evaluation"
            )


def refuse_other_tokens(
    loaded: LoadedModel, reference: LoadedModel, ours: Sequence[int], theirs: Sequence[int]
) -> None:
    """Raise ``BadInput`` unless both models split a text into the same tokens."""
    if list(ours) != list(theirs):
        raise BadInput(
            f"{loaded.ref} and {reference.ref} split this prompt into different tokens ({len(ours)} and "
            f"{len(theirs)}); pick models with the same tokenizer"
        )


def conditions(read: Mapping[str, Any], reference: LoadedModel, path: Fp32Path) -> dict[str, Any]:
    """What the numbers depend on beside the variant: what was ``read``, the original, and how float32 was computed."""
    return {
        **read,
        "reference": str(reference.ref),
        "reference_fingerprint": reference.fingerprint,
        "fp32_path": path.name,
    }
