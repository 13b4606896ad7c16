"""Routing shares: how much of what a block adds to the residual stream comes from routed, shared and dense parts.

Legend: L blocks, T tokens, D d_model, G groups of documents.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture
from core.errors import CannotMeasure
from core.lazy import torch
from core.probes._routed_text import TextSettings, choices_of, find_texts, readings, text_cost
from core.probes._routing_report import Counted, text_notes, text_provenance
from core.registry import Example, method
from core.routing.discover import MoeLayer, moe_layers
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Block
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats

PARTS = ("attention", "routed experts", "shared expert", "dense MLP")


class RoutingSharesSettings(TextSettings):
    """On what text."""

    max_tokens: int = Field(2048, ge=64, le=65_536, description="Tokens of the text that are read at most")


@method(
    "probe",
    title="Shares of the update",
    needs=["moe", "decoder", "text"],
    paper="https://arxiv.org/abs/2401.06066",
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example(
            "One prompt",
            Prompt("def add(left, right):\n    return left + right\n"),
            {"text": ""},
        ),
    ),
    cost=text_cost,
)
def routing_shares(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: RoutingSharesSettings
) -> Result:
    """Split what every block adds to the residual stream into attention, routed experts, shared expert and dense MLP.

    With u a block's update of one token and p one of its parts, the share of p is ⟨p, u⟩ / ⟨u, u⟩: how much of the update's
    length lies in it. The shares of a token sum to 1 exactly; a negative one works against the rest. Every token counts
    alike, or the few with massive activations would decide. size is ‖p‖ / ‖u‖, and share_of_mlp the same share of the
    MLP's or the mixture's own output. Intervals are 95 % over documents.
    """
    started = time.perf_counter()
    if loaded.anatomy.norm_place == "sandwich":
        raise CannotMeasure(
            f"{loaded.ref} norms the sum of its parts before adding it, so no part has an update of its own; open another"
        )
    texts = find_texts(loaded, prompt, settings.text)
    watch = _Watch(loaded)
    with loaded.lock, watch.active():
        found = list(readings(loaded, texts, progress, max_tokens=settings.max_tokens))
    choices = choices_of(loaded, found)
    frame = share_table(watch.measured(), choices)
    return Result(
        frames={"main": frame},
        views=_VIEWS,
        metrics=_metrics(watch.measured(), choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="routing_shares",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=watch.gap,
            exactness_check="largest |update − sum of its parts| of a block, as a share of the update's largest value",
        ),
        notes=text_notes(texts, choices),
    )


Measured = dict[int, dict[str, "Floats"]]
"""Block → part → [T, 3]: share of the update, size, share of the MLP's output; no entry for a part it does not have."""


