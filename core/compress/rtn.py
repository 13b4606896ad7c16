"""Round to nearest: weights on integer grids, without data, without search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from core.compress._report import VIEWS, Error, headline, row, table, untouched_note
from core.compress._targets import Target, targets
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.packed import PackedTensor, narrow
from core.numerics.schemes import FloatScheme, GroupSize, IntegerScheme, Scheme
from core.numerics.sizes import DTYPE_NAMES, weight_bytes
from core.registry import Settings, method
from core.types import Documents, Progress, Provenance, Result

TableBits = Literal[2, 3, 4, 8, 16]


class RtnSettings(Settings):
    """Which grid, and how the two big tables are kept."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits per code of every linear layer and expert")
    group_size: GroupSize = Field(
        default="32",
        description="Consecutive weights of a row that share a scale; channel: the whole row. Small models want 32",
    )
    scheme: Literal["affine", "symmetric"] = Field(
        default="affine",
        description="affine: scale and zero point, the grid spans min to max; symmetric: scale only",
    )
    embedding_bits: TableBits = Field(
        default=8,
        description="Bits per value of the token embedding: same as bits for its grid, 8 for float8 (e4m3) on any other "
        "grid, 16 for bfloat16",
    )
    head_bits: Literal["embedding", 2, 3, 4, 8, 16] = Field(
        default="embedding",
        description="Bits per value of the unembedding, likewise; embedding: as the embedding. A tied head is the embedding",
    )

    @field_validator("group_size", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @property
    def grid(self) -> IntegerScheme:
        """The grid of the linear layers."""
        group = None if self.group_size == "channel" else int(self.group_size)
        return IntegerScheme(self.bits, group, self.scheme == "symmetric")


@method("compress", title="Round to nearest", paper="https://arxiv.org/abs/2210.17323")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: RtnSettings
) -> Result:
    """Put every weight on the nearest point of an integer grid: no data, seconds of work.

    Each group of a row gets one scale (and, affine, a zero point): Ŵ = (round(W / s + z) - z) · s, so that a weight
    moves by about s / 2 at most (``core.numerics.integer`` has the exact bounds). It is near lossless at 8 bits and the baseline that data-aware methods must beat at 4
    and below. Norms, biases, routers and position embeddings stay as they are.
    """
    started = time.monotonic()
    if loaded.packed:
        raise CannotCompress(
            "this model was quantized by an earlier step; keep one quantizing step in the recipe"
        )
    todo = targets(loaded)
    schemes = assign(loaded, todo, settings)
    parameters = dict(loaded.model.named_parameters())
    rows = []
    for done, target in enumerate(todo):
        progress(done, len(todo), f"rounding {target.module}")
        rows.append(_apply(loaded, target, parameters[target.name], schemes.get(target.name)))
    frame = table(rows)
    notes = [untouched_note(frame), _conv1d_note(todo), _experts_note(todo, settings), _table_note(schemes)]
    return Result(
        {"main": frame},
        VIEWS,
        headline(frame),
        Provenance(
            "rtn", settings.model_dump(), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


def assign(loaded: LoadedModel, todo: Sequence[Target], settings: RtnSettings) -> dict[str, Scheme]:
    """The scheme of every parameter that gets one, by name; raises ``CannotCompress`` where one does not apply."""
    parameters = dict(loaded.model.named_parameters())
    anatomy = loaded.anatomy
    head_bits = settings.embedding_bits if settings.head_bits == "embedding" else settings.head_bits
    if anatomy.tied and head_bits != settings.embedding_bits:
        raise CannotCompress(
            f"head_bits={head_bits} but embedding_bits={settings.embedding_bits}, and this model's head is its "
            "embedding (tied): one tensor has one format; set head_bits=embedding"
        )
    schemes: dict[str, Scheme] = {}
    for target in todo:
        if target.layout == "none":
            continue
        if target.module == anatomy.embedding:
            schemes[target.name] = _table_scheme(settings.embedding_bits, "embedding_bits", settings)
        elif target.module == anatomy.unembedding:
            schemes[target.name] = _table_scheme(head_bits, "head_bits", settings)
        elif target.layout == "experts":
            # transformers reads experts without zero points (CompressedTensorsDequantize).
            schemes[target.name] = IntegerScheme(settings.bits, settings.grid.group_size, True)
        elif target.layout != "embedding":
            schemes[target.name] = settings.grid
    if not schemes:
        raise CannotCompress(
            f"{anatomy.architecture} has no linear layer, expert or embedding that rtn could round; use cast"
        )
    _refuse_indivisible(todo, schemes, {name: p.shape[-1] for name, p in parameters.items()})
    return schemes


def _table_scheme(bits: int, name: str, settings: RtnSettings) -> Scheme:
    """The format of embedding or head. The file format holds one grid for all dense weights, hence float8."""
    if bits == settings.bits:
        return settings.grid
    if bits == 8:
        return FloatScheme("float8_e4m3fn")
    if bits == 16:
        return FloatScheme("bfloat16")
    raise CannotCompress(
        f"{name}={bits} with bits={settings.bits}: transformers reads one integer grid per model; "
        f"choose {name}={settings.bits} (the same grid), 8 (float8) or 16 (bfloat16)"
    )


def _refuse_indivisible(todo: Sequence[Target], schemes: dict[str, Scheme], columns: dict[str, int]) -> None:
    grids = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, IntegerScheme)}
    for target in todo:
        scheme = grids.get(target.name)
        if scheme is None or scheme.group_size is None or columns[target.name] % scheme.group_size == 0:
            continue
        fitting = [str(g) for g in (32, 64, 128) if all(columns[name] % g == 0 for name in grids)]
        choices = ", ".join(fitting) + " or channel" if fitting else "channel"
        raise CannotCompress(
            f"group_size {scheme.group_size} does not divide in_features {columns[target.name]} of {target.module}; "
            f"choose {choices}"
        )


