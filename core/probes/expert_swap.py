"""For one token: another expert in the place of a chosen one, and more experts or fewer, and what it then predicts.

Legend: T tokens up to the one looked at, K slots, E experts, V vocabulary.

The prompt is cut behind the token, so that it is the last one and nothing else can have changed. Only its own routing
is edited: the tokens before it keep theirs. What holds for one token says little about others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._ablation import ablation_share
from core.probes._provenance import provenance
from core.probes._routed_text import place_of
from core.probes._swapped_token import NOBODY, Whole, slots, swapped, with_k
from core.probes._targets import Token, resolve_position, resolve_token
from core.probes._tokens import encode
from core.registry import Example, Settings, method
from core.routing.discover import MoeLayer, moe_layers
from core.text.token_texts import token_texts
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class ExpertSwapSettings(Settings):
    """Which token, which layer, which expert, and who takes its place."""

    position: int = Field(-1, ge=-1, le=2047, description="Token whose routing is edited; -1: the last")
    layer: int = Field(
        -1, ge=-1, le=1023, description="Layer where an expert is replaced; -1: the last MoE layer"
    )
    expert: int = Field(
        -1, ge=-1, le=1023, description="Chosen expert that is replaced; -1: the one of largest weight"
    )
    replacement: int = Field(
        -1, ge=-1, le=1023, description="Expert shown in its place; -1: the one that changes most"
    )
    target: str = Field("", description="Token whose probability is followed; empty: the model's prediction")
    top_tokens: int = Field(10, ge=1, le=50, description="Most likely next tokens listed, before and after")


def _cost(anatomy: Anatomy, n_tokens: int, settings: ExpertSwapSettings) -> Cost:
    """A pass from the layer on per other expert, a whole one per number of experts, and two."""
    forwards = anatomy.n_experts * (1 + ablation_share(anatomy)) + 2
    kept = anatomy.n_layers * n_tokens * anatomy.d_model + 2 * anatomy.n_experts * anatomy.vocab_size
    return Cost(forwards, 4 * kept)


@method(
    "probe",
    title="Expert swap",
    needs=["decoder", "text", "moe"],
    answers="What if it routed otherwise?",
    examples=(
        Example("After a colon in Python", Prompt("def add(left, right):\n    return left")),
        Example("A sum", Prompt("12 + 7 = ")),
    ),
    cost=_cost,
)
def expert_swap(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertSwapSettings
) -> Result:
    """Give one token another expert, or another number of experts, and compare its next-token distribution.

    At one layer a chosen expert is replaced by each of the others in turn, which gets its routing weight; the last row
    leaves the place empty. KL is KL(as it is ‖ swapped) in nats. Below, the router of every layer gives this token its
    k best experts, k = 1 to all, weights normalized as the router does it: how many experts did this token need? The
    tokens before it keep their routing in both.
    """
    started = time.perf_counter()
    layers = moe_layers(loaded)
    encoded = encode(loaded, prompt)
    position = resolve_position(settings.position, encoded.n_tokens)
    layer = layers[place_of(settings.layer, [at.layer for at in layers]) if settings.layer >= 0 else -1]
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        whole = Whole.of(loaded, encoded.inputs["input_ids"][0, : position + 1])
        target = resolve_token(loaded, settings.target, logits_V=whole.logits_V)
        slot = _slot(whole, layer, settings.expert)
        others = _others(whole, layer, settings.replacement)
        by_expert = {}
        for number, expert in enumerate((*others, NOBODY)):
            progress(number, len(others) + layer.n_experts, f"another expert in layer {layer.layer}")
            by_expert[expert] = swapped(loaded, whole, layer.layer, slot, expert)
        counts = range(1, min(at.n_experts // at.n_groups * at.top_groups for at in layers) + 1)
        by_count = {}
        for k in counts:
            progress(len(others) + k, len(others) + layer.n_experts, "another number of experts")
            by_count[k] = with_k(loaded, whole, k)
        removed = int(whole.decisions[layer.layer][0][-1, slot])
        same_V = swapped(loaded, whole, layer.layer, slot, removed)
    gap = float((same_V - whole.logits_V).abs().max())
    table = _table(loaded, whole, layer, by_expert, target)
    shown = _shown(table, settings.replacement)
    frames = {
        "swaps": table,
        "main": _distribution(loaded, whole.logits_V, by_expert[shown], settings.top_tokens),
        "counts": _counts(loaded, whole, by_count, target),
        "chosen": _chosen(whole, layers),
    }
    said = f"L{layer.layer}E{removed}"
    return Result(
        frames=frames,
        views=_views(said, "nobody" if shown == NOBODY else f"E{shown}", target),
        metrics=_metrics(table, frames["counts"], shown, target, whole),
        provenance=provenance(
            loaded,
            prompt,
            method="expert_swap",
            settings=settings,
            started=started,
            conditions={
                "tokens": len(whole.ids_T),
                "replaced": said,
                "target": target.text,
                "fp32_path": path.name,
            },
            exactness_gap=gap,
            exactness_check="largest |logit with the expert in its own place − logit of the untouched model|",
        ),
        notes=(
            (
                f"Token {position}, {encoded.texts[position]!r}; layer {layer.layer} gave it "
                f"{', '.join(f'E{e} ({w:.2f})' for e, w in slots(whole.decisions[layer.layer]))}."
            ),
            "One token of one prompt: what experts do in general is the ablation map's matter.",
        ),
    )


def _slot(whole: Whole, layer: MoeLayer, expert: int) -> int:
    """Where the expert to replace stands among the token's slots; raises ``BadInput`` for one it was not given."""
    experts_TK, weights_TK = whole.decisions[layer.layer]
    if expert < 0:
        return int(weights_TK[-1].argmax())
    found = (experts_TK[-1] == expert).nonzero()
    if not len(found):
        chosen = ", ".join(str(e) for e, _ in slots(whole.decisions[layer.layer]))
        raise BadInput(
            f"layer {layer.layer} did not give this token expert {expert}; it gave {chosen}: replace one of these"
        )
    return int(found[0])