@dataclass
class _Watch:
    """Measures each block when it has run, and lets its tensors go."""

    loaded: LoadedModel
    gap: float = 0.0
    _now: dict[str, Tensor] = field(default_factory=dict)
    _found: dict[int, dict[str, list[Any]]] = field(default_factory=dict)

    def active(self) -> ExitStack:
        """The hooks, for a with statement; hold the model's lock around it."""
        model, blocks = self.loaded.model, self.loaded.anatomy.blocks
        moe = {layer.layer: layer for layer in moe_layers(self.loaded)}
        at = {block.path: block for block in blocks}
        inner = [path for block in blocks for path in (block.attention_write, block.mlp_write)]
        inner += [
            path
            for layer in moe.values()
            for path in (layer.experts, layer.shared, layer.shared_gate)
            if path and path not in inner
        ]

        def begin(path: str, tensor: Tensor) -> None:
            self._now = {path: tensor}

        def keep(path: str, tensor: Tensor) -> None:
            self._now[path] = tensor.clone()  # Llama-4 adds the routed part to the shared one in place

        def end(path: str, tensor: Tensor) -> None:
            self._measure(at[path], moe.get(at[path].index), tensor)

        stack = ExitStack()
        stack.enter_context(capture(model, list(at), inputs=True, reduce=begin))
        stack.enter_context(capture(model, inner, reduce=keep))
        stack.enter_context(capture(model, list(at), reduce=end))
        return stack

    def _measure(self, block: Block, layer: MoeLayer | None, after: Tensor) -> None:
        """The parts of one block's update, token by token."""
        n, d = self._now[block.path].reshape(-1, after.shape[-1]).shape
        scale = self.loaded.anatomy.residual_scale

        def rows(path: str) -> Tensor:
            # Llama-4's experts put out every expert's rows below each other; what they give is their sum.
            return self._now[path].reshape(-1, n, d).sum(0).double() * scale

        update_TD = (after - self._now[block.path]).reshape(n, d).double()
        parts = {"attention": rows(block.attention_write)}
        mlp_TD = rest_TD = rows(block.mlp_write)
        if layer is not None:
            parts["routed experts"] = rows(layer.experts)
            rest_TD = rest_TD - parts["routed experts"]
            if layer.shared is not None:
                gate = (
                    self._now[layer.shared_gate].reshape(n, -1).double().sigmoid()
                    if layer.shared_gate
                    else 1.0
                )
                parts["shared expert"] = rows(layer.shared) * gate
                rest_TD = rest_TD - parts["shared expert"]
        else:
            parts["dense MLP"] = mlp_TD
            rest_TD = torch.zeros_like(mlp_TD)
        error_TD = update_TD - parts["attention"] - mlp_TD
        largest = float(update_TD.abs().max())
        self.gap = max(self.gap, float(error_TD.abs().max()) / largest, float(rest_TD.abs().max()) / largest)
        kept = self._found.setdefault(block.index, {})
        for name, part_TD in parts.items():
            columns = (
                (part_TD * update_TD).sum(-1) / update_TD.square().sum(-1),
                part_TD.norm(dim=-1) / update_TD.norm(dim=-1),
                (part_TD * mlp_TD).sum(-1) / mlp_TD.square().sum(-1),
            )
            kept.setdefault(name, []).append(torch.stack(columns, dim=-1).cpu().numpy())
        self._now = {}

    def measured(self) -> Measured:
        """All tokens' numbers, in the order they were read."""
        return {
            block: {name: np.concatenate(found) for name, found in parts.items()}
            for block, parts in self._found.items()
        }


def share_table(measured: Measured, choices: Choices) -> pd.DataFrame:
    """One row per block and part: mean over tokens of share and size, with intervals over documents."""
    rows = []
    for block, parts in measured.items():
        for name, values_T3 in parts.items():
            share, size, of_mlp = (_mean(values_T3[:, column], choices) for column in range(3))
            low, high = (float(share.value - share.half), float(share.value + share.half))
            rows.append(
                {
                    "layer": block,
                    "part": name,
                    "share": float(share.value),
                    "low": low,
                    "high": high,
                    "size": float(size.value),
                    "share_of_mlp": np.nan if name == "attention" else float(of_mlp.value),
                    "tokens": len(values_T3),
                }
            )
    return pd.DataFrame(rows)


def _mean(value_T: Floats, choices: Choices) -> Counted:
    """Mean over tokens, with its interval over documents."""
    group_T = choices.group_T
    return Counted.share(np.bincount(group_T, value_T), np.bincount(group_T))


def _metrics(measured: Measured, choices: Choices) -> tuple[Metric, ...]:
    found = []
    for name in PARTS:
        of_blocks = [parts[name][:, 0] for parts in measured.values() if name in parts]
        if of_blocks:
            mean = _mean(np.mean(of_blocks, axis=0), choices)
            found.append(
                mean.metric(
                    name.replace(" ", "_") + "_share", "share", choices, "ratio estimator", least=-np.inf
                )
            )
    return tuple(found)


_VIEWS = (
    View(
        "line",
        x="layer",
        y="share",
        color="part",
        title="Share of each block's update of the residual stream",
        unit="share",
        tooltip=("low", "high", "size", "share_of_mlp"),
    ),
    View(
        "heatmap",
        x="layer",
        y="part",
        color="share",
        title="Share of each block's update (0 is none, negative works against it)",
        unit="share",
        midpoint=0.0,
        tooltip=("low", "high", "size", "share_of_mlp"),
    ),
    View(
        "table",
        x="layer",
        color="share",
        text="part",
        title="Shares by block and part",
        unit="share",
        tooltip=("low", "high", "size", "share_of_mlp", "tokens"),
    ),
)
