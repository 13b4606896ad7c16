"""One component taken out by one hook in one whole forward pass; loss and KL in float64, token by token."""

from __future__ import annotations

import torch

from core.models.loaded import LoadedModel


def ablated_logits(
    loaded: LoadedModel, ids: list[int], layer: int, head: int | None, value: torch.Tensor
) -> torch.Tensor:
    """Logits [T, V] with a head's z, or an MLP's output, replaced by ``value`` [T, width]."""
    block, size = loaded.anatomy.blocks[layer], loaded.anatomy.head_dim

    def replace_head(module, args):
        z = args[0].clone()
        z[..., head * size : (head + 1) * size] = value
        return (z, *args[1:])

    def replace_output(module, args, output):
        return value.view(output.shape).to(output.dtype)

    if head is None:
        hook = loaded.model.get_submodule(block.mlp_write).register_forward_hook(replace_output)
    else:
        hook = loaded.model.get_submodule(block.o).register_forward_pre_hook(replace_head)
    try:
        with torch.inference_mode():
            return loaded.model(torch.tensor([ids]), use_cache=False).logits[0].double()
    finally:
        hook.remove()


def outputs_of(loaded: LoadedModel, ids: list[int], layer: int, head: int | None) -> torch.Tensor:
    """What the component puts out on a text, [T, width]."""
    block, size = loaded.anatomy.blocks[layer], loaded.anatomy.head_dim
    seen: list[torch.Tensor] = []
    if head is None:
        module = loaded.model.get_submodule(block.mlp_write)
        hook = module.register_forward_hook(lambda m, args, output: seen.append(output))
    else:
        module = loaded.model.get_submodule(block.o)
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        loaded.model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    output = seen[0].reshape(len(ids), -1)
    return output if head is None else output[:, head * size : (head + 1) * size]


def loss_by_hand(logits: torch.Tensor, ids: list[int]) -> float:
    """Mean surprisal of every token but the first, nats."""
    log_p = logits.log_softmax(-1)
    return -sum(float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1)) / (len(ids) - 1)


def kl_by_hand(whole: torch.Tensor, ablated: torch.Tensor) -> list[float]:
    """KL(whole ‖ ablated) at each position, nats."""
    p, q = whole.log_softmax(-1), ablated.log_softmax(-1)
    return [float(sum(a.exp() * (a - b))) for a, b in zip(p, q, strict=True)]