def _others(whole: Whole, layer: MoeLayer, replacement: int) -> list[int]:
    """The experts that this token was not given; raises ``BadInput`` where the wanted one is none of them."""
    chosen = set(whole.decisions[layer.layer][0][-1].tolist())
    others = [expert for expert in range(layer.n_experts) if expert not in chosen]
    if replacement >= 0 and replacement not in others:
        listed = ", ".join(map(str, others)) or "none: all are chosen"
        raise BadInput(
            f"expert {replacement} cannot take the place in layer {layer.layer}; others are {listed}"
        )
    return others


def _kl(base_V: Tensor, other_V: Tensor) -> float:
    """KL(base ‖ other) in nats, float64; exactly 0 for equal logits."""
    p_log_V, q_log_V = base_V.double().log_softmax(-1), other_V.double().log_softmax(-1)
    return max(0.0, float((p_log_V.exp() * (p_log_V - q_log_V)).sum()))


def _row(loaded: LoadedModel, base_V: Tensor, other_V: Tensor, target: Token) -> dict[str, Any]:
    """What one edited run says, beside the untouched one."""
    p_V = other_V.double().softmax(-1)
    top = int(p_V.argmax())
    return {
        "kl_nats": _kl(base_V, other_V),
        "top_token": token_texts(loaded.tokenizer, [top])[0],
        "flipped": "flipped" if top != int(base_V.argmax()) else "kept",
        "p_top": float(p_V[top]),
        "p_target": float(p_V[target.id]),
    }


def _table(
    loaded: LoadedModel, whole: Whole, layer: MoeLayer, by_expert: Mapping[int, Tensor], target: Token
) -> pd.DataFrame:
    """One row per replacement, the one that changes most first."""
    scores_E = whole.router_logits[layer.layer]
    rank_E = None if scores_E is None else scores_E.argsort(descending=True).argsort() + 1
    rows = [
        {
            "expert": expert,
            "replacement": "nobody" if expert == NOBODY else f"E{expert}",
            "router_rank": np.nan if rank_E is None or expert == NOBODY else float(rank_E[expert]),
            **_row(loaded, whole.logits_V, logits_V, target),
        }
        for expert, logits_V in by_expert.items()
    ]
    return pd.DataFrame(rows).sort_values("kl_nats", ascending=False, kind="stable", ignore_index=True)