def _apply(
    loaded: LoadedModel, target: Target, parameter: torch.nn.Parameter, scheme: Scheme | None
) -> dict[str, object]:
    """Round one parameter in place and record its packed form; its line of the report."""
    before = parameter.data
    if scheme is None:
        return row(
            target, parameter, format_=loaded.dtype, bits=8 * before.element_size(), group_size="none",
            bytes_before=before.nbytes, bytes_after=before.nbytes, error=Error(0.0, None), touched=False,
            reason=target.reason,
        )  # fmt: skip
    packed = _rounded(target, before, scheme)
    loaded.packed[target.module] = packed
    parameter.data = packed.dequantize().to(before.dtype)
    scale_dtype = (
        "F16" if packed.scale is None else DTYPE_NAMES[str(packed.scale.dtype).removeprefix("torch.")]
    )
    group = getattr(scheme, "group_size", 0)
    return row(
        target, parameter, format_=scheme.label, bits=scheme.bits,
        group_size="none" if isinstance(scheme, FloatScheme) else "channel" if group is None else str(group),
        bytes_before=before.nbytes, bytes_after=weight_bytes(before.shape, scheme, scale_dtype=scale_dtype),
        error=Error.between(before, parameter.data), touched=True, reason="",
    )  # fmt: skip


def _rounded(target: Target, weight: torch.Tensor, scheme: Scheme) -> PackedTensor:
    if isinstance(scheme, IntegerScheme):
        # An expert is read back in its scale's dtype, so that must be the model's own.
        packed = quantize(weight, scheme, scale_dtype=weight.dtype if target.layout == "experts" else None)
        assert packed.scale is not None
        _refuse_not_finite(target, packed.scale)
        return packed
    largest, limit = weight.abs().max(), torch.finfo(getattr(torch, scheme.dtype)).max
    _refuse_not_finite(target, largest)
    if largest > limit:
        raise CannotCompress(
            f"{scheme.dtype} ends at {limit:.0f} but {target.module} holds {float(largest):.6g}; choose 16 bits for it"
        )
    return narrow(weight, scheme)


def _refuse_not_finite(target: Target, numbers: torch.Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise CannotCompress(
            f"{target.module} holds NaN or infinite weights; repair the model before quantizing it"
        )


def _conv1d_note(todo: Sequence[Target]) -> str:
    if not any(target.layout == "conv1d" for target in todo):
        return ""
    return (
        "This model's linear layers are Conv1D, stored [in, out]: groups and channels run along the outputs of one "
        "input, not along the inputs of one output."
    )


def _experts_note(todo: Sequence[Target], settings: RtnSettings) -> str:
    if settings.scheme == "symmetric" or not any(target.layout == "experts" for target in todo):
        return ""
    return "Experts are on a symmetric grid: transformers reads packed experts without zero points."


def _table_note(schemes: dict[str, Scheme]) -> str:
    if not any(scheme == FloatScheme("float8_e4m3fn") for scheme in schemes.values()):
        return ""
    return (
        "The 8-bit embedding or head is float8 (e4m3) without scales, because transformers reads one integer grid per "
        "model: about 31 dB signal to noise. With bits=8 it is int8; 16 keeps it almost exact."
    )
