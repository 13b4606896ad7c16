"""Weights that follow from something else that is learned: scales of fixed codes, or exact weights behind rounded ones.

A following weight stays a parameter of the model, filled in place after every update with the values that its stored
form reloads to. Its gradient is dense, and wanted only to be summed: a hook takes it as soon as the backward pass has
added it up, passes it on to what is learned, and drops it. So one dense gradient is alive at a time, no graph reaches
behind the weights, and ties, Conv1D, embeddings and fused experts need no code of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from core.distill.trainable.trainable import Parameters
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.packed import PackedExperts, PackedTensor
from core.saving.description import settle

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class Rule(Protocol):
    """How one stored form of a weight follows from what is learned."""

    @property
    def learned(self) -> Mapping[str, Parameter]:
        """What is learned, by a name; float32."""

    def packed(self) -> PackedTensor:
        """The stored form as it is now."""

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """Add to the gradients of what is learned, from that of the weight; both float32."""


class Following(Parameters):
    """Weights that follow, by module, and other parameters beside them."""

    def __init__(self, loaded: LoadedModel, forms: Mapping[str, tuple[Rule, ...]], beside: Mapping[str, Any]):
        self.weights = [_Weight(loaded, module, rules) for module, rules in forms.items()]
        learned = {name: p for weight in self.weights for name, p in weight.learned().items()}
        super().__init__({**learned, **beside})

    def before_forward(self) -> None:
        """See ``Trainable``."""
        for weight in self.weights:
            weight.follow()

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """See ``Trainable``."""
        for weight in self.weights:
            weight.rest(loaded)
        self.rest()
        return ()


class _Weight:
    """One weight of the model that follows; of several forms each expert has its own (see ``PackedExperts``)."""

    def __init__(self, loaded: LoadedModel, module: str, rules: tuple[Rule, ...]) -> None:
        self.module, self.rules = module, rules
        packed = loaded.packed[module]
        self.choice_E = packed.choice_E if isinstance(packed, PackedExperts) else None
        self.parameter = stored_parameter(loaded, module)
        self.dtype = self.parameter.dtype
        self.parameter.requires_grad_(True)
        self.hook: Any = self.parameter.register_post_accumulate_grad_hook(self._pull)  # type: ignore[no-untyped-call]

    def learned(self) -> dict[str, Parameter]:
        forms = [""] if self.choice_E is None else [f".{form}" for form in range(len(self.rules))]
        return {
            f"{self.module}{form}.{name}": parameter
            for form, rule in zip(forms, self.rules, strict=True)
            for name, parameter in rule.learned.items()
        }

    def packed(self) -> PackedTensor | PackedExperts:
        forms = tuple(rule.packed() for rule in self.rules)
        return forms[0] if self.choice_E is None else PackedExperts(forms, self.choice_E)

    def follow(self) -> None:
        with torch.no_grad():
            self.parameter.data.copy_(self.packed().dequantize())

    def rest(self, loaded: LoadedModel) -> None:
        """Leave the values of a reload, in the dtype that was found."""
        self.hook.remove()
        self.parameter.requires_grad_(False)
        self.parameter.grad = None
        with torch.no_grad():
            packed = loaded.packed[self.module] = self.packed()
            self.parameter.data = packed.dequantize().to(self.dtype)

    def _pull(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        weight, gradient = parameter.detach().float(), parameter.grad.float()
        parameter.grad = None
        for form, rule in enumerate(self.rules):
            own = gradient
            if self.choice_E is not None:
                chosen_E = torch.tensor([choice == form for choice in self.choice_E], device=gradient.device)
                own = gradient * chosen_E.view(-1, 1, 1)
            rule.pull(weight, own)


def stored_parameter(loaded: LoadedModel, module: str) -> Parameter:
    """The parameter that ``loaded.packed`` means by a module."""
    names = dict(loaded.model.named_parameters())
    found: Parameter = names[f"{module}.weight" if f"{module}.weight" in names else module]
    return found


def forms_of(packed: PackedTensor | PackedExperts) -> tuple[PackedTensor, ...]:
    """Every form that a weight is stored in."""
    return packed.choices if isinstance(packed, PackedExperts) else (packed,)


def refuse_no_grid(loaded: LoadedModel, train: str) -> None:
    """Raise ``CannotCompress`` where nothing is quantized.

    Otherwise packed weights take the values of their reload at once (``core.saving.description.settle``): trained is what
    is stored.
    """
    if not loaded.packed:
        raise CannotCompress(
            f"train={train} is for a quantized model, and nothing of this one is; put a quantizing step before, or choose all "
            "or lora"
        )
    settle(loaded)


def add_gradient(parameter: Parameter, gradient: Tensor) -> None:
    """Add to ``.grad``, as a backward pass does."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
