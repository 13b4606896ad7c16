"""What the three steps that put zeros into matrices share: their settings, the model's matrices, and an honest report.

How the zeros are chosen is each method's own.

Nothing that is installed stores such zeros smaller so that plain ``AutoModel`` could read it: compressed-tensors 0.20
has no sparse compressor any more (``sparse-bitmask`` and ``sparse-24-bitmask`` are names in its config only, and its
model compressor writes an empty ``sparsity_config``); torchao 0.18 makes 2:4 tensors in memory, but none of the tensor
classes that it writes to safetensors is sparse. So files keep their size, and what is told beside it is what a zip of
them would weigh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field, field_validator

from core.calibrate.matrices import Matrix, matrices
from core.errors import CannotCompress
from core.models.anatomy import Anatomy, Block
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.quantize.grid import put
from core.registry import Settings
from core.reshape.sparsity import Pattern, Sparsity
from core.reshape.zipped import zipped_bytes
from core.saving.report import headline, place, table, untouched_note
from core.types import Metric, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

WHOLE: Mapping[str, float] = {}
"""Share of each component that masks leave: all of it, for the file keeps its zeros."""
VIEWS = (
    View(
        "heatmap", x="layer", y="projection", color="zero_share", frame="matrices", title="Share of zeros",
        tooltip=("module", "expert", "zeros", "values"),
    ),
    View(
        "table", x="module", text="format", title="Every tensor",
        tooltip=("parameters_touched", "relative_error", "bytes_after", "reason"),
    ),
)  # fmt: skip
ERROR_VIEW = View(
    "heatmap", x="layer", y="projection", color="output_error", frame="matrices",
    title="Change of the matrix's output on calibration text, relative", tooltip=("module", "expert", "zero_share"),
)  # fmt: skip


class MaskSettings(Settings):
    """How many weights become zero, and in which pattern."""

    share: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of every matrix that becomes zero; a pattern N:M says its own",
    )
    pattern: Pattern = Field(
        default="unstructured",
        description="unstructured: anywhere; 2:4 and 4:8: so many zeros in every 4 or 8 neighbouring inputs",
    )
    format: Literal["dense"] = Field(
        default="dense",
        description="How zeros are stored: dense, as large as before. Nothing sparse would reload",
    )

    @field_validator("format", mode="before")
    @classmethod
    def _refuse_sparse(cls, value: object) -> object:
        if value == "sparse":
            raise ValueError(
                "no sparse file format is read by plain transformers today (compressed-tensors dropped its own); keep "
                "dense, put a quantizing step behind the mask, or cut whole parts (prune_width, drop_layers)"
            )
        return value

    @property
    def sparsity(self) -> Sparsity:
        """Pattern and share."""
        return Sparsity.of(self.pattern, self.share)


class CalibratedMaskSettings(MaskSettings):
    """The same, and the text that weights are judged on."""

    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice of windows")


def whole(anatomy: Anatomy, settings: Any) -> Mapping[str, float]:
    """What a mask leaves of the bytes: everything."""
    return WHOLE


def check(loaded: LoadedModel, settings: MaskSettings) -> None:
    """Raise ``CannotCompress`` before anything is changed where the step does not apply."""
    loaded.refuse_if_packed()
    every = [matrix for block in loaded.anatomy.blocks for matrix in matrices(loaded, block)]
    if not every:
        raise CannotCompress(f"{loaded.anatomy.architecture} has no matrices that could be pruned")
    group = settings.sparsity.group
    odd = next((m for m in every if group is not None and m.shape[1] % group[1]), None)
    if odd is not None:
        raise CannotCompress(
            f"pattern {settings.pattern} needs inputs in whole groups of {settings.pattern.partition(':')[2]}, and "
            f"{odd.label} has {odd.shape[1]}; choose unstructured"
        )


@contextmanager
def recorded(loaded: LoadedModel, block: Block) -> Iterator[list[dict[str, Any]]]:
    """Edit a block inside; behind it, the list holds the block's lines of the table."""
    mine = [target for target in targets(loaded) if target.layer == block.index]
    before = {target.name: loaded.model.get_parameter(target.name).data.clone() for target in mine}
    rows: list[dict[str, Any]] = []
    yield rows
    rows += [_line(loaded, target, before[target.name]) for target in mine]


def matrix_line(matrix: Matrix, after_OI: Tensor, *, output_error: float | None = None) -> dict[str, Any]:
    """One matrix's zeros, as they will be stored."""
    zeros = int((after_OI == 0).sum())
    inside = place(Target(matrix.name, matrix.layer, matrix.component, matrix.layout))
    return {
        "module": inside["module"], "layer": matrix.layer, "projection": inside["projection"], "expert": matrix.expert,
        "values": after_OI.numel(), "zeros": zeros, "zero_share": zeros / after_OI.numel(), "output_error": output_error,
    }  # fmt: skip


def _line(loaded: LoadedModel, target: Target, before: Tensor) -> dict[str, Any]:
    line = put(loaded, target, None, before)
    changed = int((loaded.model.get_parameter(target.name).data != before).sum())
    return {**line, "parameters_touched": changed}


def masked_result(
    loaded: LoadedModel,
    settings: MaskSettings,
    *,
    method: str,
    blocks: Sequence[Mapping[str, Any]],
    zipped_before: Metric,
    seconds: float,
    notes: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Result:
    """The result of a mask step. ``blocks``: of each block ``rows`` (its table) and ``matrices`` (``matrix_line``)."""
    inside = [line for block in blocks for line in block["rows"]]
    outside = [t for t in targets(loaded) if t.layer is None]
    frame = table([*inside, *(_line(loaded, t, loaded.model.get_parameter(t.name).data) for t in outside)])
    zeros = pd.DataFrame([line for block in blocks for line in block["matrices"]])
    zeros = zeros.astype({"expert": "Int64", "output_error": "Float64"})
    has_error = zeros["output_error"].notna().any()
    zipped = zipped_bytes(loaded.model, "zipped_bytes")
    share = float(zeros["zeros"].sum() / zeros["values"].sum())
    metrics = [
        Metric("zero_share_of_matrices", share, "", "neither", n=int(zeros["values"].sum())),
        zipped_before,
        zipped,
    ]
    if has_error:
        mean = float(zeros["output_error"].astype(float).mean())
        metrics.append(Metric("output_error", mean, "", "lower", n=len(zeros)))
    return Result(
        {"main": frame, "matrices": zeros},
        (*([ERROR_VIEW] if has_error else []), *VIEWS),
        (*metrics, *headline(frame)),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint, inputs=inputs or {}, dtype=loaded.dtype,
            device=loaded.device, conditions=conditions or {}, seconds=seconds,
        ),
        tuple(note for note in (_size_note(share, zipped_before, zipped), *notes, untouched_note(frame)) if note),
    )  # fmt: skip


def _size_note(share: float, before: Metric, after: Metric) -> str:
    return (
        f"{share:.1%} of the matrices' values are zero, and the file is as large as before: no format that plain "
        f"transformers reads stores such zeros smaller, and nothing here computes with them faster. In a zip these weights "
        f"would take {after.value / 1e6:.1f} MB; without the mask {before.value / 1e6:.1f} MB. A quantizing step behind this "
        "one keeps the zeros."
    )


def unreached_note(n: int) -> str:
    """Of matrices whose experts no token was routed to."""
    return f"{n} matrices of experts that no calibration token reached were pruned by magnitude." if n else ""
