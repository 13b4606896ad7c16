"""Weights in two precisions: what the model computes with, and the float32 values that updates add up in.

An update is smaller than half a unit in the last place of a bfloat16 weight for most of a training: added to the
weight itself it would be lost. So a parameter that is not float32 gets a float32 value beside it (``exact``), which
collects its gradients, is updated, and is then rounded into the parameter. Knows no optimizer and no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.distill.settings import Precision
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Weights:
    """The parameters that are trained, by name, and the float32 values they follow.

    With ``bfloat16`` every float32 parameter of the model is cast, in place, so that ties hold; buffers (rotary
    frequencies) stay. ``release`` gives the model its float32 values back: the trained ones, and those it had.
    """

    def __init__(self, model: Any, named: Mapping[str, Any], precision: Precision) -> None:
        self.parameters: dict[str, Any] = dict(named)
        self.exact: dict[str, Tensor] = {}
        self._frozen: list[tuple[Any, Tensor]] = []
        narrow = torch.bfloat16 if precision == "bfloat16" else None
        ours = {id(parameter) for parameter in model.parameters()}
        for name, parameter in self.parameters.items():
            half = parameter.dtype != torch.float32 or (narrow is not None and id(parameter) in ours)
            self.exact[name] = parameter.detach().float().clone() if half else parameter
        if narrow is not None:
            trained = {id(parameter) for parameter in self.parameters.values()}
            for parameter in model.parameters():
                if parameter.dtype == torch.float32:
                    rounded = parameter.data.to(narrow)
                    if id(parameter) not in trained and not torch.equal(rounded.float(), parameter.data):
                        self._frozen.append((parameter, parameter.data))
                    parameter.data = rounded
        self._narrow = narrow

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

    def release(self, model: Any) -> None:
        """Float32 parameters again: the trained ones as they are now, the others as they were."""
        if self._narrow is None:
            return
        for name, parameter in self.parameters.items():
            parameter.data = self.exact[name].data
        for parameter, data in self._frozen:
            parameter.data = data
        for parameter in model.parameters():
            if parameter.dtype == self._narrow:
                parameter.data = parameter.data.float()
