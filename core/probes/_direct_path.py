"""What one head says to a later head, or to the output, through the residual stream alone.

Legend: P prompt positions, S senders, D d_model, E head_dim.

A sender's output is changed, every other head and MLP keeps its recorded output: the receiver then reads its recorded
residual stream plus the sender's change. It knows paths between heads, no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from core.intervene import intervene
from core.lazy import torch
from core.probes._batching import in_batches
from core.probes._hooked_forward import hooked_logits
from core.probes._kernel import Kernel, attention_by
from core.probes._recording import Node, Recording
from core.probes._replay import Patch
from core.probes._replay_pass import at_positions

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Head = tuple[int, int]
"""(layer, head)"""


def sent(loaded: LoadedModel, source: Recording, base: Recording, head: Head) -> Tensor:
    """How the residual stream changes, [P, D], when a head of the base run says what it says in the source run."""
    layer, index = head
    block = loaded.anatomy.blocks[layer]
    z_PHE = base.states["z"][layer]
    changed_PHE = z_PHE.clone()
    changed_PHE[:, index] = source.states["z"][layer][:, index]
    written: list[Tensor] = [
        loaded.model.get_submodule(block.o)(z.flatten(1)[None])[0] for z in (changed_PHE, z_PHE)
    ]
    if loaded.anatomy.norm_place == "sandwich":
        after_norm = loaded.model.get_submodule(block.attention_write)
        written = [after_norm(out) for out in written]
    return (written[0] - written[1]) * loaded.anatomy.residual_scale


def received(
    loaded: LoadedModel, base: Recording, changes_SPD: Sequence[Tensor], *, layer: int, node: Node, head: int
) -> list[Tensor]:
    """A receiver's query, key or value [P, E] under each change of the residual stream that enters its layer."""
    model, block = loaded.model, loaded.anatomy.blocks[layer]
    stream_PD = base.at("residual", layer)
    args, arguments = base.calls[layer]
    kept: dict[str, Tensor] = {}

    def keep(
        at: int, kernel: Kernel, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Any
    ) -> Tensor:
        kept["value"] = {"q": q, "k": k, "v": v}[node][0, head]
        raise _Known

    def run(first: int, stop: int) -> list[Tensor]:
        part_SPD = torch.stack(list(changes_SPD[first:stop])) + stream_PD
        positions = torch.arange(base.n_tokens, device=stream_PD.device).repeat(stop - first)
        with suppress(_Known):
            model.get_submodule(block.path)(
                part_SPD.flatten(0, 1)[None],
                *(at_positions(value, positions) for value in args),
                **{name: at_positions(value, positions) for name, value in arguments.items()},
            )
        return list(kept["value"].view(stop - first, base.n_tokens, -1))

    with attention_by(loaded, keep):
        parts = in_batches(
            len(changes_SPD),
            run,
            bytes_each=8 * stream_PD.numel() * stream_PD.element_size(),
            device=loaded.device,
        )
    return [value for part in parts for value in part]


def hooked_path_logits(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    source: Recording,
    base: Recording,
    sender: Head,
    receiver: tuple[int, Node, int] | None,
) -> Tensor:
    """Logits [vocab] at the last position with this one path patched, by whole forwards with hooks.

    Every attention and MLP output is held at its recorded value, except the sender's layer, where the sender's head is
    replaced; a receiver's q, k or v seen in that run is patched into a second one. ``None``: the path ends at the logits.
    """
    held = {block.attention_write: ("attention_out", block.index) for block in loaded.anatomy.blocks}
    held |= {block.mlp_write: ("mlp_out", block.index) for block in loaded.anatomy.blocks}
    del held[loaded.anatomy.blocks[sender[0]].attention_write]
    seen: dict[str, Tensor] = {}

    def hold(path: str, state: Tensor) -> Tensor:
        node, layer = held[path]
        return base.at(node, layer).view(state.shape)  # type: ignore[arg-type]

    def stand_in(
        layer: int, kernel: Kernel, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Any
    ) -> Tensor:
        if receiver is not None and layer == receiver[0]:
            seen["value"] = {"q": q, "k": k, "v": v}[receiver[1]][0, receiver[2]].clone()
        z, _ = kernel(module, q, k, v, mask, **arguments)
        if layer == sender[0]:
            z = z.clone()
            z[0, :, sender[1]] = source.states["z"][layer][:, sender[1]]
        return z

    with ExitStack() as stack:
        stack.enter_context(intervene(loaded.model, list(held), hold))
        stack.enter_context(attention_by(loaded, stand_in))
        logits: Tensor = loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits
    if receiver is None:
        return logits[0, -1]
    return hooked_logits(loaded, inputs, Patch(receiver[0], receiver[1], 0, seen["value"], receiver[2]))


class _Known(Exception):
    """Leaves a block as soon as its queries, keys and values are known."""
