"""Take one head or one MLP out of a decoder at all positions, and see what that does to its predictions.

Legend: C components, T tokens of a text, D d_model, E head_dim, L layers, H heads, V vocabulary, S texts.

An ablated component puts out zeros, its mean over all positions of the texts, its mean at the same position over the
texts, or what it put out at other places of the texts, drawn at random. A component of layer l changes nothing below
l, so only later layers are run again (``_replay.py``), many components at once. Heads are replaced before the output
projection (z), so W_O's bias stays. It does not know why a text was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.intervene import intervene
from core.lazy import torch
from core.probes._distribution import Reference, batch_reader, describe, rows_at_once
from core.probes._recording import record
from core.probes._replay import Patch, replay
from core.types import Progress, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
Ablation = Literal["zero", "mean", "position_mean", "resample"]


@dataclass(frozen=True)
class Component:
    """One head, or with ``head`` None one MLP."""

    layer: int
    head: int | None

    @property
    def name(self) -> str:
        """``L3H5`` or ``L3 MLP``."""
        return f"L{self.layer} MLP" if self.head is None else f"L{self.layer}H{self.head}"


def heads(anatomy: Anatomy) -> list[Component]:
    """Every head, layers outermost."""
    return [Component(layer, head) for layer in range(anatomy.n_layers) for head in range(anatomy.n_heads)]


def mlps(anatomy: Anatomy) -> list[Component]:
    """Every MLP."""
    return [Component(layer, None) for layer in range(anatomy.n_layers)]


def ablation_share(anatomy: Anatomy) -> float:
    """What one ablated run costs, in forward passes: half of the layers on average, and the whole unembedding."""
    block = 4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff
    unembedding = anatomy.vocab_size * anatomy.d_model
    return (anatomy.n_layers * block / 2 + unembedding) / (anatomy.n_layers * block + unembedding)


@dataclass(frozen=True)
class Scored:
    """What is read off the logits."""

    positions: slice
    """Positions whose predictions count for loss and KL."""
    target: int | None = None
    """Token whose logit is read at the last position."""
    distractor: int | None = None
    """Its logit is subtracted."""


@dataclass(frozen=True)
class Effects:
    """What each ablation did on each text; means over the scored positions."""

    base_nats_S: Floats
    """Loss of the whole model, nats per token."""
    nats_CS: Floats
    kl_CS: Floats
    """KL(whole ‖ ablated), nats per token."""
    last_kl_CS: Floats
    """The same at the last position only."""
    base_logit_S: Floats
    logit_CS: Floats
    """Target's logit minus the distractor's at the last position; NaN without a target."""
    gap: float
    """Largest |number − that of a whole forward with hooks|, for the component with the largest KL on the first text."""
    checked: Component


def ablate(
    loaded: LoadedModel,
    texts: Sequence[Tensor],
    components: Sequence[Component],
    scored: Sequence[Scored],
    *,
    mode: Ablation,
    seed: int,
    progress: Progress,
) -> Effects:
    """Effect of each component on each text (ids [T], at least two tokens). Hold the lock, be in inference mode."""
    pool = None if mode == "zero" else _Pool.of(loaded, texts, mode, seed, part_of(progress, 0.0, 0.05))
    rows: list[tuple[Floats, Floats]] = []
    gap, checked = 0.0, components[0]
    for number, (ids_T, what) in enumerate(zip(texts, scored, strict=True)):
        share = 0.95 / len(texts)
        start = 0.05 + share * number
        reading = _Reading(loaded, ids_T, what, len(components))
        patches = [_patch(loaded, component, pool, number, len(ids_T)) for component in components]
        replay(
            loaded,
            reading.recording,
            [(patch,) for patch in patches],
            reading.read,
            progress=part_of(progress, start, start + share),
        )
        rows.append((reading.base, reading.found_C4))
        if number == 0:
            worst = int(reading.found_C4[:, 1].argmax())
            checked = components[worst]
            whole = reading.numbers(_whole_forward(loaded, ids_T, patches[worst]), 1)[0]
            gap = float(np.nanmax(np.abs(reading.found_C4[worst] - whole)))
    base_S4 = np.stack([base for base, _ in rows])
    found_CS4 = np.stack([found for _, found in rows], 1)
    nats, kl, last_kl, logit = np.moveaxis(found_CS4, -1, 0)
    return Effects(base_S4[:, 0], nats, kl, last_kl, base_S4[:, 3], logit, gap, checked)


class _Reading:
    """The whole model on one text, and what the ablated models say in comparison."""

    def __init__(self, loaded: LoadedModel, ids_T: Tensor, scored: Scored, n_components: int) -> None:
        self.recording = record(loaded, {"input_ids": ids_T[None]})
        self._scored = scored
        self._read = batch_reader(loaded)
        # The last position predicts a token that is not there: any will do, its loss is never scored.
        self._targets_T = ids_T.roll(-1)
        final_TD = self.recording.at("residual", loaded.anatomy.n_layers)
        logits_TV = self._read(final_TD).clone()
        self._reference = Reference.of(logits_TV)
        self._at_once = max(1, rows_at_once(logits_TV.shape[-1]) // len(ids_T))
        self.found_C4 = np.full((n_components, 4), np.nan)
        self.base = self.numbers(logits_TV, 1)[0]

    def read(self, numbers: Sequence[int], start: int, residual_RTD: Tensor) -> None:
        """Store what the final residuals of some components say."""
        assert start == 0, "ablations enter at the first position"
        for low in range(0, len(numbers), self._at_once):
            some = numbers[low : low + self._at_once]
            logits = self._read(residual_RTD[low : low + self._at_once].flatten(0, 1))
            self.found_C4[list(some)] = self.numbers(logits, len(some))

    def numbers(self, logits: Tensor, n: int) -> Floats:
        """[n, 4]: loss, KL, KL at the last position, logit (difference); the logits are overwritten."""
        last_RV = logits.view(n, len(self._targets_T), -1)[:, -1]
        logit_R = torch.full((n,), torch.nan)
        if self._scored.target is not None:
            logit_R = last_RV[:, self._scored.target].clone()
            if self._scored.distractor is not None:
                logit_R = logit_R - last_RV[:, self._scored.distractor]
        said = describe(
            logits,
            self._targets_T,
            top_k=1,
            reference=self._reference,
            where=lambda row: f"position {row % len(self._targets_T)} of an ablated run",
        )
        nats_RT, kl_RT = -said.log_p_target_R.view(n, -1), said.kl_R.view(n, -1)
        at = self._scored.positions
        columns = (
            nats_RT[:, :-1][:, at].double().mean(-1),
            kl_RT[:, at].double().mean(-1),
            kl_RT[:, -1],
            logit_R,
        )
        return np.stack([column.double().cpu().numpy() for column in columns], -1)


@dataclass(frozen=True)
class _Pool:
    """What the components put out on the texts, to ablate with: means, or everything to draw from."""

    mode: Ablation
    mlp: list[Tensor]
    """Per layer [D], [T, D], or all places [S·T, D]."""
    z: list[Tensor]
    """Per layer [H, E], [T, H, E], or [S·T, H, E]."""
    seed: int

    @classmethod
    def of(
        cls, loaded: LoadedModel, texts: Sequence[Tensor], mode: Ablation, seed: int, progress: Progress
    ) -> _Pool:
        """Run every text once; position means need texts of one length."""
        kept: dict[Any, list[list[Tensor]]] = {"mlp_out": [], "z": []}
        n_positions = 0
        for number, ids_T in enumerate(texts):
            progress(number, len(texts), f"recording text {number + 1} of {len(texts)}")
            recording = record(loaded, {"input_ids": ids_T[None]}, ("z", "mlp_out"))
            n_positions += len(ids_T)
            for node, parts in kept.items():
                states = recording.states[node]
                if mode == "mean":
                    parts.append([state.double().sum(0) for state in states])
                else:
                    parts.append(list(states))
        joined = {}
        for node, parts in kept.items():
            dtype = loaded.model.dtype
            by_layer = zip(*parts, strict=True)
            if mode == "mean":
                joined[node] = [(torch.stack(layer).sum(0) / n_positions).to(dtype) for layer in by_layer]
            elif mode == "position_mean":
                joined[node] = [torch.stack(layer).mean(0) for layer in by_layer]
            else:
                joined[node] = [torch.cat(layer) for layer in by_layer]
        return cls(mode, joined["mlp_out"], joined["z"], seed)

    def value(self, component: Component, text: int, n: int) -> Tensor:
        """What the component puts out instead, [n, width]."""
        state = (self.mlp if component.head is None else self.z)[component.layer]
        values = state if component.head is None else state.select(-2, component.head)
        if self.mode == "mean":
            return values.expand(n, -1)
        if self.mode == "position_mean":
            return values
        # Seeded by text only: all components of a text are drawn at the same places.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + text)
        return values[torch.randint(len(values), (n,), generator=generator)]


def _patch(loaded: LoadedModel, component: Component, pool: _Pool | None, text: int, n: int) -> Patch:
    anatomy = loaded.anatomy
    if pool is None:
        width = anatomy.d_model if component.head is None else anatomy.head_dim
        value = torch.zeros(1, width, device=loaded.device, dtype=loaded.model.dtype).expand(n, -1)
    else:
        value = pool.value(component, text, n)
    if component.head is None:
        return Patch(component.layer, "mlp_out", 0, value)
    return Patch(component.layer, "z", 0, value, component.head)


def _whole_forward(loaded: LoadedModel, ids_T: Tensor, patch: Patch) -> Tensor:
    """Logits [T, V] of a whole forward pass with the patch made by a hook: the slow way."""
    model, anatomy = loaded.model, loaded.anatomy
    block = anatomy.blocks[patch.layer]

    def change(path: str, tensor: Tensor) -> Tensor:
        new = tensor.clone()
        if patch.node == "z":
            width = anatomy.head_dim
            new[..., patch.head * width : (patch.head + 1) * width] = patch.value.view(*new.shape[:-1], width)
        else:
            new[:] = patch.value.view(new.shape)
        return new

    path, of_inputs = (block.o, True) if patch.node == "z" else (block.mlp_write, False)
    with intervene(model, [path], change, inputs=of_inputs):
        logits_TV: Tensor = model(ids_T[None], use_cache=False).logits[0].float()
    return logits_TV
