"""What the steps that store weights as narrow floats share: fp8, mxfp and nvfp4 differ in their number format only.

All dense weights of such a file have one format (see ``core.saving.description``); embedding and head may instead be plain floats.
Experts are read by other code of transformers, which takes less: what it does not take is refused here by name.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from core.errors import CannotCompress
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.numerics.schemes import FloatScheme, MxScheme, Scheme
from core.quantize.grid import MATRICES, Formats, bits_per_value, lay_out, put_nearest, refuse_packed
from core.registry import Settings
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Progress, Provenance, Result

TableFormat = Literal["same", "float8", "bfloat16"]
PLAIN: dict[str, Scheme] = {"float8": FloatScheme("float8_e4m3fn"), "bfloat16": FloatScheme("bfloat16")}


class FormatSettings(Settings):
    """How the two big tables are kept; what the format is, its steps say in ``format``."""

    embedding: TableFormat = Field(
        default="float8",
        description="Token embedding: same as the matrices, float8 (e4m3 without scales), or bfloat16",
    )
    head: Literal["embedding", "same", "float8", "bfloat16"] = Field(
        default="embedding",
        description="Unembedding, likewise; embedding: as the embedding. A tied head is the embedding",
    )

    @property
    def format(self) -> Scheme:
        """The number format of the matrices."""
        raise NotImplementedError

    @property
    def experts_format(self) -> Scheme:
        """The number format of experts: the matrices', where it has one scale a row at least."""
        return self.format

    @property
    def formats(self) -> Formats:
        """The format of every part."""
        embedding = PLAIN.get(self.embedding, self.format)
        head = embedding if self.head == "embedding" else PLAIN.get(self.head, self.format)
        return Formats(self.format, self.experts_format, embedding, head)

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """Component → bits per value in the file, scales included; what is not named stays as it is."""
        parts = self.formats
        found: dict[str, Scheme] = dict.fromkeys(MATRICES, parts.matrices)
        found |= {"experts": parts.experts, "embedding": parts.embedding, "head": parts.head}
        return {part: bits_per_value(scheme, anatomy.d_model) for part, scheme in found.items()}


def store_as(
    loaded: LoadedModel,
    progress: Progress,
    settings: FormatSettings,
    *,
    method: str,
    notes: tuple[str, ...] = (),
) -> Result:
    """Round every matrix to nearest in the settings' format; the step's result."""
    started = time.monotonic()
    schemes, todo = assigned(loaded, settings), targets(loaded)
    rows = []
    for done, target in enumerate(todo):
        progress(done, len(todo), f"rounding {target.module}")
        rows.append(put_nearest(loaded, target, schemes.get(target.name)))
    frame = table(rows)
    said = (untouched_note(frame), *notes)
    return Result(
        {"main": frame},
        VIEWS,
        headline(frame),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in said if note),
    )  # fmt: skip


def assigned(loaded: LoadedModel, settings: FormatSettings) -> dict[str, Scheme]:
    """The scheme of every parameter that gets one; raises ``CannotCompress`` with nothing changed."""
    refuse_packed(loaded)
    parts = settings.formats
    if loaded.anatomy.tied and parts.head != parts.embedding:
        raise CannotCompress(
            f"head={settings.head} but embedding={settings.embedding}, and this model's head is its embedding (tied): "
            "one tensor has one format; set head=embedding"
        )
    if loaded.anatomy.n_experts:
        _refuse_experts(loaded, parts.experts)
    return lay_out(loaded, parts)


def _refuse_experts(loaded: LoadedModel, scheme: Scheme) -> None:
    """Formats that transformers' converter of experts does not read, or gives back in another dtype."""
    if isinstance(scheme, FloatScheme):
        return
    if isinstance(scheme, MxScheme) and scheme.bits < 8:
        if loaded.dtype == "bfloat16":
            return
        raise CannotCompress(
            f"transformers gives {scheme.label} experts back in bfloat16, and this model is held in {loaded.dtype}; put "
            "cast to bfloat16 first"
        )
    raise CannotCompress(
        f"transformers does not read {scheme.label} experts; choose fp8, rtn, or mxfp with 4 or 6 bits after cast"
    )
