"""What goes on inside a model in a forward pass, read without changing it and without cutting the gradient.

Two kinds of reads: what a module puts out (or reads), and the queries, keys and values of one attention layer as its
kernel gets them, after projections, norms and rotary positions. For the latter the layer's kernel is called through a
function of ours; mask and arithmetic stay the model's own, so the forward pass is the same to the last bit.

Hooks keep references and compute nothing: activations may be recomputed in the backward pass (gradient checkpointing),
when nothing is read any more.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from core.capture import HookDidNotFire, capture
from core.errors import CannotMeasure
from core.lazy import transformers
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "slimscope_reading"


@dataclass(frozen=True)
class Read:
    """One tensor: item ``item`` of the output (or inputs) of the module at ``path``."""

    path: str
    inputs: bool = False
    item: int = 0


@dataclass(frozen=True)
class ReadAttention:
    """What the kernel of one attention layer is called with."""

    path: str


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries [B, H, P, K], keys and values [B, G, P, K] of a layer; scores are softcap(q · k · scaling)."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None


Reads = dict[Read | ReadAttention, Any]
"""What was read: a tensor per ``Read``, ``Heads`` per ``ReadAttention``."""


@contextmanager
def reading(loaded: LoadedModel, reads: Iterable[Read | ReadAttention]) -> Iterator[Reads]:
    """Collect ``reads`` during one forward pass inside the block, in autograd's graph where gradients are on.

    The dict is filled when the block ends. Hold ``loaded.lock``. Raises ``HookDidNotFire`` where a module did not run,
    ``CannotMeasure`` where attention is not called through transformers' interface.
    """
    wanted = tuple(dict.fromkeys(reads))
    found: Reads = {}
    with ExitStack() as hooks:
        of_modules: list[tuple[Read, dict[str, Any]]] = []
        for read in wanted:
            if isinstance(read, ReadAttention):
                hooks.enter_context(_kernel_calls(loaded, read, found))
            else:
                values = capture(
                    loaded.model, [read.path], inputs=read.inputs, item=read.item, keep_graph=True
                )
                of_modules.append((read, hooks.enter_context(values)))
        yield found
        found.update({read: values[read.path] for read, values in of_modules if values})


_reading: WeakKeyDictionary[Any, tuple[Callable[..., Any], Callable[[Heads], None]]] = WeakKeyDictionary()
"""Attention module → the kernel it had, and who is told what it is called with."""


@contextmanager
def _kernel_calls(loaded: LoadedModel, read: ReadAttention, found: Reads) -> Iterator[None]:
    module = loaded.model.get_submodule(read.path)
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    if _NAME not in functions.valid_keys():
        functions.register(_NAME, _call)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None or not hasattr(module, "config"):
        raise CannotMeasure(
            f"{type(module).__name__} does not use transformers' attention interface, so its queries, keys and values "
            "cannot be read; set relation_weight=0"
        )
    own = module.config
    _reading[module] = (
        functions.get_interface(own._attn_implementation, eager),
        lambda heads: found.__setitem__(read, heads),
    )
    # Only this layer sees the copy: the model goes on making the mask that its own kernel wants.
    module.config = copy.copy(own)
    module.config._attn_implementation = _NAME
    try:
        yield
    finally:
        module.config = own
        _reading.pop(module)
    if read not in found:
        raise HookDidNotFire(f"{read.path} was read but its attention never ran")


def _call(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **arguments: Any) -> Any:
    kernel, tell = _reading[module]
    scaling = arguments.get("scaling")
    tell(
        Heads(
            query,
            key,
            value,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            arguments.get("softcap"),
        )
    )
    return kernel(module, query, key, value, *args, **arguments)
