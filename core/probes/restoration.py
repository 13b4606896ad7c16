"""Which part of a compressed model is to blame: put the original's activation back, one part at a time.

Legend: L layers, N shown positions, P prompt positions, D d_model, V vocabulary.

The same move as activation patching, across two models instead of two prompts. A part whose original activation
brings the prediction back is where the damage enters, and a candidate for more bits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._distribution import Reference, batch_reader, describe
from core.probes._provenance import provenance
from core.probes._recording import Node, Recording, record
from core.probes._replay import Patch, replay
from core.probes._twins import FACTS_AND_NAMES, conditions, encode_for_both
from core.registry import Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

PARTS: dict[Node, str] = {"residual": "residual stream", "attention_out": "attention", "mlp_out": "MLP"}
SMALLEST_KL = 1e-6
"""Below this KL (nats) both models say the same as far as float32 can tell, and there is nothing to restore."""


class RestorationSettings(Settings):
    """Where the prediction is compared."""

    positions: int = Field(
        32, ge=1, le=512, description="Last positions of the prompt whose prediction is compared"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: RestorationSettings) -> Cost:
    """Half a forward pass per part on average, since a replay starts at the part's own layer."""
    rows = len(PARTS) * anatomy.n_layers + 1
    return Cost(2 + rows, 4 * n_tokens * anatomy.d_model * anatomy.n_layers * 10)


@method(
    "probe",
    title="Restoration",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2202.05262",
    answers="What did compression break?",
    examples=(FACTS_AND_NAMES,),
    cost=_cost,
)
def restoration(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: RestorationSettings,
) -> Result:
    """Rank the parts of a variant by how much of the lost prediction their original activation brings back.

    The variant runs on the prompt; then once per part with that part's output replaced, at all positions, by what the
    original computed there. Recovered = 1 − KL(original ‖ restored) / KL(original ‖ variant), averaged over the shown
    positions: 1 brings everything back, 0 nothing, below 0 it hurts, since later layers have adapted to the
    error. The residual stream's column says how far the damage has come by each layer: what restoring it after the last
    block leaves is the unembedding's own share.
    """
    started = time.perf_counter()
    encoded = encode_for_both(loaded, reference, prompt)
    start = encoded.start(settings.positions)
    n_layers = loaded.anatomy.n_layers
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        nodes: tuple[Node, ...] = ("attention_out", "mlp_out")
        original = record(reference, encoded.inputs, nodes)
        variant = record(loaded, encoded.inputs, nodes)
        judge = _Judge(loaded, reference, original, start)
        lost = judge.kl(variant.at("residual", n_layers))
        if lost < SMALLEST_KL:
            raise BadInput(
                f"{loaded.ref} and {reference.ref} predict the same here (KL {lost:.1e} nats), so there is nothing to "
                "restore; pick a stronger compressed variant or another prompt"
            )
        cells = [(layer, node) for node in PARTS for layer in range(n_layers)]
        kl_of, unchanged = _replayed(loaded, variant, original, cells, judge, progress)
        head_kl = judge.kl(variant.at("residual", n_layers), by_original=True)
    frame = pd.DataFrame(
        {
            "layer": [*(layer for layer, _ in cells), n_layers],
            "part": [*(PARTS[node] for _, node in cells), "unembedding"],
            "kl_nats": [*kl_of, head_kl],
            "recovered": 1 - np.array([*kl_of, head_kl]) / lost,
        }
    )
    parts = frame[frame["part"] != PARTS["residual"]]
    ranked = parts.sort_values("recovered", ascending=False, ignore_index=True)
    ranked.insert(0, "rank", np.arange(1, len(ranked) + 1))
    return Result(
        frames={"ranked": ranked, "main": frame},
        views=_VIEWS,
        metrics=(
            Metric("kl", lost, "nats", "lower", n=encoded.n_tokens - start),
            Metric("best_recovered", float(ranked["recovered"].iloc[0]), "share", "higher"),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="restoration",
            settings=settings,
            started=started,
            conditions=conditions({"tokens": encoded.n_tokens}, reference, path),
            exactness_gap=abs(unchanged - lost),
            exactness_check="|KL change|, nats, when a part is replaced by what the variant itself computed there",
        ),
        notes=(
            f"Original: {reference.ref}. The unembedding (with the final norm) is a part too, the last row.",
            "Parts are restored one at a time; their shares need not add up.",
        ),
    )


_VIEWS = (
    View(
        "table",
        x="rank",
        y="layer",
        color="recovered",
        text="part",
        frame="ranked",
        title="Parts that bring the prediction back",
        tooltip=("kl_nats",),
    ),
    View(
        "heatmap",
        x="part",
        y="layer",
        color="recovered",
        title="Share of the lost prediction that one part brings back",
        unit="share",
        midpoint=0.0,
        tooltip=("kl_nats",),
    ),
)


class _Judge:
    """KL from the original's prediction to another final residual stream's, mean over the shown positions, nats."""

    def __init__(self, loaded: LoadedModel, reference: LoadedModel, original: Recording, start: int) -> None:
        self._start = start
        self._read = batch_reader(loaded)
        self._read_original = batch_reader(reference)
        final_PD = original.at("residual", reference.anatomy.n_layers)
        self._against = Reference.of(self._read_original(final_PD[start:]))
        self._targets_N = torch.zeros(original.n_tokens - start, dtype=torch.long, device=loaded.model.device)

    def kl(self, final_PD: Tensor, *, by_original: bool = False) -> float:
        """Of one final residual stream, before the final norm, read by the variant's unembedding or the original's."""
        read = self._read_original if by_original else self._read
        described = describe(
            read(final_PD[self._start :]),
            self._targets_N,
            top_k=1,
            reference=self._against,
            where=lambda row: f"position {self._start + row} of the variant",
        )
        return float(described.kl_R.mean())


def _replayed(
    loaded: LoadedModel,
    variant: Recording,
    original: Recording,
    cells: Sequence[tuple[int, Node]],
    judge: _Judge,
    progress: Progress,
) -> tuple[list[float], float]:
    """KL after restoring each cell's part, and after none; the residual stream is that after the layer's block."""
    n_layers = loaded.anatomy.n_layers
    kl_of = [float("nan")] * len(cells)
    rows: dict[int, tuple[Patch, ...]] = {}
    for number, (layer, node) in enumerate(cells):
        if node != "residual":
            rows[number] = (Patch(layer, node, 0, original.at(node, layer)),)
        elif layer + 1 < n_layers:
            rows[number] = (Patch(layer + 1, node, 0, original.at(node, layer + 1)),)
        else:
            kl_of[number] = judge.kl(original.at(node, n_layers))
    rows[len(cells)] = (Patch(0, "attention_out", 0, variant.at("attention_out", 0)),)
    kl_of.append(float("nan"))
    numbers = list(rows)

    def read(chosen: Sequence[int], start: int, residual_RPD: Tensor) -> None:
        for row, final_PD in zip(chosen, residual_RPD, strict=True):
            kl_of[numbers[row]] = judge.kl(final_PD)

    replay(loaded, variant, list(rows.values()), read, progress=progress)
    return kl_of[:-1], kl_of[-1]
