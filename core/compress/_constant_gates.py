"""What a mixture's experts would put out if each had one constant gate: fitted on running text, and measured on other.

Every layer is looked at on its own, on the input it really had. Legend: ``T`` tokens of a window, ``D`` hidden,
``M`` MLPs laid side by side (chosen experts, then the shared one if there is one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.capture import capture
from core.errors import CannotCompress
from core.intervene import intervene
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.routing._upcycling import GatedMlp
from core.routing._upcycling_build import output_gap
from core.routing.surgery import read_expert
from core.train._residuals import TextWindow, run_window
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over tokens of one layer, float64: all that least squares and its error need."""

    gram_MM: Tensor
    """Σ⟨f_m, f_n⟩."""
    moment_M: Tensor
    """Σ⟨f_m, y⟩, y the mixture's output."""
    power: Tensor
    """Σ‖y‖²."""

    def relative_error(self, gates_M: Tensor) -> float:
        """√(Σ‖y − Σ_m c_m f_m‖² / Σ‖y‖²)."""
        missing = self.power - 2 * gates_M @ self.moment_M + gates_M @ self.gram_MM @ gates_M
        return float((missing.clamp_min(0) / self.power).sqrt())


def expert_mlp(loaded: LoadedModel, layer: int, expert: int) -> GatedMlp:
    """One routed expert; raises ``CannotCompress`` for one that is no gated MLP without biases."""
    weights = read_expert(loaded, layer, expert)
    if weights.gate_ID is None or weights.down_bias_D is not None:
        raise CannotCompress(
            f"the experts of {loaded.anatomy.architecture} are no gated MLPs without biases; choose another model"
        )
    return GatedMlp(weights.gate_ID, weights.up_ID, weights.down_DI)


def gather_moments(
    loaded: LoadedModel,
    chosen: Mapping[int, Sequence[GatedMlp]],
    windows: Sequence[TextWindow],
    progress: Progress,
) -> dict[int, Moments]:
    """Sums over all tokens of ``windows``, by block index of ``chosen``."""
    blocks = {str(loaded.anatomy.blocks[index].mlp): index for index in chosen}
    sums: dict[int, Moments] = {}
    read: dict[str, Tensor] = {}

    def add(path: str, output_BPD: Tensor) -> None:
        index = blocks[path]
        wanted = output_BPD.reshape(-1).double()
        outputs_MX = outputs(loaded, chosen[index], read.pop(path)).reshape(len(chosen[index]), -1).double()
        new = Moments(outputs_MX @ outputs_MX.T, outputs_MX @ wanted, wanted @ wanted)
        old = sums.get(index)
        sums[index] = new if old is None else Moments(
            old.gram_MM + new.gram_MM, old.moment_M + new.moment_M, old.power + new.power
        )  # fmt: skip

    for done, window in enumerate(windows):
        progress(done, len(windows), "running experts on every token")
        with (
            capture(loaded.model, list(blocks), inputs=True, reduce=lambda path, x: read.update({path: x})),
            capture(loaded.model, list(blocks), reduce=add),
        ):
            run_window(loaded, window)
    return sums


def outputs(loaded: LoadedModel, mlps: Sequence[GatedMlp], read: Tensor) -> Tensor:
    """What each MLP puts out by itself for what the mixture read [..., D]: [M, ..., D]."""
    from transformers.activations import ACT2FN

    activation: Any = ACT2FN[loaded.anatomy.activation]
    linear = torch.nn.functional.linear
    return torch.stack(
        [linear(activation(linear(read, m.gate_ID)) * linear(read, m.up_ID), m.down_DI) for m in mlps]
    )


def gap_at_constant_gates(
    loaded: LoadedModel, dense: Any, chosen: Mapping[int, Sequence[GatedMlp]], gates: Mapping[int, Tensor]
) -> float:
    """How far ``dense`` is from the mixture whose every layer puts out Σ_m c_m f_m(x); 0 up to rounding."""
    blocks = {str(loaded.anatomy.blocks[index].mlp): index for index in chosen}
    with capture(loaded.model, list(blocks), inputs=True) as read:

        def constant(path: str, output: Tensor) -> Tensor:
            by_mlp = outputs(loaded, chosen[blocks[path]], read[path])
            return torch.einsum("m,m...->...", gates[blocks[path]].to(by_mlp.dtype), by_mlp)

        with intervene(loaded.model, list(blocks), constant):
            return output_gap(loaded.model, dense, loaded.anatomy)
