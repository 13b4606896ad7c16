"""The GGUF file that llama.cpp's runtimes open, made of an artifact by our own export."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from core.profile.runtimes._base import ProfileSettings
from core.types import ModelRef, Progress, part_of

BUILT_FROM = ("weights", "embedding")


class GgufProfileSettings(ProfileSettings):
    """What a GGUF file is made with."""

    weights: Literal["stored", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "q8_0",
        description="Type of every matrix in the GGUF file; stored: float32, the artifact's own numbers. Groups of 32 "
        "weights share a scale (_1: and a minimum), so q4_1 keeps a 4-bit grid of such groups",
    )
    embedding: Literal["same", "f16", "q8_0"] = Field(
        "q8_0", description="Type of the token table and the head; same: as the matrices"
    )


def build(folder: Path, target: Path, progress: Progress, settings: GgufProfileSettings) -> Mapping[str, Any]:
    """Write ``target/model.gguf``. Raises ``CannotExport`` where the architecture has no exact mapping."""
    import gguf

    from core.export.gguf import FILE, GgufSettings, run
    from core.models.open import open_model

    loaded = open_model(ModelRef(str(folder)), progress=part_of(progress, 0.0, 0.2))
    kind = "F32" if settings.weights == "stored" else settings.weights.upper()
    table = "same" if settings.weights == "stored" else settings.embedding
    export = GgufSettings.model_validate(
        {"type": kind, "embedding_type": table if table == "same" else table.upper()}
    )
    result = run(loaded, target, part_of(progress, 0.2, 1.0), export)
    tensors = gguf.GGUFReader(target / FILE).tensors
    kinds = sorted({tensor.tensor_type.name for tensor in tensors})
    return {
        "converter": f"gguf {version('gguf')}",
        "file_bytes": (target / FILE).stat().st_size,
        "weight_bytes": {
            name: sum(int(tensor.n_bytes) for tensor in tensors if tensor.tensor_type.name == name)
            for name in kinds
        },
        "read_back": {metric.name: metric.value for metric in result.metrics},
    }
