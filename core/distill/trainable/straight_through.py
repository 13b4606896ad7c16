"""All that is quantized learned behind its rounding, every value on its own: as ``behind_rounding`` has it.

The exact weights are a float32 copy of all that is quantized.
"""

from __future__ import annotations

from core.distill.trainable.behind_rounding import behind_rounding
from core.distill.trainable.exact_weight import Whole
from core.distill.trainable.following import Following, forms_of, refuse_no_grid
from core.distill.trainable.full import small
from core.models.loaded import LoadedModel


def prepare(loaded: LoadedModel) -> Following:
    """All that is quantized, norms and biases; raises ``CannotCompress`` for a model that is not quantized."""
    refuse_no_grid(loaded, "straight_through")
    forms = {
        module: tuple(behind_rounding(form, Whole(form.dequantize().float())) for form in forms_of(packed))
        for module, packed in loaded.packed.items()
    }
    return Following(loaded, forms, small(loaded))
