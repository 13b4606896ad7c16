"""Stand in for a model's attention kernel: see and change q, k, v and head outputs, whatever the architecture.

transformers hands every attention layer to a function registered by name, after projections, q/k norms and rotary
positions, before the output projection. Registering one more name gives q, k, v [batch, heads, position, head_dim]
and the heads' outputs of every decoder in one form, fused projections included, while all arithmetic stays the
model's own: the stand-in calls the kernel it replaces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from core.errors import CannotMeasure
from core.lazy import transformers

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

_NAME = "slimscope"
_TAKES_A_MASK = ("eager", "sdpa")
"""Kernels that take an explicit mask; others are replaced by sdpa, whose numbers are the same up to rounding."""

Kernel = Callable[..., "tuple[Tensor, Any]"]
"""(module, q, k, v, additive mask, **the module's own arguments) → heads' outputs [batch, position, heads, head_dim]."""
StandIn = Callable[
    [int, Kernel, Any, "Tensor", "Tensor", "Tensor", "Tensor | None", dict[str, Any]], "Tensor"
]
"""(layer, kernel, module, q, k, v, mask, arguments) → heads' outputs."""

_stand_ins: WeakKeyDictionary[Any, tuple[int, Kernel, StandIn]] = WeakKeyDictionary()


@contextmanager
def attention_by(loaded: LoadedModel, stand_in: StandIn) -> Iterator[None]:
    """Hand each attention layer of the model to ``stand_in`` while the block runs, then put its kernel back.

    Hold ``loaded.lock``. Raises ``CannotMeasure`` for an architecture whose attention cannot be replaced.
    """
    model = loaded.model
    name = model.config._attn_implementation
    _register()
    modules = [model.get_submodule(block.attention) for block in loaded.anatomy.blocks]
    for layer, module in enumerate(modules):
        _stand_ins[module] = (layer, _kernel_of(module, name), stand_in)
    model.set_attn_implementation(_NAME)
    try:
        if model.config._attn_implementation != _NAME:
            raise CannotMeasure(
                f"{loaded.anatomy.architecture} keeps its own attention code, so its heads cannot be replayed; "
                "open a model of another architecture"
            )
        yield
    finally:
        model.set_attn_implementation(name)
        for module in modules:
            _stand_ins.pop(module, None)


def _register() -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    if _NAME not in functions.valid_keys():
        masks = transformers.masking_utils
        functions.register(_NAME, _dispatch)
        masks.ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, masks.eager_mask)  # always explicit, additive


def _dispatch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    layer, kernel, stand_in = _stand_ins[module]
    return stand_in(layer, kernel, module, query, key, value, attention_mask, arguments), None


def _kernel_of(module: Any, name: str) -> Kernel:
    """The function that the name stands for in this module's own source file."""
    eager: Kernel | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CannotMeasure(
            f"{type(module).__name__} does not use transformers' attention interface, so its heads cannot be replayed; "
            "open a model of another architecture"
        )
    if name == "eager":
        return eager
    kernel: Kernel = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[
        name if name in _TAKES_A_MASK else "sdpa"
    ]
    return kernel
