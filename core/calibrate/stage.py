"""A model run one block at a time over many windows of equal length: what each block is called with, and the stream.

Legend: ``B`` windows, ``b`` windows of one batch, ``P`` positions, ``D`` d_model.

Masks, rotary positions and whatever else a family hands to its blocks are the model's own: its forward is run on a
batch with every block replaced by a pass-through, and what each is called with is noted. It depends on the shape of the
ids only, as nothing is padded, so it is noted once per batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from core.lazy import torch
from core.models.anatomy import Block
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_AT_ONCE = 2048
"""Tokens of one batch on a CPU: enough to fill its matrix kernels, and few enough to keep activations small. Fixed, so
that results do not depend on a machine's memory."""
TOKENS_AT_ONCE_ACCELERATOR = 16_384
Precision = Literal["float32", "bfloat16"]
"""What the products of a walk are computed in; the stream between blocks and the statistics keep the model's own."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Tick = Callable[[float], None]
"""Told which share of the windows is done."""


class Enough(Exception):
    """Ends a forward pass whose rest nobody asked for."""


class Stage:
    """The residual stream of all windows at the entrance of one block, and the means to bring it behind that block."""

    def __init__(self, loaded: LoadedModel, ids_BP: Tensor, *, precision: Precision = "float32") -> None:
        self._loaded, self._ids_BP, self._precision = loaded, ids_BP, precision
        self._arguments: dict[int, list[Arguments]] = {}
        self._tuples = self._gives_tuple()
        self.batch = max(1, _tokens_at_once(loaded) // ids_BP.shape[1])
        self.stream_BPD = torch.cat([self._embed(ids_BP[rows]) for rows in self.batches()])

    def batches(self) -> Iterator[slice]:
        """All windows, a batch at a time."""
        for first in range(0, len(self._ids_BP), self.batch):
            yield slice(first, min(first + self.batch, len(self._ids_BP)))

    def run(self, block: Block, stream_bPD: Tensor) -> Tensor:
        """One block as it is now, on the streams of some windows."""
        args, kwargs = self._arguments_of(len(stream_bPD))[block.index]
        module = self._loaded.model.get_submodule(block.path)
        if not torch.is_inference_mode_enabled():  # autograd refuses what was noted in inference mode
            args, kwargs = _ordinary(args), _ordinary(kwargs)
        with torch.autocast(
            torch.device(self._loaded.device).type, torch.bfloat16, enabled=self._precision == "bfloat16"
        ):
            output = module(stream_bPD, *args, **kwargs)
        given_bPD: Tensor = output if torch.is_tensor(output) else output[0]
        return given_bPD

    def advance(self, block: Block, tick: Tick, *, in_place: bool = True) -> Tensor:
        """What the block gives for all windows; ``in_place`` puts it where its input was."""
        given_BPD = self.stream_BPD if in_place else torch.empty_like(self.stream_BPD)
        for rows in self.batches():
            tick(rows.start / len(self._ids_BP))
            given_BPD[rows] = self.run(block, self.stream_BPD[rows])
        return given_BPD

    def _embed(self, ids_bP: Tensor) -> Tensor:
        """What the first block reads."""
        seen: list[Tensor] = []

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_split_off(args, kwargs)[0])
            raise Enough

        first = self._loaded.model.get_submodule(self._loaded.anatomy.blocks[0].path)
        hook = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(ids_bP)
        finally:
            hook.remove()
        return seen[0]

    def _arguments_of(self, size: int) -> list[Arguments]:
        """What each block is called with, beside the stream, for so many windows."""
        if size not in self._arguments:
            with torch.no_grad(), _passing_through(self._loaded, self._tuples) as noted:
                self._forward(self._ids_BP[:1].expand(size, -1))
            self._arguments[size] = noted
        return self._arguments[size]

    def _gives_tuple(self) -> bool:
        """Whether blocks give a tuple; asked of the first by running it, for the ways of families differ."""
        kinds: list[bool] = []

        def look(module: Any, args: Any, output: Any) -> None:
            kinds.append(not torch.is_tensor(output))
            raise Enough

        first = self._loaded.model.get_submodule(self._loaded.anatomy.blocks[0].path)
        hook = first.register_forward_hook(look)
        try:
            self._forward(self._ids_BP[:1, :2])
        finally:
            hook.remove()
        return kinds[0]

    def _forward(self, ids_bP: Tensor) -> None:
        decoder = {"use_cache": False} if self._loaded.family == "decoder" else {}
        with suppress(Enough):
            self._loaded.model(input_ids=ids_bP, **decoder)


@contextmanager
def _passing_through(loaded: LoadedModel, tuples: bool) -> Iterator[list[Arguments]]:
    """Blocks that give back what they read and note their other arguments; the last one ends the forward pass."""
    noted: list[Arguments] = []
    blocks = [loaded.model.get_submodule(block.path) for block in loaded.anatomy.blocks]

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        stream, others, named = _split_off(args, kwargs)
        noted.append((others, named))
        if len(noted) == len(blocks):
            raise Enough
        return (stream,) if tuples else stream

    with ExitStack() as undo:
        for module in blocks:
            module.forward = pass_through
            undo.callback(delattr, module, "forward")
        yield noted


def _split_off(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The stream a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {n: v for n, v in kwargs.items() if n != "hidden_states"}


def _ordinary(value: Any) -> Any:
    """The same with tensors of inference mode copied, so that autograd takes them."""
    if torch.is_tensor(value):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple | list):
        return type(value)(_ordinary(part) for part in value)
    if isinstance(value, dict):
        return {name: _ordinary(part) for name, part in value.items()}
    return value


def _tokens_at_once(loaded: LoadedModel) -> int:
    return TOKENS_AT_ONCE if loaded.device == "cpu" else TOKENS_AT_ONCE_ACCELERATOR
