"""The one place where forward hooks are made: read a module's output (or input) during a forward pass.

A hook here only reads. ``reduce`` runs inside the hook, so a caller that wants one number per position never
holds all layers' tensors. Hooks are removed however the block ends, and a path whose module never ran is an
error: a probe that silently read nothing would show a plausible empty picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from core.errors import SlimscopeError
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Reduce = Callable[[str, "Tensor"], Any]


class HookDidNotFire(SlimscopeError):
    """A hooked module was never called in the forward pass; names it."""


@contextmanager
def capture(
    model: Any,
    paths: Sequence[str],
    *,
    reduce: Reduce | None = None,
    inputs: bool = False,
    item: int = 0,
    keep_graph: bool = False,
) -> Iterator[dict[str, Any]]:
    """Collect what the modules at ``paths`` put out while the block runs.

    Yields a dict that fills as modules run: path → ``reduce(path, tensor)``, or the detached tensor itself. A
    module that runs more than once keeps its last value. ``inputs`` reads the arguments instead of the output.
    ``item`` picks one argument, or one element of a tuple output: 0 is the hidden state; output 1 of an
    attention module is its pattern, which only eager attention computes; inputs 1 and 2 of a fused experts
    module are the chosen experts and their routing weights. ``keep_graph`` leaves tensors in autograd's graph, for a
    loss on what is read here.

    Raises ``HookDidNotFire`` when the block ends without error and a module did not run, ``KeyError`` for a
    path that does not exist. Hold ``LoadedModel.lock`` around the block.
    """
    values: dict[str, Any] = {}

    def keep(path: str, tensor: Any) -> None:
        if not torch.is_tensor(tensor):
            kernel = getattr(model.config, "_attn_implementation", "unknown")
            raise SlimscopeError(
                f"{path} has no tensor at position {item} of its {'inputs' if inputs else 'output'} "
                f"(attention kernel: {kernel}); "
                "attention patterns need model.set_attn_implementation('eager')"
            )
        read = tensor if keep_graph else tensor.detach()
        values[path] = read if reduce is None else reduce(path, read)

    def read_output(path: str) -> Callable[..., None]:
        return lambda module, args, output: keep(path, _pick(output, item))

    def read_input(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: keep(path, _pick((*args, *kwargs.values()), item))

    modules = {path: module_at(model, path) for path in paths}
    with ExitStack() as hooks:
        for path, module in modules.items():
            if inputs:
                handle = module.register_forward_pre_hook(read_input(path), with_kwargs=True)
            else:
                handle = module.register_forward_hook(read_output(path))
            hooks.callback(handle.remove)
        yield values
    silent = [path for path in paths if path not in values]
    if silent:
        raise HookDidNotFire(
            f"{silent[0]} was hooked but never ran ({len(silent)} of {len(paths)} hooks silent); "
            "run a forward pass inside the block, and check that no fused kernel replaces this module"
        )


@contextmanager
def capture_residual(loaded: LoadedModel, *, reduce: Reduce | None = None) -> Iterator[dict[str, Any]]:
    """Collect the residual stream: the input of every block, and the output of the last one under ``"final"``.

    Keys are the blocks' paths in order (``resid_pre`` of each), then ``"final"``. Tensors are
    [batch, position, d_model] before the final norm; for a post-norm encoder each is already normed.
    """
    blocks = [block.path for block in loaded.anatomy.blocks]
    last = blocks[-1]

    def reduce_final(path: str, tensor: Tensor) -> Any:
        return tensor if reduce is None else reduce("final", tensor)

    values: dict[str, Any] = {}
    with (
        capture(loaded.model, blocks, reduce=reduce, inputs=True) as before,
        capture(loaded.model, [last], reduce=reduce_final) as after,
    ):
        yield values
        values.update(before)
        values["final"] = after.get(last)


def _pick(output: Any, item: int) -> Any:
    """Decoder layers return a plain tensor, attention modules a tuple, whole models a mapping-like output."""
    if torch.is_tensor(output):
        return output if item == 0 else None
    return output[item] if item < len(output) else None


def module_at(model: Any, path: str) -> Any:
    """The module at a dotted path; raises ``KeyError`` naming one that does not exist."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise KeyError(f"{type(model).__name__} has no module {path!r}") from None