def _shown(table: pd.DataFrame, replacement: int) -> int:
    if replacement >= 0:
        return replacement
    experts = table[table["expert"] != NOBODY]["expert"]
    return int(experts.iloc[0]) if len(experts) else NOBODY


def _distribution(loaded: LoadedModel, base_V: Tensor, other_V: Tensor, n: int) -> pd.DataFrame:
    """The most likely tokens before or after, long form: token, which, probability."""
    n = min(n, len(base_V))
    ids = list(dict.fromkeys([*base_V.topk(n).indices.tolist(), *other_V.topk(n).indices.tolist()]))
    before_N, after_N = (logits_V.double().softmax(-1)[ids].tolist() for logits_V in (base_V, other_V))
    names = token_texts(loaded.tokenizer, ids)
    return pd.DataFrame(
        {
            "token": [*names, *names],
            "routing": ["as it is"] * len(ids) + ["swapped"] * len(ids),
            "probability": [*before_N, *after_N],
            "change": [after - before for before, after in zip(before_N, after_N, strict=True)] * 2,
        }
    )


def _counts(loaded: LoadedModel, whole: Whole, by_count: Mapping[int, Tensor], target: Token) -> pd.DataFrame:
    """One row per number of experts given to the token."""
    return pd.DataFrame(
        [{"experts": k, **_row(loaded, whole.logits_V, logits_V, target)} for k, logits_V in by_count.items()]
    )


def _chosen(whole: Whole, layers: tuple[MoeLayer, ...]) -> pd.DataFrame:
    """The token's path: its experts in every layer, heaviest first."""
    return pd.DataFrame(
        [
            {"layer": at.layer, "choice": place, "expert": expert, "weight": weight}
            for at in layers
            for place, (expert, weight) in enumerate(slots(whole.decisions[at.layer]), 1)
        ]
    )


def _metrics(
    table: pd.DataFrame, counts: pd.DataFrame, shown: int, target: Token, whole: Whole
) -> tuple[Metric, ...]:
    row = table[table["expert"] == shown].iloc[0]
    before = float(whole.logits_V.double().softmax(-1)[target.id])
    kept = counts[counts["flipped"] == "kept"]["experts"]
    return (
        Metric("kl", float(row["kl_nats"]), "nats", "neither", 1),
        Metric("p_target_before", before, "probability", "neither", 1),
        Metric("p_target_after", float(row["p_target"]), "probability", "neither", 1),
        Metric(
            "swaps_that_flip", float((table["flipped"] == "flipped").sum()), "experts", "neither", len(table)
        ),
        *(
            [Metric("fewest_experts", float(kept.min()), "experts/token", "neither", len(counts))]
            if len(kept)
            else []
        ),
    )


def _views(replaced: str, shown: str, target: Token) -> tuple[View, ...]:
    said = ("top_token", "flipped", "p_top", "p_target")
    return (
        View(
            "bar",
            x="token",
            y="probability",
            color="routing",
            title=f"Next token as it is, and with {shown} in place of {replaced}",
            unit="probability",
            tooltip=("change",),
        ),
        View(
            "table",
            x="replacement",
            y="kl_nats",
            frame="swaps",
            title=f"Everyone in place of {replaced}, the largest change first",
            tooltip=("router_rank", *said),
        ),
        View(
            "line",
            x="experts",
            y="kl_nats",
            frame="counts",
            title="KL when every layer gives this token its k best experts",
            unit="nats",
            tooltip=said,
        ),
        View(
            "line",
            x="experts",
            y="p_target",
            frame="counts",
            title=f"Probability of {target.text!r} with k experts",
            unit="probability",
            tooltip=said,
        ),
        View(
            "table",
            x="layer",
            y="weight",
            frame="chosen",
            title="The experts this token was given",
            tooltip=("choice", "expert"),
        ),
    )
