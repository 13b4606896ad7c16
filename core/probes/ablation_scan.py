"""Ablation scan: take out every head and every MLP in turn, and map what the model loses.

Legend: C components, S texts, T tokens.

One number per component says how much the predictions need it on these texts (Michel et al. 2019), nothing of what it
does; a component whose work another can do shows little.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._ablation import Ablation, Component, Effects, Scored, ablate, ablation_share, heads, mlps
from core.probes._interval import half_width
from core.probes._provenance import provenance
from core.probes._targets import Token, resolve_distractor, resolve_token
from core.probes._tokens import encode
from core.registry import Example, Settings, method
from core.text.documents import load_documents
from core.text.windows import encode_document
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
Effect = Literal["loss_increase", "kl_nats", "last_kl_nats", "logit_change"]
TITLES: dict[str, str] = {
    "loss_increase": "Loss that the ablation adds",
    "kl_nats": "KL from the whole model to the ablated one",
    "last_kl_nats": "The same KL at the last position",
    "logit_change": "Change of the target's logit at the last position",
}
MAX_TOKENS = 512
"""Of one text: each ablated run predicts all of it."""


class AblationScanSettings(Settings):
    """What an ablated component puts out instead, and on which texts."""

    ablation: Ablation = Field(
        "mean",
        description="What an ablated component puts out: zero; its mean over all positions of the texts; "
        "its mean over texts at each position (several texts); resample: its output at random other places",
    )
    rank_by: Effect = Field("kl_nats", description="Effect that ranks the table and is mapped first")
    target: str = Field("", description="Token whose last logit is followed; empty: the model's prediction")
    distractor: str = Field("", description="Token whose logit is subtracted from the target's; may be empty")
    documents: str = Field(
        "", description="Texts instead of the prompt: pydoc, a .txt or .jsonl file, hub:ID; empty: the prompt"
    )
    n_documents: int = Field(8, ge=1, le=64, description="Documents scanned")
    tokens: int = Field(64, ge=8, le=MAX_TOKENS, description="First tokens of each document")
    seed: int = Field(0, ge=0, le=1_000_000, description="Seed of the places drawn for resample")

    @property
    def reads_prompt(self) -> bool:
        """Only where no documents are named."""
        return not self.documents.strip()


def _cost(anatomy: Anatomy, n_tokens: int, settings: AblationScanSettings) -> Cost:
    """One run per component and text, two to record, and memory for the outputs and a few batches of logits."""
    components = anatomy.n_layers * (anatomy.n_heads + 1)
    texts, tokens = (settings.n_documents, settings.tokens) if settings.documents else (1, max(2, n_tokens))
    forwards = texts * tokens / max(1, n_tokens) * (components * ablation_share(anatomy) + 2)
    kept = texts * tokens * anatomy.n_layers * (anatomy.n_heads * anatomy.head_dim + anatomy.d_model)
    return Cost(forwards, 4 * (kept + 3 * tokens * anatomy.vocab_size) + (512 << 20))


@method(
    "probe",
    title="Ablation scan",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/1905.10650",
    answers="Which heads matter?",
    examples=(
        Example(
            "Who carries the name to the last word",
            Prompt("When Mary and John went to the store, John gave a drink to"),
            {"target": " Mary", "distractor": " John", "rank_by": "logit_change"},
        ),
        Example(
            "Which parts ordinary text needs",
            Prompt("(the documents are read instead)"),
            {"documents": "pydoc", "n_documents": 8, "tokens": 32},
        ),
    ),
    cost=_cost,
)
def ablation_scan(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AblationScanSettings
) -> Result:
    """Ablate every head and every MLP in turn and measure what the predictions lose.

    The loss increase is the mean surprisal (nats per token) of the text with the component ablated minus without. KL
    is KL(whole model ‖ ablated), the mean over positions: it also sees changes that neither help nor hurt the text.
    The logit change is that of the target's logit (minus the distractor's) at the last position of the prompt;
    negative means that the component spoke for the target.

    Zero ablation asks more than removal, because later layers have never seen zeros there; the mean keeps what is
    always the same and removes what depends on the input; resample keeps the spread, too. Over several texts a 95 %
    interval of the mean is given (Student's t over texts). One text gives none: its tokens are not independent.
    """
    started = time.perf_counter()
    anatomy = loaded.anatomy
    texts, names, fingerprint = _texts(loaded, prompt, settings)
    components = [*heads(anatomy), *mlps(anatomy)]
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        target, distractor = _contrast(loaded, texts[0], settings)
        scored = Scored(slice(None), target.id if target else None, distractor.id if distractor else None)
        effects = ablate(
            loaded,
            texts,
            components,
            [scored] * len(texts),
            mode=settings.ablation,
            seed=settings.seed,
            progress=progress,
        )
    frame = _frame(components, effects, has_target=target is not None)
    n_tokens = sum(len(ids) - 1 for ids in texts)
    return Result(
        frames={"ranked": _ranked(frame, settings.rank_by), "main": frame},
        views=_views(frame, settings, target, distractor),
        metrics=_metrics(frame, effects, n_tokens, target),
        provenance=provenance(
            loaded,
            prompt,
            method="ablation_scan",
            settings=settings,
            started=started,
            conditions={
                "texts": names,
                "texts_fingerprint": fingerprint,
                "tokens": n_tokens,
                "fp32_path": path.name,
            },
            exactness_gap=effects.gap,
            exactness_check="largest |loss, KL or logit − that of a whole forward with hooks| on the first text, "
            f"{effects.checked.name} ablated",
        ),
        notes=_notes(texts, names, settings),
    )


def _texts(
    loaded: LoadedModel, prompt: Prompt, settings: AblationScanSettings
) -> tuple[list[Tensor], str, str]:
    """The texts as token ids [T], what they are called, and the hash of their content."""
    if not settings.documents:
        if settings.ablation == "position_mean":
            raise BadInput(
                "the mean over texts at each position of one prompt is the prompt itself; set documents, or ablation to mean"
            )
        encoded = encode(loaded, prompt)
        if not 2 <= encoded.n_tokens <= MAX_TOKENS:
            raise BadInput(
                f"the prompt has {encoded.n_tokens} tokens; an ablation scan takes 2 to {MAX_TOKENS}"
            )
        return [encoded.inputs["input_ids"][0]], "the prompt", prompt.fingerprint
    if settings.target or settings.distractor:
        raise BadInput("target and distractor belong to a prompt; leave documents empty, or both of them")
    documents = load_documents(settings.documents, limit=settings.n_documents)
    limit = min(settings.tokens, loaded.anatomy.context_length)
    ids = [encode_document(loaded.tokenizer, text, max_tokens=limit).ids for text in documents.texts]
    ids = [each for each in ids if len(each) >= 2]
    if not ids:
        raise BadInput(f"{documents.name} has no document of at least 2 tokens; give longer text")
    if settings.ablation == "position_mean":
        shortest = min(len(each) for each in ids)
        ids = [each[:shortest] for each in ids]
        if len(ids) < 2:
            raise BadInput("the mean over texts at each position needs at least 2 documents")
    return (
        [torch.tensor(each, device=loaded.device) for each in ids],
        f"{len(ids)} documents of {documents.name}",
        documents.fingerprint,
    )


def _contrast(
    loaded: LoadedModel, ids_T: Tensor, settings: AblationScanSettings
) -> tuple[Token | None, Token | None]:
    """The tokens followed at the last position; none over documents."""
    if settings.documents:
        return None, None
    logits_V = loaded.model(ids_T[None], use_cache=False, logits_to_keep=1).logits[0, -1]
    target = resolve_token(loaded, settings.target, role="target", logits_V=logits_V)
    return target, resolve_distractor(loaded, settings.distractor, target)


def _frame(components: list[Component], effects: Effects, *, has_target: bool) -> pd.DataFrame:
    """One row per component, in the order of the map."""
    per_text: dict[str, Floats] = {
        "loss_increase": effects.nats_CS - effects.base_nats_S,
        "kl_nats": effects.kl_CS,
        "last_kl_nats": effects.last_kl_CS,
    }
    if has_target:
        per_text["logit_change"] = effects.logit_CS - effects.base_logit_S
    columns: dict[str, Any] = {
        "name": [component.name for component in components],
        "layer": [component.layer for component in components],
        "component": ["MLP" if c.head is None else str(c.head) for c in components],
    }
    for name, values_CS in per_text.items():
        columns[name] = values_CS.mean(1)
        if values_CS.shape[1] > 1:
            columns[f"{name}_ci95"] = half_width(values_CS.T)
    return pd.DataFrame(columns)


def _ranked(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The strongest effects of either sign."""
    by = by if by in frame else "kl_nats"
    order = frame[by].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].head(50).reset_index(drop=True)


