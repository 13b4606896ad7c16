"""Run a model again from one of its blocks on: the blocks before it give back what they gave the first time.

Whatever is changed at block l leaves the blocks before l as they were, so their part of a forward pass need not be
computed again. What they returned is handed on as it is: the numbers of such a run are those of a whole one, bit for
bit, in every architecture whose blocks pass on nothing but what they return. It knows no experts and no probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

Returned = Mapping[int, Any]
"""Block index → what the block returned, a tensor or a tuple."""


@contextmanager
def record_blocks(loaded: LoadedModel) -> Iterator[Returned]:
    """Keep what every block returns in the forward pass inside; hold ``loaded.lock``."""
    returned: dict[int, Any] = {}

    def keeping(layer: int) -> Callable[..., None]:
        return lambda module, args, output: returned.__setitem__(layer, output)

    with ExitStack() as hooks:
        for block in loaded.anatomy.blocks:
            module = loaded.model.get_submodule(block.path)
            hooks.callback(module.register_forward_hook(keeping(block.index)).remove)
        yield returned


@contextmanager
def blocks_returning(loaded: LoadedModel, returned: Returned, *, before: int) -> Iterator[None]:
    """Forward passes inside compute the blocks from ``before`` on; earlier ones return what is in ``returned``.

    The passes must be given the input that ``returned`` was recorded on. Hold ``loaded.lock``.
    """

    def give(layer: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: returned[layer]

    with ExitStack() as undo:
        for block in loaded.anatomy.blocks[:before]:
            module = loaded.model.get_submodule(block.path)
            # An attribute of the instance hides the class's forward, and is what a module's call looks up.
            assert "forward" not in vars(module), f"{block.path} has a forward of its own already"
            module.forward = give(block.index)
            undo.callback(delattr, module, "forward")
        yield
