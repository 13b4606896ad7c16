"""Two models on the same input: what must hold before one may be read beside the other."""

from __future__ import annotations

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
    encoded, other = encode(loaded, prompt), encode(reference, prompt)
    if encoded.ids != other.ids:
        raise BadInput(
            f"{loaded.ref} and {reference.ref} split this prompt into different tokens ({encoded.n_tokens} and "
            f"{other.n_tokens}); pick models with the same tokenizer"
        )
    return encoded


def conditions(encoded: Encoded, reference: LoadedModel, path: Fp32Path) -> dict[str, Any]:
    """What the numbers depend on beside the variant: the original, and how float32 was computed."""
    return {
        "tokens": encoded.n_tokens,
        "reference": str(reference.ref),
        "reference_fingerprint": reference.fingerprint,
        "fp32_path": path.name,
    }
