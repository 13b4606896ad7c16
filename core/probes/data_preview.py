"""Data preview: what the rows of a training are, before hours are spent on them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from core.corpus.preview import preview
from core.probes._provenance import provenance
from core.registry import Example, Settings, method
from core.text.documents import load_documents
from core.types import Cost, Progress, Prompt, Result

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

_PROMPT = Prompt("(the rows are read; the prompt is not)")


class DataPreviewSettings(Settings):
    """The rows, and how a training would read them."""

    data: str = Field(
        default="pydoc",
        min_length=1,
        max_length=1000,
        description="Rows to learn from: pydoc, stdlib, builtin:NAME, a .txt, .csv, .tsv, .jsonl or .parquet file, a "
        "folder of texts, or hub:ID[:split]",
    )
    window: int = Field(default=256, ge=8, le=8192, description="Tokens of a row in training")
    held_out: float = Field(
        default=0.1, gt=0, le=0.5, description="Share of the rows that is never learned from"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the split")
    against: str = Field(
        default="pydoc",
        max_length=1000,
        description="What quality will be measured on: rows that it shares with the data are named; empty: nothing",
    )

    @property
    def reads_prompt(self) -> bool:
        """The rows are named here."""
        return False


@method(
    "probe",
    title="Data preview",
    needs=["text"],
    answers="What did compression break?",
    examples=(Example("Python's reference prose", _PROMPT),),
    cost=lambda anatomy, n_tokens, settings: Cost(0),
)
def run(loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: DataPreviewSettings) -> Result:
    """Count a training's rows: tokens and their lengths, duplicates, labels, and what evaluation would be given away.

    The model is not run; its tokenizer is. What training would refuse is said in the words it would use: an empty or
    single class, texts over the window, rows that evaluation measures on. Of a large source a sample is tokenized.
    """
    started = time.perf_counter()
    progress(0.0, 1.0, f"reading {settings.data}")
    against = load_documents(settings.against, split="evaluation") if settings.against.strip() else None
    found = preview(
        settings.data, loaded.tokenizer, window=settings.window, held_out=settings.held_out, seed=settings.seed,
        against=against,
    )  # fmt: skip
    origin = provenance(
        loaded, prompt, method="data_preview", settings=settings, started=started, conditions={},
        exactness_gap=None, exactness_check="",
    )  # fmt: skip
    return replace(found, provenance=replace(origin, inputs=found.provenance.inputs))
