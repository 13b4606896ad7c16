"""What a trainer needs to know of what it trains, and nothing else.

A trainer asks for parameters, takes gradients of a loss of the model's outputs with respect to them, changes them, and
calls ``before_forward``. Whether they are weights, scales or low-rank updates is not its matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class TrainableSettings(Protocol):
    """What of a training's settings says which parameters move; ``core.distill.settings`` has their bounds."""

    @property
    def train(self) -> str:
        """all, head, norms, lora, dora, scales_and_norms or straight_through."""

    @property
    def lora_rank(self) -> int:
        """Rank of a low-rank update."""

    @property
    def lora_alpha(self) -> float:
        """Updates are multiplied by alpha / rank."""

    @property
    def lora_targets(self) -> str:
        """all-linear, or ends of module names between commas."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""


class Trainable(Protocol):
    """The moving part of a model. Use it under ``torch.inference_mode(False)``, one at a time per model.

    Parameters that are the model's own have its dtype. All others are float32, whatever the model computes in. Those
    need not be reachable from the model (a scale is not): a trainer of several processes adds up their gradients itself.
    """

    def named(self) -> list[tuple[str, Parameter]]:
        """Every parameter that moves, once, in an order that is always the same; their gradients are in ``.grad``
        after a backward pass, added to what is there."""

    def before_forward(self) -> None:
        """Make the model's weights follow: once after the parameters were changed, before the next forward pass."""

    def state(self) -> dict[str, Tensor]:
        """Everything that ``restore`` needs, by name: the tensors themselves, to be copied where they are kept."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state, bit for bit; ``before_forward`` is included."""

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Leave in the model, and in ``loaded.packed``, exactly what a reload will give, gradients off and hooks gone.

        Returns notes for the reader. Weights may move by a last rounding: what is reported is measured afterwards. May
        raise ``CannotCompress``, where merging what was learned does not give the same outputs.
        """


class Parameters:
    """The part of ``Trainable`` that is the same for all: a table of parameters."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters: dict[str, Parameter] = dict(parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def named(self) -> list[tuple[str, Parameter]]:
        """See ``Trainable``."""
        return list(self.parameters.items())

    def before_forward(self) -> None:
        """See ``Trainable``; nothing follows from a model's own parameters."""

    def state(self) -> dict[str, Tensor]:
        """See ``Trainable``."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Trainable``."""
        assert state.keys() == self.parameters.keys(), "a state of other parameters"
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
        self.before_forward()

    def rest(self) -> None:
        """Gradients off."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
