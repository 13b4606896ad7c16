"""Router saturation: how early in training tokens got the experts they have at the end.

It compares decisions on the same tokens, written down at checkpoints. It knows nothing about how good they are.
Legend: C checkpoints, L MoE layers, T tokens, K top-k slots.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput, CannotOpen
from core.evaluate._intervals import Bootstrap
from core.lazy import torch
from core.models.demo import demo_files
from core.models.open import open_model
from core.probes._provenance import provenance
from core.registry import Example, Settings, method
from core.routing.aggregate import SEQ_LEN
from core.routing.lens import Routed, layers_of, routed
from core.routing.statistics import overlap_at_k, overlap_by_chance
from core.routing.trace import MAX_TOKENS, token_ids
from core.text.domains import documents_by_domain
from core.types import Cost, Metric, ModelRef, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

STORED = "routing_checkpoints.npz"
"""Decisions a training run wrote down itself, beside its weights."""
DRAWS = 1000


class RoutingSaturationSettings(Settings):
    """Which earlier checkpoints to compare with the open model."""

    checkpoints: str = Field(
        "",
        max_length=4000,
        description="Folders or model names of earlier checkpoints, oldest first, separated by commas; empty: the "
        "decisions that the model's own training wrote down (demo:moe has them)",
    )
    max_tokens: int = Field(
        2048,
        ge=64,
        le=MAX_TOKENS,
        description="Tokens compared, in equal parts of every domain's evaluation text",
    )


@dataclass(frozen=True, eq=False)
class Decisions:
    """The experts of every token at every checkpoint, the last one final."""

    names: tuple[str, ...]
    share_C: tuple[float | None, ...]
    """Share of training done; None where it is not known."""
    layers: tuple[int, ...]
    experts_CLTK: NDArray[np.int64]
    group_T: NDArray[np.int64]
    """Window or document of each token: what is resampled."""
    n_experts: int
    text: str


def _cost(anatomy: Anatomy, n_tokens: int, settings: RoutingSaturationSettings) -> Cost:
    """Nothing is run for stored decisions; otherwise every checkpoint reads the text once."""
    names = [name for name in settings.checkpoints.split(",") if name.strip()]
    return Cost((1 + len(names)) * settings.max_tokens / max(1, n_tokens) if names else 0.0)


@method(
    "probe",
    title="Router saturation",
    needs=["decoder", "text", "moe"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("How early demo:moe's routers settled", Prompt("(stored decisions; the prompt is not read)")),
    ),
    cost=_cost,
)
def routing_saturation(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: RoutingSaturationSettings
) -> Result:
    """Show how many of a token's final experts it already had earlier in training.

    For every layer and checkpoint: the mean over tokens of |E_t ∩ E_final| / k, E_t the k experts that the checkpoint
    chose for the token and E_final those of the last one (OLMoE, section 5.1). 1 is settled; two unrelated routers
    agree on k / E of their choices on average (hypergeometric), the floor to read against. Intervals
    resample whole windows of text, not tokens.

    demo:moe carries the decisions its training wrote down at 1, 10, 40 and 100 % of its schedule. For any other model
    name the folders of its checkpoints; they must share its tokenizer and its experts.
    """
    started = time.perf_counter()
    found = _asked(loaded, settings, progress) if settings.checkpoints.strip() else _stored(loaded)
    overlap_CLT = overlap_at_k(found.experts_CLTK, found.experts_CLTK[-1])
    top_k = found.experts_CLTK.shape[-1]
    chance, _ = overlap_by_chance(found.n_experts, top_k)
    frame = _frame(found, overlap_CLT, chance)
    first = overlap_CLT[0].mean()
    said = (
        f"At {found.names[0]} tokens have {first:.0%} of their final experts; unrelated routers would share "
        f"{chance:.0%} (k / E = {top_k} / {found.n_experts})."
    )
    return Result(
        frames={"main": frame},
        views=_VIEWS,
        metrics=(
            Metric("saturation_first", float(first), "share", "neither", n=overlap_CLT.shape[-1]),
            Metric("saturation_by_chance", chance, "share"),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="routing_saturation",
            settings=settings,
            started=started,
            conditions={
                "tokens": overlap_CLT.shape[-1],
                "text": found.text,
                "checkpoints": list(found.names),
            },
            exactness_gap=float(np.abs(overlap_CLT[-1] - 1).max()),
            exactness_check="a checkpoint against itself has saturation 1",
        ),
        notes=(said, f"Text: {found.text}. The prompt is not read."),
    )


_VIEWS = (
    View(
        "line", x="checkpoint", y="saturation", color="layer",
        title="Share of a token's final experts that it already had", unit="share",
        tooltip=("low", "high", "by_chance", "progress"),
    ),
    View(
        "heatmap", x="checkpoint", y="layer", color="saturation", text="saturation",
        title="Router saturation by layer", unit="share", tooltip=("low", "high", "by_chance"),
    ),
)  # fmt: skip


def _frame(found: Decisions, overlap_CLT: NDArray[np.float64], chance: float) -> pd.DataFrame:
    groups = np.unique(found.group_T, return_inverse=True)[1]
    sizes = np.bincount(groups).astype(np.float64)
    bootstrap = Bootstrap(len(sizes), draws=DRAWS, seed=0, unit="windows")
    rows = []
    for name, share, overlap_LT in zip(found.names, found.share_C, overlap_CLT, strict=True):
        for layer, overlap_T in zip(found.layers, overlap_LT, strict=True):
            interval = bootstrap.ratio(np.bincount(groups, weights=overlap_T).astype(np.float64), sizes)
            rows.append(
                {
                    "checkpoint": name,
                    "layer": layer,
                    "saturation": float(overlap_T.mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "by_chance": chance,
                    "progress": share,
                }
            )
    return pd.DataFrame(rows).astype({"progress": "Float64"})


def _stored(loaded: LoadedModel) -> Decisions:
    """What the training of a demo wrote down; raises ``BadInput`` for a model that has nothing."""
    folder = (
        demo_files(loaded.ref.source.removeprefix("demo:")) if loaded.ref.kind == "demo" else loaded.folder
    )
    path = Path(folder) / STORED
    if not path.is_file():
        raise BadInput(
            f"{loaded.ref} has no routing decisions stored from its training; name earlier checkpoints of it in "
            "`checkpoints`, or open demo:moe, which has them"
        )
    with np.load(path) as file:
        steps, progress = file["steps_C"].tolist(), file["progress_C"].tolist()
        experts_CLTK = file["experts_CLTK"].astype(np.int64)
        window, domains = int(file["window"]), np.unique(file["domains"])
    return Decisions(
        names=tuple(f"{share:.0%} (step {step:,})" for step, share in zip(steps, progress, strict=True)),
        share_C=tuple(progress),
        layers=tuple(at.layer for at in layers_of(loaded)),
        experts_CLTK=experts_CLTK,
        group_T=np.arange(experts_CLTK.shape[2]) // window,
        n_experts=layers_of(loaded)[0].n_experts,
        text=f"evaluation text of {len(domains)} domains, {experts_CLTK.shape[2]:,} tokens, as recorded in training",
    )


def _asked(loaded: LoadedModel, settings: RoutingSaturationSettings, progress: Progress) -> Decisions:
    """Run every named checkpoint and the open model on the same tokens."""
    names = [name.strip() for name in settings.checkpoints.split(",") if name.strip()]
    windows = _windows(loaded, settings.max_tokens)
    at_end = layers_of(loaded)
    chosen = []
    for index, name in enumerate([*names, None]):
        part = part_of(progress, index / (len(names) + 1), (index + 1) / (len(names) + 1))
        model = loaded if name is None else _checkpoint(name, loaded)
        chosen.append(_decide(model, windows, part))
    return Decisions(
        names=(*names, str(loaded.ref)),
        share_C=(None,) * len(chosen),
        layers=tuple(at.layer for at in at_end),
        experts_CLTK=np.stack(chosen),
        group_T=np.repeat(np.arange(len(windows)), [len(ids) for ids in windows]),
        n_experts=at_end[0].n_experts,
        text=f"evaluation text of all domains, {sum(map(len, windows)):,} tokens",
    )


def _checkpoint(name: str, loaded: LoadedModel) -> LoadedModel:
    """Open a checkpoint, or say which of the list cannot be used."""
    try:
        found = open_model(ModelRef.parse(name, dtype=loaded.ref.dtype, device=loaded.ref.device))
    except CannotOpen as error:
        raise BadInput(f"checkpoint {name} cannot be opened: {error}") from None
    if found.anatomy.vocab_size != loaded.anatomy.vocab_size:
        raise BadInput(
            f"checkpoint {name} knows {found.anatomy.vocab_size:,} tokens and {loaded.ref} "
            f"{loaded.anatomy.vocab_size:,}; give checkpoints of one training"
        )
    try:
        theirs = [(at.layer, at.n_experts, at.top_k) for at in layers_of(found)]
    except BadInput as error:
        raise BadInput(f"checkpoint {name}: {error}") from None
    if theirs != [(at.layer, at.n_experts, at.top_k) for at in layers_of(loaded)]:
        raise BadInput(
            f"checkpoint {name} has other experts than {loaded.ref}; give checkpoints of one training"
        )
    return found


def _windows(loaded: LoadedModel, max_tokens: int) -> list[list[int]]:
    """Windows of single documents, the domains in turn, ``max_tokens`` tokens together at most."""
    length = min(SEQ_LEN, loaded.anatomy.context_length)
    each = documents_by_domain()
    found, left = [], max_tokens
    for turn in range(max(len(documents.texts) for documents in each.values())):
        for documents in each.values():
            if turn < len(documents.texts) and left > 0:
                found.append(token_ids(loaded, documents.texts[turn])[: min(length, left)])
                left -= len(found[-1])
    return found


def _decide(loaded: LoadedModel, windows: list[list[int]], progress: Progress) -> NDArray[np.int64]:
    """[L, T, K]: the experts of all windows' tokens."""
    kept: dict[int, list[Any]] = {at.layer: [] for at in layers_of(loaded)}

    def keep(at: Routed) -> None:
        kept[at.layer].append(at.experts_TK.cpu().numpy())

    for index, ids in enumerate(windows):
        progress(index, len(windows), f"routing the text through {loaded.ref}")
        with loaded.lock, torch.inference_mode(), routed(loaded, keep):
            loaded.model(
                input_ids=torch.tensor([ids], device=loaded.model.device), use_cache=False, logits_to_keep=1
            )
    return np.stack([np.concatenate(parts) for parts in kept.values()]).astype(np.int64)
