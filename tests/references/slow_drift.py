"""Slow, obvious drift between two models: one block at a time, called by hand through whole hooked forwards."""

from __future__ import annotations

from typing import Any

import torch

from core.models.loaded import LoadedModel


def run(
    loaded: LoadedModel, ids: list[int], put: dict[str, torch.Tensor] | None = None, at: str = "input"
) -> Any:
    """Residual stream [S, P, D] and logits [P, V] of a run in which the modules of ``put`` get or give other values."""
    model, put = loaded.model, put or {}
    handles = []
    for path, value in put.items():
        module = model.get_submodule(path)
        if at == "input":

            def before(module: Any, args: Any, kwargs: Any, value: torch.Tensor = value) -> Any:
                if args:
                    return (value[None], *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": value[None]}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: Any, args: Any, output: Any, value: torch.Tensor = value) -> Any:
                if isinstance(output, tuple):
                    return (value.view_as(output[0]), *output[1:])
                return value.view_as(output)

            handles.append(module.register_forward_hook(after))
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output


def block_outputs(
    loaded: LoadedModel, ids: list[int], paths: list[str], *, put: dict[str, Any] | None = None
) -> Any:
    """What each module of ``paths`` puts out, [P, D], in a run with ``put`` as block inputs."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        loaded.model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: found.__setitem__(
                path, (output[0] if isinstance(output, tuple) else output).clone()
            )
        )
        for path in paths
    ]
    run(loaded, ids, put)
    for handle in handles:
        handle.remove()
    return found


def kl(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) per row in nats, float64."""
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (logits_p, logits_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
