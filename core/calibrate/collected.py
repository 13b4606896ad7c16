"""Statistics of the activations that multiply a block's matrices, reduced as they pass; the activations are not kept.

Legend: ``T`` tokens, ``I`` inputs of a matrix, ``K`` chosen experts of a token, ``D`` d_model, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from core.calibrate.matrices import Matrix, expert_inputs
from core.lazy import torch
from core.models.anatomy import Block
from core.models.experts import expert_neurons, is_scaled_input

if TYPE_CHECKING:
    from torch import Tensor

Statistic = Literal["gram", "mean_abs", "max_abs", "sum_squares", "tokens"]
"""What is kept of an activation X [T, I]: XᵀX, mean |X|, max |X|, Σ X², or X itself (which is as large as it sounds)."""
STRIPS = 4
"""XᵀX is symmetric, so only its strips right of the diagonal are computed: (STRIPS + 1) / (2 · STRIPS) of the work."""
SMALL_GRAM = 256
"""Below this many inputs one product is quicker than strips."""


@dataclass(eq=False)
class Inputs:
    """Statistics of one activation over all calibration tokens that reached its matrix; float32."""

    collect: frozenset[Statistic]
    n: int = 0
    """Tokens seen; for an expert, those routed to it."""
    _upper_II: Tensor | None = None
    _sum_abs_I: Tensor | None = None
    _max_abs_I: Tensor | None = None
    _sum_squares_I: Tensor | None = None
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, x_TI: Tensor) -> None:
        """Take in one batch."""
        x_TI = x_TI.detach().flatten(0, -2).float()
        if not len(x_TI):
            return
        self.n += len(x_TI)
        if "gram" in self.collect:
            if self._upper_II is None:
                self._upper_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
            with torch.autocast(
                x_TI.device.type, enabled=False
            ):  # a sum of many in 8 bits of mantissa is none
                add_gram(self._upper_II, x_TI)
        if "mean_abs" in self.collect:
            self._sum_abs_I = _plus(self._sum_abs_I, x_TI.abs().sum(0))
        if "max_abs" in self.collect:
            largest_I = x_TI.abs().amax(0)
            self._max_abs_I = (
                largest_I if self._max_abs_I is None else torch.maximum(self._max_abs_I, largest_I)
            )
        if "sum_squares" in self.collect:
            self._sum_squares_I = _plus(self._sum_squares_I, x_TI.square().sum(0))
        if "tokens" in self.collect:
            self._kept.append(x_TI.clone())

    @property
    def gram_II(self) -> Tensor:
        """XᵀX, [I, I]."""
        assert self._upper_II is not None, "collect gram, and ask only where n > 0"
        return self._upper_II.triu() + self._upper_II.triu(1).T

    @property
    def mean_abs_I(self) -> Tensor:
        """mean |X|, [I]."""
        assert self._sum_abs_I is not None, "collect mean_abs, and ask only where n > 0"
        return self._sum_abs_I / self.n

    @property
    def max_abs_I(self) -> Tensor:
        """max |X|, [I]."""
        assert self._max_abs_I is not None, "collect max_abs, and ask only where n > 0"
        return self._max_abs_I

    @property
    def sum_squares_I(self) -> Tensor:
        """Σ X² over tokens, [I]."""
        assert self._sum_squares_I is not None, "collect sum_squares, and ask only where n > 0"
        return self._sum_squares_I

    @property
    def tokens_TI(self) -> Tensor:
        """X itself, [T, I]."""
        return torch.cat(self._kept)


def add_gram(upper_II: Tensor, x_TI: Tensor) -> None:
    """Add XᵀX on and right of the diagonal; what is left of it is not to be read."""
    size = x_TI.shape[1]
    strips = STRIPS if size >= SMALL_GRAM else 1
    edges = [size * strip // strips for strip in range(strips + 1)]
    for start, stop in pairwise(edges):
        upper_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


class Gatherer:
    """Hooks on one block that reduce the inputs of its matrices, each activation once."""

    def __init__(
        self, model: Any, block: Block, matrices: Sequence[Matrix], collect: frozenset[Statistic]
    ) -> None:
        self.inputs = {matrix.inputs: Inputs(collect) for matrix in matrices}
        self._model, self._block = model, block
        self._modules = {m.inputs: m.inputs for m in matrices if m.expert is None}
        self._has_experts = any(matrix.expert is not None for matrix in matrices)
        self.last = ""
        """Module whose inputs were seen last: what runs after it adds nothing."""

    @contextmanager
    def watching(self, *, then: Callable[[str], None]) -> Iterator[None]:
        """Take in what passes; ``then`` is called after each activation with the module that reads it."""

        def reader(path: str) -> Callable[..., None]:
            def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.inputs[path].add((*args, *kwargs.values())[0])
                self.last = path
                then(path)

            return read

        def read_experts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add_experts(module, *args, *kwargs.values())
            self.last = str(self._block.experts)
            then(self.last)

        with ExitStack() as hooks:
            for path in self._modules:
                module = self._model.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(reader(path), with_kwargs=True).remove)
            if self._has_experts:
                experts = self._model.get_submodule(str(self._block.experts))
                hooks.callback(experts.register_forward_pre_hook(read_experts, with_kwargs=True).remove)
            yield

    def _add_experts(self, experts: Any, hidden_TD: Tensor, *decision: Tensor) -> None:
        """Each expert's tokens, and its neurons on them by the family's own gate."""
        path = str(self._block.experts)
        for expert, rows_TD in enumerate(_routed(experts, hidden_TD, decision)):
            if len(rows_TD):
                self.inputs[expert_inputs(path, expert, neurons=False)].add(rows_TD)
                neurons_TN = expert_neurons(experts, expert, rows_TD)
                self.inputs[expert_inputs(path, expert, neurons=True)].add(neurons_TN)


def _routed(experts: Any, hidden_TD: Tensor, decision: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The tokens [T, D] that each expert reads, as it reads them."""
    n_experts = len(experts.down_proj)
    if is_scaled_input(experts):  # all tokens for every expert, 0 where it was not chosen
        for rows_TD in hidden_TD.view(n_experts, -1, hidden_TD.shape[-1]):
            yield rows_TD[rows_TD.abs().amax(-1) > 0]
        return
    experts_TK = decision[0]
    for expert in range(n_experts):
        yield hidden_TD[(experts_TK == expert).any(-1)]
