"""Weights in two precisions: what the model computes with, and the float32 values that updates add up in.

An update is smaller than half a unit in the last place of a bfloat16 weight for most of a training: added to the
weight itself it would be lost. So a parameter that is not float32 gets a float32 value beside it (``exact``), which
collects its gradients, is updated, and is then rounded into the parameter. Knows no optimizer and no data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core.distill.settings import Precision
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor


class Narrowed:
    """A model whose float32 parameters were cast to bfloat16, in place, so that ties hold; ``restore`` brings them back.

    Buffers (rotary frequencies) stay. What bfloat16 holds exactly is not kept twice.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rounded: dict[int, tuple[Any, Tensor]] = {}
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                narrow = parameter.data.to(torch.bfloat16)
                if not torch.equal(narrow.float(), parameter.data):
                    self._rounded[id(parameter)] = parameter, parameter.data
                parameter.data = narrow

    def forget(self, parameters: Iterable[Any]) -> None:
        """Keep nothing of these: somebody else knows their values."""
        for parameter in parameters:
            self._rounded.pop(id(parameter), None)

    def restore(self) -> None:
        """Float32 again, with the values there were."""
        for parameter, data in self._rounded.values():
            parameter.data = data
        for parameter in self._model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


@contextmanager
def computing_in(loaded: LoadedModel | None, precision: Precision) -> Iterator[None]:
    """A model that is only read, in this precision for as long as the block lasts; None is no model."""
    narrowed = None if loaded is None or precision == "float32" else Narrowed(loaded.model)
    try:
        yield
    finally:
        if narrowed is not None:
            narrowed.restore()


class Weights:
    """The parameters that are trained, by name, and the float32 values they follow.

    With ``bfloat16`` the whole model is cast. ``release`` gives it float32 parameters back: the trained ones as they are
    now, the others as they were.
    """

    def __init__(self, model: Any, named: Mapping[str, Any], precision: Precision) -> None:
        self.parameters: dict[str, Any] = dict(named)
        self.exact: dict[str, Tensor] = {}
        narrow = precision == "bfloat16"
        ours = {id(parameter) for parameter in model.parameters()}
        for name, parameter in self.parameters.items():
            half = parameter.dtype != torch.float32 or (narrow and id(parameter) in ours)
            self.exact[name] = parameter.detach().float().clone() if half else parameter
        self._narrowed = Narrowed(model) if narrow else None
        if self._narrowed is not None:
            self._narrowed.forget(self.parameters.values())

    def collect(self) -> None:
        """Add the parameters' gradients to those of the float32 values, and forget them."""
        for name, parameter in self.parameters.items():
            exact = self.exact[name]
            if exact is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            exact.grad = gradient if exact.grad is None else exact.grad.add_(gradient)
            parameter.grad = None

    def follow(self) -> None:
        """Round the float32 values into the parameters."""
        for name, parameter in self.parameters.items():
            if self.exact[name] is not parameter:
                parameter.data.copy_(self.exact[name])

    def copied(self) -> dict[str, Tensor]:
        """The float32 values as they are now."""
        return {name: value.detach().clone() for name, value in self.exact.items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take these float32 values."""
        for name, exact in self.exact.items():
            exact.data.copy_(values[name])
        self.follow()

    def release(self) -> None:
        """The model in the precision it came in."""
        if self._narrowed is None:
            return
        for name, parameter in self.parameters.items():
            parameter.data = self.exact[name].data
        self._narrowed.restore()
