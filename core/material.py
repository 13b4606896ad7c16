"""What an evaluation measures on, from how the user named it: text, pictures, labelled texts or scored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.corpus.sources import AskedKind
from core.errors import BadInput
from core.registry import Method

if TYPE_CHECKING:
    from core.corpus.rows import Rows
    from core.images.labelled import LabelledImages
    from core.models.learned import Learned
    from core.types import Documents

DEFAULT = "pydoc"
ROWS: dict[str, AskedKind] = {"text_classification": "labelled", "sentence_similarity": "pairs"}
"""Evaluations that read rows of the user's, and of which kind."""


def material_of(
    evaluation: Method, source: str, settings: Any, *, learned: Sequence[Learned]
) -> Documents | LabelledImages | Rows:
    """What ``source`` names, as this evaluation reads it; raises ``BadInput`` where it is nothing of that kind, or was
    learned from.

    The default is embedded text or digits; an evaluation of rows takes what the model last ``learned`` from, of which
    the held-out rows are measured on.
    """
    from core.corpus.learned import refuse_learned
    from core.corpus.sources import open_rows
    from core.images.labelled import load_images
    from core.text.documents import load_documents

    if evaluation.id in ROWS:
        kind = ROWS[evaluation.id]
        if source != DEFAULT:
            return open_rows(source, kind=kind)
        if not learned:
            raise BadInput(
                f"{evaluation.id} measures on {kind} rows, and none were named: give a .csv, .tsv, .jsonl or .parquet file "
                "as documents"
            )
        return open_rows(learned[-1].source, kind=kind)
    if "vision" in evaluation.needs:
        return load_images("digits" if source == DEFAULT else source, limit=settings.max_images)
    documents = load_documents(source, split="evaluation")
    refuse_learned(documents, learned)
    return documents
