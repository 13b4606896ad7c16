"""Calibration report: what a text is worth to the steps that are calibrated on it, before they run for minutes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.calibrate.windows import calibration_windows
from core.probes._calibration_checks import WANTED, checks, metrics
from core.probes._calibration_text import CalibrationText
from core.probes._coverage import coverage
from core.probes._input_rank import COLUMNS, input_ranks
from core.probes._provenance import provenance
from core.registry import Example, Settings, method
from core.routing.aggregate import aggregate
from core.text.documents import load_documents
from core.types import Cost, Documents, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class CalibrationReportSettings(Settings):
    """The text, and how a calibrated step would read it."""

    text: str = Field(
        "pydoc", description="Calibration text: pydoc, domains, domain:NAME, a .txt or .jsonl file, or hub:ID"
    )
    samples: int = Field(128, ge=1, le=4096, description="Windows that a step would read")
    sample_tokens: int = Field(
        512, ge=8, le=32_768, description="Tokens of a window; clipped to the context length"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the choice among windows")
    near: float = Field(
        0.8, ge=0.5, le=1, description="Share of common word runs from which two documents count as one"
    )
    read_tokens: int = Field(
        4096,
        ge=0,
        le=1_048_576,
        description="Tokens run through the model for ranks and experts; 0 runs none",
    )
    layers: int = Field(3, ge=1, le=256, description="Layers whose inputs are looked at, evenly spread")

    @property
    def reads_prompt(self) -> bool:
        """The text is named here."""
        return False


def report_cost(anatomy: Anatomy, n_tokens: int, settings: CalibrationReportSettings) -> Cost:
    """The tokens read, in prompts, for ranks and for experts."""
    passes = 2 if anatomy.n_experts else 1
    widest = max(anatomy.d_model, anatomy.d_ff)
    return Cost(1 + passes * settings.read_tokens / max(1, n_tokens), 4 * settings.layers * 4 * widest**2)


_PROMPT = Prompt("(the calibration text is read; the prompt is not)")


@method(
    "probe",
    title="Calibration report",
    needs=["text"],
    paper="https://arxiv.org/abs/2311.09755",
    answers="What did compression break?",
    examples=(
        Example("Python's reference prose", _PROMPT),
        Example("All embedded kinds of text", _PROMPT, {"text": "domains"}),
        Example("The text alone, no forward pass", _PROMPT, {"read_tokens": 0}),
    ),
    cost=report_cost,
)
def run(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: CalibrationReportSettings
) -> Result:
    """Judge a calibration text for this model: tokens that count, repeats, kinds, broken characters, ranks, experts.

    Windows are those that GPTQ and its kin would read: documents laid end to end and cut, no padding. A run of eight
    tokens that was met before counts as repeated. A matrix whose inputs X have fewer tokens than columns, or lie in fewer
    directions, has a singular H = XᵀX: what the step knows of the missing directions is its damping. An expert is judged by
    the tokens routed to it alone. What looks wrong is named; whether it matters is for the measured variant to say.
    """
    started = time.perf_counter()
    documents = load_documents(settings.text, split="calibration")
    windows_BP = calibration_windows(
        loaded, documents, samples=settings.samples, sample_tokens=settings.sample_tokens, seed=settings.seed
    )
    text = CalibrationText.of(loaded, documents, windows_BP.cpu().numpy(), near=settings.near)
    ranks = _ranks(loaded, windows_BP, part_of(progress, 0.1, 0.7), settings)
    experts = _experts(loaded, documents, part_of(progress, 0.7, 1.0), settings)
    looked = checks(text, ranks, experts, samples=settings.samples, near=settings.near)
    frames = {"main": looked, "kinds": text.kinds(), "documents": text.table()}
    frames |= {"ranks": ranks} if len(ranks) else {}
    frames |= {"experts": experts} if experts is not None else {}
    return Result(
        frames=frames,
        views=tuple(view for view in _VIEWS if view.frame in frames),
        metrics=metrics(text, ranks),
        provenance=provenance(
            loaded,
            prompt,
            method="calibration_report",
            settings=settings,
            started=started,
            conditions={"text": documents.name, "text_fingerprint": documents.fingerprint},
            exactness_gap=abs(text.n_used + text.n_left - text.n_tokens) / text.n_tokens,
            exactness_check="tokens in windows and left over, against all tokens of the text",
        ),
        notes=(
            "A document's kind is the embedded kind of text whose byte trigrams are nearest: a hint, no measurement.",
            "Paragraphs of 200 characters or more that an earlier document has were left out on loading.",
        ),
    )


def _ranks(
    loaded: LoadedModel, windows_BP: Tensor, progress: Progress, settings: CalibrationReportSettings
) -> pd.DataFrame:
    n_windows = min(len(windows_BP), -(-settings.read_tokens // windows_BP.shape[1]))
    if not n_windows:
        return pd.DataFrame(columns=list(COLUMNS))
    blocks = loaded.anatomy.blocks
    chosen = sorted(
        set(np.linspace(0, len(blocks) - 1, min(settings.layers, len(blocks))).round().astype(int))
    )
    read_BP = windows_BP[:n_windows]
    return input_ranks(loaded, read_BP, [blocks[i] for i in chosen], progress, all_tokens=windows_BP.numel())


def _experts(
    loaded: LoadedModel, documents: Documents, progress: Progress, settings: CalibrationReportSettings
) -> pd.DataFrame | None:
    if not loaded.anatomy.n_experts or not settings.read_tokens:
        return None
    counts = aggregate(loaded, documents, progress, max_tokens=settings.read_tokens)
    tokens = np.array([counts.n_tokens])
    return coverage(counts.load_LE[None], tokens, [documents.name], counts.layers, WANTED)


_VIEWS = (
    View("table", x="verdict", text="check", title="What to look at", tooltip=("found", "meaning")),
    View("bar", x="kind", y="share", frame="kinds", title="Nearest kind of text", unit="share", tooltip=("tokens",)),
    View(
        "table", x="layer", text="input", frame="ranks", title="Directions that the text fills",
        tooltip=("columns", "tokens", "rank", "condition", "verdict"),
    ),
    View(
        "heatmap", x="expert", y="layer", color="tokens", frame="experts", title="Tokens of every expert", log=True,
        unit="tokens", tooltip=("verdict", "needs_more"),
    ),
    View(
        "table", x="document", text="beginning", frame="documents", title="Documents",
        tooltip=("tokens", "bytes_per_token", "kind", "repeats_document", "similarity"),
    ),
)  # fmt: skip
