"""Hooks that write: change what a module puts out (or takes in) while a forward pass runs.

The counterpart of ``capture.py``, whose hooks only read. Hooks are removed however the block ends, and a path whose
module never ran is an error. A capture opened inside the block sees the changed values, since torch calls hooks
in the order they were made. It does not know what a change means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from core.capture import HookDidNotFire, module_at
from core.errors import SlimscopeError
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[str, "Tensor"], "Tensor"]
"""From a module's path and its hidden state to the hidden state that replaces it, of equal shape and dtype."""


@contextmanager
def intervene(model: Any, paths: Sequence[str], change: Change, *, inputs: bool = False) -> Iterator[None]:
    """Replace the hidden state that the modules at ``paths`` put out; with ``inputs``, the one they take in.

    The hidden state is the output itself, or the first element of a tuple; of the inputs it is the first argument,
    by position or by name. Raises ``SlimscopeError`` where that is no tensor, or where the change alters its shape or
    dtype; ``HookDidNotFire`` when the block ends without error and a module did not run; ``KeyError`` for a path
    that does not exist. Hold ``LoadedModel.lock`` around the block.
    """
    fired: set[str] = set()

    def changed(path: str, tensor: Any) -> Tensor:
        if not torch.is_tensor(tensor):
            raise SlimscopeError(f"{path} has no hidden state to change: found {type(tensor).__name__}")
        new = change(path, tensor)
        if new.shape != tensor.shape or new.dtype != tensor.dtype:
            raise SlimscopeError(
                f"the change of {path} made {tuple(new.shape)} {new.dtype} of {tuple(tensor.shape)} {tensor.dtype}"
            )
        fired.add(path)
        return new

    def on_output(path: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (changed(path, output[0]), *output[1:])
            return changed(path, output)

        return hook

    def on_input(path: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (changed(path, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: changed(path, kwargs[first])}

        return hook

    with ExitStack() as hooks:
        for path in paths:
            module = module_at(model, path)
            if inputs:
                handle = module.register_forward_pre_hook(on_input(path), with_kwargs=True)
            else:
                handle = module.register_forward_hook(on_output(path))
            hooks.callback(handle.remove)
        yield
    silent = [path for path in paths if path not in fired]
    if silent:
        raise HookDidNotFire(
            f"{silent[0]} was to be changed but never ran ({len(silent)} of {len(paths)} hooks silent); "
            "run a forward pass inside the block, and check that no fused kernel replaces this module"
        )
