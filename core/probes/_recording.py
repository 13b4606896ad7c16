"""One whole run of a decoder on one prompt, recorded: what a replay starts from, and what it patches in.

Legend: P prompt positions, D d_model, E head_dim.

It holds the residual stream, keys and values of every layer, other nodes on request, and what each block was called
with. Memory: about 4 · n_layers · P · d_model numbers for all nodes; the caller bounds P.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from core.capture import capture
from core.errors import CannotMeasure
from core.probes._kernel import Kernel, attention_by

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Node = Literal["residual", "attention_out", "mlp_out", "z", "q", "k", "v"]
"""residual: what enters a block (at layer n_layers, what leaves the last). attention_out and mlp_out: what is added
to it. z: a head's weighted values. q, k, v: after rotary positions; k and v are counted by key/value head."""
ALWAYS: tuple[Node, ...] = ("residual", "k", "v")
"""What a replay needs of its recording."""


@dataclass(frozen=True)
class Recording:
    """What one whole run held."""

    n_tokens: int
    states: Mapping[Node, tuple[Tensor, ...]]
    """Per layer [P, D], or [P, heads, E] for z, q, k, v; ``residual`` has one more, after the last block."""
    masks: tuple[Tensor, ...] = field(repr=False)
    """Additive [1, 1, P, P] per layer: causal, and the sliding window where there is one."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = field(repr=False)
    """The arguments that each block was called with, but for the hidden state."""

    def at(self, node: Node, layer: int, *, head: int = 0) -> Tensor:
        """A node's values at all positions: [P, D] or, for z, q, k, v of one head, [P, E]."""
        state = self.states[node][layer]
        return state if state.dim() == 2 else state[:, head]


def record(loaded: LoadedModel, inputs: Mapping[str, Tensor], nodes: Sequence[Node] = ()) -> Recording:
    """Run the model once on one prompt and keep ``nodes``, beside what a replay needs.

    Hold ``loaded.lock`` and be in inference mode. Raises ``CannotMeasure`` for a model that is no causal decoder.
    """
    anatomy, model = loaded.anatomy, loaded.model
    if anatomy.family != "decoder":
        raise CannotMeasure(
            f"{loaded.ref} is a {anatomy.family}; only decoders, which never look ahead, can be replayed"
        )
    kept: dict[Node, dict[int, Tensor]] = defaultdict(dict)
    masks: dict[int, Tensor] = {}
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    wanted = {*ALWAYS, *nodes}

    def stand_in(
        layer: int, kernel: Kernel, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Any
    ) -> Tensor:
        assert mask is not None
        assert mask.shape[0] == 1, "a recording is of one prompt"
        masks[layer] = mask
        z, _ = kernel(module, q, k, v, mask, **arguments)
        for node, tensor in (("q", q), ("k", k), ("v", v)):
            kept[node][layer] = tensor[0].transpose(0, 1)  # type: ignore[index]
        kept["z"][layer] = z[0]
        return z

    layer_of = {block.path: block.index for block in anatomy.blocks}
    with ExitStack() as stack:
        stack.enter_context(attention_by(loaded, stand_in))
        stack.enter_context(_watch_calls(model, layer_of, calls, kept["residual"]))
        for node, paths in _write_paths(anatomy).items():
            if node in wanted:
                stack.enter_context(_keep_outputs(model, paths, kept[node], anatomy.d_model))
        after = stack.enter_context(capture(model, [anatomy.blocks[-1].path]))
        model(**inputs, use_cache=False, logits_to_keep=1)
    kept["residual"][anatomy.n_layers] = after[anatomy.blocks[-1].path][0]
    if len(masks) != anatomy.n_layers:
        raise CannotMeasure(
            f"{anatomy.architecture} ran only {len(masks)} of {anatomy.n_layers} attention layers here"
        )
    return Recording(
        n_tokens=len(kept["residual"][0]),
        states={node: _in_order(kept[node]) for node in wanted},
        masks=_in_order(masks),
        calls=_in_order(calls),
    )


def _write_paths(anatomy: Anatomy) -> dict[Node, list[str]]:
    return {
        "attention_out": [block.attention_write for block in anatomy.blocks],
        "mlp_out": [block.mlp_write for block in anatomy.blocks],
    }


@contextmanager
def _keep_outputs(model: Any, paths: list[str], kept: dict[int, Tensor], d_model: int) -> Iterator[None]:
    with capture(model, paths) as outputs:
        yield
    for layer, path in enumerate(paths):
        kept[layer] = outputs[path].view(-1, d_model)  # OPT's MLP runs on flattened positions


@contextmanager
def _watch_calls(
    model: Any,
    layer_of: Mapping[str, int],
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]],
    residual: dict[int, Tensor],
) -> Iterator[None]:
    """Note what each block is called with: its hidden state [P, D] and its other arguments."""

    def watch(layer: int) -> Callable[..., None]:
        def look(module: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = arguments["hidden_states"]
            others = {name: value for name, value in arguments.items() if name != "hidden_states"}
            residual[layer], calls[layer] = hidden[0], (args, others)

        return look

    with ExitStack() as hooks:
        for path, layer in layer_of.items():
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(watch(layer), with_kwargs=True).remove)
        yield


def _in_order(by_layer: Mapping[int, Any]) -> tuple[Any, ...]:
    return tuple(by_layer[layer] for layer in sorted(by_layer))