def _metrics(
    frame: pd.DataFrame, effects: Effects, n_tokens: int, target: Token | None
) -> tuple[Metric, ...]:
    base = effects.base_nats_S
    n = len(base)
    half = float(half_width(base[:, None])[0]) if n > 1 else None
    loss = Metric(
        "loss",
        float(base.mean()),
        "nats/token",
        n=n_tokens,
        low=None if half is None else float(base.mean()) - half,
        high=None if half is None else float(base.mean()) + half,
        interval="" if half is None else f"Student's t over {n} texts",
    )
    largest = Metric("largest_kl", float(frame["kl_nats"].max()), "nats/token", n=n_tokens)
    if target is None:
        return loss, largest
    return loss, largest, Metric("logit", float(effects.base_logit_S[0]), "logits", n=1)


def _views(
    frame: pd.DataFrame, settings: AblationScanSettings, target: Token | None, distractor: Token | None
) -> tuple[View, ...]:
    shown = [name for name in TITLES if name in frame]
    first = settings.rank_by if settings.rank_by in shown else "kl_nats"
    titles = dict(TITLES)
    if target is not None:
        minus = f" minus {distractor.text!r}" if distractor else ""
        titles["logit_change"] = f"Change of the logit of {target.text!r}{minus} at the last position"
    tooltip = ("name", *shown)
    table = View(
        "table",
        x="name",
        y=first,
        frame="ranked",
        title=f"Strongest components: {titles[first][0].lower()}{titles[first][1:]}",
        tooltip=tuple(name for name in map(str, frame) if name not in ("layer", "component")),
    )
    maps = tuple(
        View(
            "heatmap",
            x="component",
            y="layer",
            color=name,
            title=titles[name],
            unit="logits" if name == "logit_change" else "nats",
            midpoint=0.0 if name in ("loss_increase", "logit_change") else None,
            tooltip=tooltip,
        )
        for name in dict.fromkeys((first, *shown))
    )
    return (table, *maps)


def _notes(texts: list[Tensor], names: str, settings: AblationScanSettings) -> tuple[str, ...]:
    notes = [f"Scored on {names}: {sum(len(ids) - 1 for ids in texts)} predicted tokens."]
    if len(texts) == 1:
        notes.append("One text gives no interval: its tokens are not independent.")
    if settings.rank_by == "logit_change" and settings.documents:
        notes.append("A logit is followed on a prompt only, so the table is ranked by KL.")
    return tuple(notes)
