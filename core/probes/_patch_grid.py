"""The cells that patching asks about, exactly: which node at which layer, position or head, and what each moves.

Legend: P prompt positions, L layers.

Two runs are recorded, one of each prompt; a cell takes its value from the source run and writes it into the base run.
A cell whose value is the same in both runs changes nothing and is not run. It knows no gradient and no view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._hooked_forward import hooked_logits
from core.probes._patch_metric import MetricName, PatchMetric, choose_metric
from core.probes._prompt_pair import PromptPair, encode_pair
from core.probes._recording import Node, Recording, record
from core.probes._replay import Patch, Row, last_residuals
from core.probes._tokens import limit_cells
from core.registry import Settings
from core.types import Cost, Progress, Prompt, silent

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

NodeName = Literal["residual", "attention_out", "mlp_out", "head", "q", "k", "v"]
PER_HEAD: tuple[NodeName, ...] = ("head", "q", "k", "v")
EVERYWHERE = -1


class PairSettings(Settings):
    """Both prompts, what is measured between them, and which of them is copied into the other."""

    corrupted: str = Field("", description="The other prompt: as many tokens, another answer")
    metric: MetricName = Field(
        "logit_difference",
        description="logit_difference: target − distractor, logits; probability: of the target; "
        "kl: distance to the clean prediction, nats",
    )
    target: str = Field("", description="Right answer, one token; empty: the clean prompt's top prediction")
    distractor: str = Field(
        "", description="Wrong answer, one token; empty: the corrupted prompt's top prediction"
    )
    direction: Literal["denoising", "noising"] = Field(
        "denoising",
        description="denoising copies clean into corrupted (what is enough?), noising corrupted into clean "
        "(what is needed?)",
    )


class PatchSettings(PairSettings):
    """What is patched between two prompts, and where."""

    node: NodeName = Field(
        "residual",
        description="What is copied: the residual stream entering a layer, what attention or MLP adds to it, "
        "a head's output, or its query, key or value",
    )
    positions: int = Field(
        0, ge=0, le=2048, description="Last positions of the prompt to patch; 0 patches all"
    )
    position: int = Field(
        EVERYWHERE,
        ge=EVERYWHERE,
        le=2047,
        description="Head, q, k and v: the position to patch; −1 patches all positions at once",
    )


@dataclass(frozen=True)
class Cell:
    """One question of a grid."""

    layer: int
    head: int
    """0 where the node has no heads."""
    start: int
    stop: int


@dataclass(frozen=True)
class Grid:
    """Two recorded runs, the metric between them, and the cells to ask."""

    loaded: LoadedModel
    settings: PatchSettings
    pair: PromptPair
    source: Recording
    base: Recording
    metric: PatchMetric
    cells: tuple[Cell, ...]

    @property
    def base_inputs(self) -> dict[str, Tensor]:
        """The model's arguments for the prompt that is patched into."""
        side = self.pair.corrupted if self.settings.direction == "denoising" else self.pair.clean
        return side.inputs

    @property
    def base_value(self) -> float:
        """The metric with nothing patched."""
        return self.metric.corrupted if self.settings.direction == "denoising" else self.metric.clean

    def patch(self, cell: Cell, *, recording: Recording | None = None) -> Patch:
        """The write that a cell stands for, with values of the source run (or another recording)."""
        node = node_of(self.settings.node)
        value = (recording or self.source).at(node, cell.layer, head=cell.head)[cell.start : cell.stop]
        return Patch(cell.layer, node, cell.start, value, cell.head)

    def exact(self, cells: Sequence[Cell], *, progress: Progress = silent) -> np.ndarray:
        """The metric with each cell patched, by replay; cells that change nothing have the base value exactly."""
        values = np.full(len(cells), self.base_value)
        changes = self._changes()
        asked = [
            index
            for index, cell in enumerate(cells)
            if changes[cell.layer, cell.start : cell.stop, cell.head].any()
        ]
        if asked:
            rows: list[Row] = [(self.patch(cells[index]),) for index in asked]
            residual_RD = last_residuals(self.loaded, self.base, rows, progress=progress)
            values[asked] = self.metric.of_residuals(residual_RD).double().cpu().numpy()
        return values

    def effect(self, values: np.ndarray) -> np.ndarray:
        """Share of the gap between both prompts that a cell moves: 0 nothing, 1 all of it; either direction."""
        step = self.metric.gap if self.settings.direction == "denoising" else -self.metric.gap
        return (values - self.base_value) / step

    def frame(
        self, cells: Sequence[Cell], effects: np.ndarray, values: np.ndarray | None = None
    ) -> pd.DataFrame:
        """One row per cell: where it is, its tokens, its effect and (where known) the metric."""
        layers, heads, starts = (
            np.array([getattr(cell, name) for cell in cells]) for name in ("layer", "head", "start")
        )
        if self.settings.node in PER_HEAD:
            columns: dict[str, object] = {"layer": layers, "head": heads}
        else:
            columns = {
                "layer": layers,
                "position": starts,
                "token": np.array(self.pair.clean.texts, dtype=object)[starts],
                "corrupted_token": np.array(self.pair.corrupted.texts, dtype=object)[starts],
            }
        if values is not None:
            columns["metric"] = values
            columns["recovered"] = (values - self.metric.corrupted) / self.metric.gap
        return pd.DataFrame({**columns, "effect": effects})

    def identity_gap(self) -> float:
        """Largest change of the metric when a run's own values are patched into it, from early to late cells."""
        n_layers, last = self.loaded.anatomy.n_layers, self.base.n_tokens - 1
        layers = sorted({0, n_layers // 2, n_layers - 1})
        spans = sorted({(0, 1), (last // 2, last // 2 + 1), (last, last + 1), (0, last + 1)})
        cells = [Cell(layer, 0, *span) for layer in layers for span in spans]
        rows: list[Row] = [(self.patch(cell, recording=self.base),) for cell in cells]
        values = self.metric.of_residuals(last_residuals(self.loaded, self.base, rows))
        return float((values - self.base_value).abs().max())

    def hooked_gap(self, cell: Cell, value: float) -> float:
        """|value − the metric of one whole hooked forward with this cell patched|."""
        logits_V = hooked_logits(self.loaded, self.base_inputs, self.patch(cell))
        return abs(float(self.metric.of_logits(logits_V[None])[0]) - value)

    def _changes(self) -> np.ndarray:
        """Whether source and base differ, [L, P, heads or 1]."""
        node = node_of(self.settings.node)
        layers = range(self.loaded.anatomy.n_layers)
        pairs = ((self.source.states[node][n], self.base.states[node][n]) for n in layers)
        found = torch.stack([(a != b).any(-1).view(self.base.n_tokens, -1) for a, b in pairs])
        return np.asarray(found.cpu().numpy())


def open_grid(loaded: LoadedModel, prompt: Prompt, settings: PatchSettings) -> Grid:
    """Record both runs and lay out the cells. Hold ``loaded.lock`` and be in inference mode.

    Raises ``BadInput`` for prompts that do not align, a metric without a gap, a position outside the prompt and a grid too
    large to look at.
    """
    pair = encode_pair(loaded, prompt, settings.corrupted)
    cells = _cells(loaded.anatomy, pair, settings)
    source, base, metric = record_ends(loaded, pair, settings, [node_of(settings.node)])
    return Grid(loaded, settings, pair, source, base, metric, cells)


def record_ends(
    loaded: LoadedModel, pair: PromptPair, settings: PairSettings, nodes: Sequence[Node]
) -> tuple[Recording, Recording, PatchMetric]:
    """The run that is copied from, the run that is patched, and the metric between both prompts."""
    clean, corrupted = (record(loaded, side.inputs, nodes) for side in (pair.clean, pair.corrupted))
    n_layers = loaded.anatomy.n_layers
    metric = choose_metric(
        loaded,
        settings.metric,
        target=settings.target,
        distractor=settings.distractor,
        clean_residual_D=clean.at("residual", n_layers)[-1],
        corrupted_residual_D=corrupted.at("residual", n_layers)[-1],
    )
    source, base = (clean, corrupted) if settings.direction == "denoising" else (corrupted, clean)
    return source, base, metric


def node_of(name: NodeName) -> Node:
    """A head's output is its weighted values, z."""
    return "z" if name == "head" else name


def replay_cost(anatomy: Anatomy, n_tokens: int, settings: PatchSettings) -> Cost:
    """Of a whole exact grid whose prompts differ from the first token; less when they part later.

    On average half the layers and half the positions of a forward are run; short prompts gain from being run together.
    """
    if settings.node in PER_HEAD:
        share, n_cells = 0.5, anatomy.n_layers * n_heads(anatomy, settings.node)
    else:
        share, n_cells = 0.25, anatomy.n_layers * min(n_tokens, settings.positions or n_tokens)
    together = min(1.0, 0.4 + n_tokens / 200)
    width = 2 * anatomy.d_model + 4 * anatomy.n_heads * anatomy.head_dim
    states = 8 * anatomy.n_layers * n_tokens * width
    return Cost(5 + share * together * n_cells, states + 4 * 4096 * (6 * anatomy.d_model + 3 * anatomy.d_ff))


def n_heads(anatomy: Anatomy, node: NodeName) -> int:
    """How many heads a node has: keys and values have fewer in grouped-query attention."""
    return anatomy.n_kv_heads if node in ("k", "v") else anatomy.n_heads


def _cells(anatomy: Anatomy, pair: PromptPair, settings: PatchSettings) -> tuple[Cell, ...]:
    n, layers = pair.n_tokens, range(anatomy.n_layers)
    if settings.node not in PER_HEAD:
        first = pair.clean.start(settings.positions)
        limit_cells(anatomy.n_layers, n - first)
        return tuple(Cell(layer, 0, p, p + 1) for layer in layers for p in range(first, n))
    if settings.position >= n:
        raise BadInput(
            f"position {settings.position} does not exist: the prompt has {n} tokens, from 0 to {n - 1}"
        )
    start, stop = (0, n) if settings.position == EVERYWHERE else (settings.position, settings.position + 1)
    # Before the first token that differs both runs are the same: starting there saves those positions.
    start = max(start, min(pair.differing)) if settings.position == EVERYWHERE else start
    return tuple(
        Cell(layer, head, start, stop) for layer in layers for head in range(n_heads(anatomy, settings.node))
    )
