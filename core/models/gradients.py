"""Whether a gradient through this model can be trusted, decided before one is taken; and how to take it.

A forward pass needs no kernel with a derivative, a gradient does. Where a kernel has none, autograd does not always
say so: it may cut one branch and return the derivative of the rest, a plausible wrong number. So the kernels are
looked at, then a backward pass is run on a few positions and every module that drops the gradient is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.patch_grid import image_size

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

POSITIONS = 3
_INSTEAD = "use a method that only runs forward: occlusion, Shapley values or activation patching"
_ROUNDS_ACTIVATIONS = {
    "Linear8bitLt": "bitsandbytes int8",
    "LinearActivationQuantizedTensor": "torchao with quantized activations",
}
"""Classes of modules or weights that round their input, a step function: its derivative is 0 or a stand-in."""


def require_gradients(loaded: LoadedModel) -> None:
    """Refuse a model whose gradient would be absent or wrong; raises ``CannotMeasure`` naming module and reason.

    Costs one forward and one backward pass over three positions. Hold ``loaded.lock``.
    """
    for path, module in loaded.model.named_modules():
        reason = _reason_by_kind(module)
        if reason:
            raise CannotMeasure(f"no gradient can be taken through {path}: {reason}; {_INSTEAD}")
    cut: list[str] = []
    with differentiable(), _watched(loaded.model, cut):
        start, arguments = _few_positions(loaded)
        output = loaded.model(**arguments)
        read = output.logits if "logits" in output else output.last_hidden_state
        if cut:
            raise CannotMeasure(
                f"no gradient can be taken through {cut[0]}: its kernel ({type(loaded.model.get_submodule(cut[0])).__name__}) "
                f"drops it; {_INSTEAD}"
            )
        try:
            (gradient,) = torch.autograd.grad(read.float().square().sum(), start)
        except (RuntimeError, NotImplementedError) as error:
            said = (str(error).splitlines() or ["no message"])[0]
            raise CannotMeasure(f"this model's kernels have no backward pass ({said}); {_INSTEAD}") from None
    if not torch.isfinite(gradient).all():
        raise CannotMeasure(
            f"the gradient of this model is not finite in {loaded.dtype}; open it in float32, or {_INSTEAD}"
        )


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on, whatever the caller's mode; parameters keep ``requires_grad`` False, so only inputs get one."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _reason_by_kind(module: Any) -> str:
    """Why this module can have no right gradient, from its class and its weights; empty when nothing speaks against."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and getattr(module, "quantization_enabled", True):
        # compressed-tensors swaps the weight's data during the forward pass only: backward would read other numbers.
        return "compressed-tensors quantizes it anew in every forward pass, without a backward"
    for parameter in module.parameters(recurse=False):
        if parameter.is_inference():
            return "its weights were made in inference mode, which autograd cannot use; open the model again"
        if not parameter.is_floating_point():
            return f"its weights are packed as {str(parameter.dtype).removeprefix('torch.')}"
        if type(parameter.data).__name__ in _ROUNDS_ACTIVATIONS:
            return f"{_ROUNDS_ACTIVATIONS[type(parameter.data).__name__]} rounds its input, a step without derivative"
    if type(module).__name__ in _ROUNDS_ACTIVATIONS:
        return f"{_ROUNDS_ACTIVATIONS[type(module).__name__]} rounds its input, a step without derivative"
    return ""


@contextmanager
def _watched(model: Any, cut: list[str]) -> Iterator[None]:
    """Note the path of every leaf module that is fed a gradient and does not pass it on."""

    def watch(path: str) -> Any:
        def look(module: Any, args: tuple[Any, ...], output: Any) -> None:
            fed = any(torch.is_tensor(arg) and arg.requires_grad for arg in args)
            if fed and torch.is_tensor(output) and output.is_floating_point() and not output.requires_grad:
                cut.append(path)

        return look

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if not any(True for _ in module.children()):
                hooks.callback(module.register_forward_hook(watch(path)).remove)
        yield


def _few_positions(loaded: LoadedModel) -> tuple[Tensor, dict[str, Any]]:
    """A leaf tensor that wants a gradient, and the model's arguments made of it."""
    model = loaded.model
    if loaded.family == "vision":
        config = model.config
        shape = (1, config.num_channels, *image_size(config))
        start = torch.full(shape, 0.5, dtype=model.dtype, device=model.device).requires_grad_()
        return start, {"pixel_values": start}
    ids = torch.arange(1, POSITIONS + 1, device=model.device)[None]
    start = model.get_submodule(loaded.anatomy.embedding)(ids).detach().clone().requires_grad_()
    arguments = {"inputs_embeds": start, "use_cache": False}
    if not loaded.anatomy.causal:
        del arguments["use_cache"]
    return start, arguments


def leave_inference_mode(loaded: LoadedModel) -> None:
    """Copy weights that an earlier step made in inference mode: autograd refuses to pass through them."""
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        if tensor.is_inference():
            tensor.data = tensor.data.clone()


@contextmanager
def trainable(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Gradients for these parameters alone, and none afterwards, however the block ends."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
