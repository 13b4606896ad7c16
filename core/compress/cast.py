"""Cast: hold and store every parameter in 16 bits."""

from __future__ import annotations

import time
from typing import Literal, get_args

from pydantic import Field

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.sizes import Component
from core.models.targets import Target, targets
from core.registry import Settings, method
from core.saving.report import VIEWS, Error, headline, row, table
from core.types import Documents, Progress, Provenance, Result


class CastSettings(Settings):
    """What to cast to."""

    dtype: Literal["bfloat16", "float16"] = Field(
        default="bfloat16",
        description="16-bit float: bfloat16 keeps float32's range with 8 significant bits, float16 has 11 but ends at 65504",
    )

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """Component → bits per value in the file."""
        return dict.fromkeys(get_args(Component), 16.0)


@method("compress", title="Cast to 16 bits")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: CastSettings
) -> Result:
    """Round every parameter to bfloat16 or float16: half of float32's bytes, at almost no loss.

    Each value goes to the nearest representable one, ties to even. It is the baseline every other compression has
    to beat, and on many processors also the fastest. As first step of a recipe it sets the dtype of whatever a
    later step leaves unquantized.
    """
    started = time.monotonic()
    if loaded.packed:
        raise CannotCompress(
            "cast comes after a quantizing step, whose result is already stored; put cast first: "
            "it then sets the dtype of what stays unquantized"
        )
    dtype = getattr(torch, settings.dtype)
    todo = targets(loaded)
    parameters = dict(loaded.model.named_parameters())
    if settings.dtype == "float16":
        _refuse_overflow(todo, parameters)
    rows = []
    for done, target in enumerate(todo):
        progress(done, len(todo), f"casting {target.module}")
        parameter = parameters[target.name]
        before = parameter.data
        # Buffers such as rotary frequencies are computed in float32 at load: only parameters are cast.
        parameter.data = before.to(dtype)
        rows.append(
            row(
                target, parameter, format_=settings.dtype, bits=16, group_size="none", bytes_before=before.nbytes,
                bytes_after=parameter.nbytes, error=Error.between(before, parameter.data),
                touched=before.dtype != dtype, reason="" if before.dtype != dtype else f"already {settings.dtype}",
            )
        )  # fmt: skip
    loaded.model.config.dtype = dtype
    frame = table(rows)
    return Result(
        {"main": frame},
        VIEWS,
        headline(frame),
        Provenance(
            "cast", settings.model_dump(), loaded.fingerprint, dtype=settings.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
    )  # fmt: skip


def _refuse_overflow(todo: list[Target], parameters: dict[str, torch.nn.Parameter]) -> None:
    limit = torch.finfo(torch.float16).max
    for target in todo:
        largest = float(parameters[target.name].abs().max())
        if largest > limit:
            raise CannotCompress(
                f"float16 ends at {limit:.0f} but {target.module} holds {largest:.6g}; choose dtype=bfloat16"
            )
