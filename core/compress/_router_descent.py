"""The descent of router weights on KL(base ‖ variant), and the choice of the best ones seen.

Everything but the routers is frozen. The choice of experts is discrete and has no gradient; the routing weights of
those chosen do, and through them a router learns which of its experts to trust. What is kept is what was best on
held-out text, the start included, so that the result is never worse there than it was.

Legend: B windows of one length, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.gradients import differentiable
from core.routing.discover import moe_layers
from core.train._residuals import TextWindow
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

from core.models.gradients import leave_inference_mode, trainable
from core.models.loaded import LoadedModel


@dataclass
class Curve:
    """KL(base ‖ variant) in nats per token at every check."""

    step: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    """Mean since the check before; NaN at the start."""
    held_out: list[float] = field(default_factory=list)


def router_parameters(loaded: LoadedModel) -> dict[str, Any]:
    """Every parameter of every router, by its name in the model."""
    inside = tuple(f"{layer.router}." for layer in moe_layers(loaded))
    return {name: p for name, p in loaded.model.named_parameters() if name.startswith(inside)}


def divergence(base: LoadedModel, variant: LoadedModel, ids_BP: Tensor) -> Tensor:
    """Mean KL(base ‖ variant) of the next token over all positions, nats; differentiable in the variant."""
    with torch.no_grad():
        base_BPV = base.model(ids_BP, use_cache=False).logits.float().log_softmax(-1)
    variant_BPV = variant.model(ids_BP, use_cache=False).logits.float().log_softmax(-1)
    kl_BP = torch.nn.functional.kl_div(variant_BPV, base_BPV, log_target=True, reduction="none").sum(-1)
    return kl_BP.mean()


def held_out_kl(
    base: LoadedModel,
    variant: LoadedModel,
    windows: Sequence[TextWindow],
    batch: int,
    tick: Callable[[], None],
) -> float:
    """Mean KL per token over windows."""
    total = tokens = 0.0
    with torch.no_grad():
        for ids_BP in batches(windows, batch, base.device):
            tick()
            total += float(divergence(base, variant, ids_BP)) * ids_BP.numel()
            tokens += ids_BP.numel()
    return total / tokens


def batches(windows: Sequence[TextWindow], size: int, device: str, generator: Any = None) -> list[Tensor]:
    """Windows of equal length together, nothing padded; in random order where there is a generator."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    order = (
        range(len(windows))
        if generator is None
        else torch.randperm(len(windows), generator=generator).tolist()
    )
    for index in order:
        by_length.setdefault(len(windows[index].ids), []).append(windows[index].ids)
    found = [
        torch.tensor(same[first : first + size], device=device)
        for same in by_length.values()
        for first in range(0, len(same), size)
    ]
    if generator is None:
        return found
    return [found[index] for index in torch.randperm(len(found), generator=generator).tolist()]


def descend(
    base: LoadedModel,
    variant: LoadedModel,
    training: Sequence[TextWindow],
    held_out: Sequence[TextWindow],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    checks: int,
    seed: int,
    progress: Progress,
) -> Curve:
    """Adam on the routers; leaves the best weights seen in ``variant``. Raises ``CannotCompress`` where KL is not finite.

    The step of each weight is ``learning_rate`` times its tensor's root mean square, falling to 0. The sum is
    kept in float32 whatever the model's dtype, in which small steps would be lost.
    """
    parameters = router_parameters(variant)
    generator = torch.Generator().manual_seed(seed)
    measured = {round(steps * (index + 1) / checks) for index in range(checks)}
    with torch.inference_mode(False), trainable(parameters):
        leave_inference_mode(variant)
        exact = {name: p.detach().float().clone() for name, p in parameters.items()}
        rates = [learning_rate * float(weight.square().mean().sqrt()) for weight in exact.values()]
        optimizer = torch.optim.Adam(
            [{"params": [weight], "lr": rate} for weight, rate in zip(exact.values(), rates, strict=True)]
        )
        best = _Best(parameters)

        def measure(step: int, losses: list[float]) -> None:
            kl = held_out_kl(
                base, variant, held_out, batch, lambda: progress(step, steps, "measuring KL on held-out text")
            )
            best.offer(step, losses, kl)

        measure(0, [])
        losses: list[float] = []
        for step, ids_BP in enumerate(_endless(training, batch, variant.device, generator, steps), start=1):
            with differentiable():
                loss = divergence(base, variant, ids_BP)
                loss.backward()  # type: ignore[no-untyped-call]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - (step - 1) / steps)
            _update(parameters, exact, optimizer)
            losses.append(float(loss.detach()))
            progress(step, steps, f"step {step} of {steps}: KL {losses[-1]:.4f} nats")
            if step in measured:
                measure(step, losses)
                losses = []
        for name, parameter in parameters.items():
            parameter.data.copy_(best.weights[name])
    return best.curve


class _Best:
    """Router weights with the smallest KL on held-out text so far, and every KL that was measured."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = parameters
        self.weights: dict[str, Tensor] = {}
        self.curve = Curve()

    def offer(self, step: int, losses: Sequence[float], kl: float) -> None:
        """Take the weights as they are now, and their KL; raises ``CannotCompress`` for one that is no number."""
        if not kl < float("inf"):
            raise CannotCompress("the KL to the base model is not a finite number; open both in float32")
        if not self.curve.held_out or kl < min(self.curve.held_out):
            self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.curve.step.append(step)
        self.curve.training.append(sum(losses) / len(losses) if losses else float("nan"))
        self.curve.held_out.append(kl)


def _update(parameters: Mapping[str, Any], exact: Mapping[str, Tensor], optimizer: Any) -> None:
    """One step of the float32 weights, by the gradients of the model's own, which then follow."""
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} got no gradient"
        exact[name].grad = parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    for name, parameter in parameters.items():
        parameter.data.copy_(exact[name])


def _endless(
    windows: Sequence[TextWindow], size: int, device: str, generator: Any, n: int
) -> Iterator[Tensor]:
    """``n`` batches, the windows dealt anew each time they are used up."""
    while n > 0:
        for ids_BP in batches(windows, size, device, generator)[:n]:
            yield ids_BP
            n -= 1
