"""Calibration coverage: whether a calibration text reaches every expert often enough to judge it by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.probes._coverage import coverage
from core.probes._provenance import provenance
from core.probes._routing_report import shown_layers, shown_note
from core.registry import Example, Settings, method
from core.routing.aggregate import by_domain
from core.text.documents import load_documents
from core.text.domains import documents_by_domain
from core.types import Cost, Documents, Metric, Progress, Prompt, Result, View, content_hash

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class CalibrationCoverageSettings(Settings):
    """What text would calibrate, and how much is enough."""

    text: str = Field(
        "domains",
        description="Calibration text: domains (each kind counted by itself), domain:NAME, pydoc, a .txt or .jsonl file",
    )
    max_tokens: int = Field(16_384, ge=64, le=4_194_304, description="Tokens of the text that are counted")
    wanted: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Tokens that each expert should be chosen for, to be judged by them",
    )


def coverage_cost(anatomy: Anatomy, n_tokens: int, settings: CalibrationCoverageSettings) -> Cost:
    """Forward passes over the prompt that reading the text amounts to."""
    return Cost(settings.max_tokens / max(1, n_tokens))


_PROMPT = Prompt("(the calibration text is read; the prompt is not)")


@method(
    "probe",
    title="Calibration coverage",
    needs=["moe", "text"],
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", _PROMPT),
        Example("Python alone: who is never reached?", _PROMPT, {"text": "domain:python"}),
        Example("Enough for a mean of norms only", _PROMPT, {"wanted": 32}),
    ),
    cost=coverage_cost,
)
def calibration_coverage(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: CalibrationCoverageSettings
) -> Result:
    """Count how many calibration tokens each expert is chosen for, before anything is pruned or quantized by them.

    Every criterion that reads text, and every quantizer that looks at activations, knows of an expert only what the
    tokens routed to it show. An expert chosen for n of T tokens needs about (wanted − n) · T / n more; one that was never
    chosen is chosen for at most 3 / T of tokens with 95 % confidence (rule of three), so it needs at least wanted · T / 3
    more, or other text. Where several kinds of text are read, the kind that reaches an expert most is named.
    """
    started = time.perf_counter()
    groups = _texts(settings.text)
    found = by_domain(loaded, groups, progress, max_tokens=max(1, settings.max_tokens // len(groups)))
    names, counts = list(found), list(found.values())
    table = coverage(
        np.stack([c.load_LE for c in counts]),
        np.array([c.n_tokens for c in counts]),
        names,
        counts[0].layers,
        settings.wanted,
    )
    n_tokens = sum(c.n_tokens for c in counts)
    shown = table[table["layer"].isin(shown_layers(counts[0].layers, counts[0].n_experts))]
    return Result(
        frames={"main": shown, "experts": table, "layers": _by_layer(table)},
        views=_VIEWS,
        metrics=_metrics(table, n_tokens),
        provenance=provenance(
            loaded,
            prompt,
            method="calibration_coverage",
            settings=settings,
            started=started,
            conditions={
                "text": settings.text,
                "text_fingerprint": content_hash([groups[name].fingerprint for name in names]),
                "tokens": n_tokens,
            },
            exactness_gap=_gap(table, n_tokens, counts[0].top_k),
            exactness_check="largest |Σ tokens of a layer's experts − tokens × k|, as a share of tokens × k",
        ),
        notes=(*_notes(table, n_tokens, settings), *shown_note(counts[0].layers, counts[0].n_experts)),
    )


def _texts(source: str) -> dict[str, Documents]:
    if source.strip() == "domains":
        return documents_by_domain(split="calibration")
    documents = load_documents(source, split="calibration")
    return {documents.name: documents}


def _by_layer(table: pd.DataFrame) -> pd.DataFrame:
    kinds = pd.crosstab(table["layer"], table["verdict"]).reindex(
        columns=["covered", "too few", "never reached"], fill_value=0
    )
    least = table.groupby("layer").agg(fewest_tokens=("tokens", "min"), needs_more=("needs_more", "max"))
    return (
        kinds.rename(columns={"too few": "too_few", "never reached": "never_reached"})
        .join(least)
        .reset_index()
    )


def _gap(table: pd.DataFrame, n_tokens: int, top_k: int) -> float:
    due = n_tokens * top_k
    return float((table.groupby("layer")["tokens"].sum() - due).abs().max() / due)


def _metrics(table: pd.DataFrame, n_tokens: int) -> tuple[Metric, ...]:
    counts = table["verdict"].value_counts()
    return (
        Metric("experts_covered", float((table["verdict"] == "covered").mean()), "", "higher", n=n_tokens),
        Metric("experts_never_reached", int(counts.get("never reached", 0)), "experts", "lower", n=n_tokens),
        Metric("fewest_tokens_of_an_expert", int(table["tokens"].min()), "tokens", "higher", n=n_tokens),
        Metric("tokens_needed", n_tokens + int(table["needs_more"].max()), "tokens", "lower"),
    )


def _notes(table: pd.DataFrame, n_tokens: int, settings: CalibrationCoverageSettings) -> tuple[str, ...]:
    never, thin = table[table["verdict"] == "never reached"], table[table["verdict"] == "too few"]
    if never.empty and thin.empty:
        return (
            f"Every expert was chosen for at least {settings.wanted} of {n_tokens:,} tokens: enough to judge it.",
        )
    said = []
    if not thin.empty:
        worst = thin.nlargest(1, "needs_more").iloc[0]
        said.append(
            f"{len(thin)} of {len(table)} experts were chosen for fewer than {settings.wanted} of {n_tokens:,} tokens; "
            f"expert {worst['expert']} of layer {worst['layer']}, with {worst['tokens']}, needs about "
            f"{worst['needs_more']:,} more tokens like these, or {worst['needs_of_best_text']:,} of {worst['best_text']}."
        )
    if not never.empty:
        named = ", ".join(
            f"{layer}:{e}" for layer, e in zip(never["layer"].head(8), never["expert"].head(8), strict=True)
        )
        said.append(
            f"{len(never)} experts were never chosen ({named}{' …' if len(never) > 8 else ''}; layer:expert): at least "
            f"{never['needs_more'].max():,} more tokens, or other text. Pruning by this text would remove them unseen."
        )
    return tuple(said)


_VIEWS = (
    View(
        "heatmap", x="expert", y="layer", color="tokens", title="Calibration tokens of every expert", unit="tokens",
        log=True, tooltip=("verdict", "needs_more", "best_text", "needs_of_best_text"),
    ),
    View(
        "table", x="layer", text="expert", frame="experts", title="What each expert still needs",
        tooltip=("tokens", "verdict", "needs_more", "best_text", "needs_of_best_text"),
    ),
    View(
        "table", x="layer", text="covered", frame="layers", title="By layer",
        tooltip=("too_few", "never_reached", "fewest_tokens", "needs_more"),
    ),
)  # fmt: skip
