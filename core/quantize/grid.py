"""Settings and bookkeeping shared by every step that puts weights on integer grids: which grid each tensor gets, what
is refused before anything changes, and how one packed weight enters the model.

How codes are found is each method's own; how they are stored is ``core.saving.layout``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.sizes import Component
from core.models.targets import Target, targets
from core.numerics import integer
from core.numerics.packed import PackedExperts, PackedTensor
from core.numerics.quantize import quantize
from core.numerics.schemes import FloatScheme, GroupSize, IntegerScheme, Scheme
from core.numerics.sizes import scheme_bits
from core.registry import Settings
from core.saving.report import Error, row

if TYPE_CHECKING:
    from torch import Tensor

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
TableBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
MATRICES: tuple[Component, ...] = ("attention", "mlp", "experts", "shared_expert")
SCALE_BITS = 16
EXPERT_SCALE_BITS = 32
"""An expert's scales are in the model's own dtype (see ``scale_dtype``): float32 unless a step before cast it."""


class GridSettings(Settings):
    """Which grid, and how the two big tables are kept."""

    bits: Bits = Field(default=4, description="Bits per code of every linear layer and expert")
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
    head_bits: Literal["embedding", 2, 3, 4, 5, 6, 7, 8, 16] = Field(
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

    @property
    def table_bits(self) -> tuple[int, int]:
        """Bits of the embedding and of the head."""
        return self.embedding_bits, self.embedding_bits if self.head_bits == "embedding" else self.head_bits

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """Component → bits per value in the file, scales and zero points included; what is not named stays as it is.

        A channel is taken to be d_model long.
        """
        embedding, head = self.table_bits
        symmetric = IntegerScheme(self.bits, self.grid.group_size, symmetric=True)
        matrices: dict[str, float] = {c: bits_per_value(self.grid, anatomy.d_model) for c in MATRICES}
        tables = {
            "embedding": bits_per_value(_table_scheme(embedding, "embedding_bits", self), anatomy.d_model),
            "head": bits_per_value(_table_scheme(head, "head_bits", self), anatomy.d_model),
        }
        experts = bits_per_value(symmetric, anatomy.d_model, scale_bits=EXPERT_SCALE_BITS)
        return {**matrices, "experts": experts, **tables}


def bits_per_value(scheme: Scheme, columns: int, *, scale_bits: int = SCALE_BITS) -> float:
    """A code and its share of a scale and of the zero point, in rows of ``columns`` values."""
    if not isinstance(scheme, IntegerScheme):
        return scheme_bits((columns, columns), scheme)
    zero_point = 0 if scheme.symmetric else scheme.bits
    return scheme.bits + (scale_bits + zero_point) / (scheme.group_size or columns)


@dataclass(frozen=True)
class Formats:
    """What each part of a model is stored as."""

    matrices: Scheme
    experts: Scheme
    embedding: Scheme
    head: Scheme


def assign(loaded: LoadedModel, settings: GridSettings) -> dict[str, Scheme]:
    """The scheme of every parameter that gets one, by name; raises ``CannotCompress`` where one does not apply."""
    refuse_packed(loaded)
    embedding_bits, head_bits = settings.table_bits
    if loaded.anatomy.tied and head_bits != embedding_bits:
        raise CannotCompress(
            f"head_bits={head_bits} but embedding_bits={embedding_bits}, and this model's head is its "
            "embedding (tied): one tensor has one format; set head_bits=embedding"
        )
    # transformers reads experts without zero points (CompressedTensorsDequantize).
    experts = IntegerScheme(settings.bits, settings.grid.group_size, symmetric=True)
    embedding = _table_scheme(embedding_bits, "embedding_bits", settings)
    head = _table_scheme(head_bits, "head_bits", settings)
    return lay_out(loaded, Formats(settings.grid, experts, embedding, head))


def lay_out(loaded: LoadedModel, formats: Formats) -> dict[str, Scheme]:
    """The same from formats; raises ``CannotCompress`` where no parameter takes one, or a row does not divide."""
    anatomy = loaded.anatomy
    schemes: dict[str, Scheme] = {}
    for target in targets(loaded):
        if target.layout == "none":
            continue
        if target.module == anatomy.embedding:
            schemes[target.name] = formats.embedding
        elif target.module == anatomy.unembedding:
            schemes[target.name] = formats.head
        elif target.layout == "experts":
            schemes[target.name] = formats.experts
        elif target.layout != "embedding":
            schemes[target.name] = formats.matrices
    if not schemes:
        raise CannotCompress(
            f"{anatomy.architecture} has no linear layer, expert or embedding that could be quantized; use cast"
        )
    refuse_indivisible(loaded, schemes)
    return schemes


def refuse_packed(loaded: LoadedModel) -> None:
    """Raise ``CannotCompress`` when an earlier step quantized this model."""
    if loaded.packed:
        raise CannotCompress(
            "this model was quantized by an earlier step; keep one quantizing step in the recipe"
        )


def refuse_indivisible(loaded: LoadedModel, schemes: Mapping[str, Scheme]) -> None:
    """Raise ``CannotCompress`` naming the first matrix whose rows its groups do not divide, and what would."""
    groups = {name: group for name, scheme in schemes.items() if (group := _shared_by(scheme)) is not None}
    columns = {name: int(loaded.model.get_parameter(name).shape[-1]) for name in groups}
    for name, group in groups.items():
        if columns[name] % group == 0:
            continue
        if not isinstance(schemes[name], IntegerScheme):
            raise CannotCompress(
                f"{schemes[name].label} has blocks of {group}, which do not divide in_features {columns[name]} of "
                f"{name.removesuffix('.weight')}; choose rtn with group_size channel, or fp8"
            )
        fitting = [str(g) for g in (32, 64, 128) if all(n % g == 0 for n in columns.values())]
        choices = ", ".join(fitting) + " or channel" if fitting else "channel"
        raise CannotCompress(
            f"group_size {group} does not divide in_features {columns[name]} of "
            f"{name.removesuffix('.weight')}; choose {choices}"
        )


def _shared_by(scheme: Scheme) -> int | None:
    """Consecutive values of a row that share a scale; None where nothing must divide the row."""
    group: int | None = getattr(scheme, "group_size", getattr(scheme, "block", None))
    return group


def scale_dtype(target: Target, weight: Tensor) -> torch.dtype | None:
    """What this weight's scales must be stored in; None where ``core.numerics.integer.storable_dtype`` may choose."""
    # An expert is read back in its scale's dtype, so that must be the model's own.
    return weight.dtype if target.layout == "experts" else None


def rounded(target: Target, weight: Tensor, scheme: Scheme) -> PackedTensor:
    """A weight rounded to nearest under its scheme; raises ``CannotCompress`` where it is not finite or overflows."""
    if isinstance(scheme, IntegerScheme):
        packed = integer.quantize(weight, scheme, scale_dtype=scale_dtype(target, weight))
        assert packed.scale is not None
        _refuse_not_finite(target, packed.scale)
        return packed
    largest = weight.abs().max()
    _refuse_not_finite(target, largest)
    if isinstance(scheme, FloatScheme) and scheme.scale == "none":
        limit = torch.finfo(getattr(torch, scheme.dtype)).max
        if largest > limit:
            raise CannotCompress(
                f"{scheme.dtype} ends at {limit:.0f} but {target.module} holds {float(largest):.6g}; choose 16 bits for it"
            )
    found = quantize(weight, scheme)
    assert isinstance(found, PackedTensor), f"no file that plain transformers reads holds {scheme.label}"
    return found


def put(
    loaded: LoadedModel, target: Target, packed: PackedTensor | PackedExperts | None, before: Tensor
) -> dict[str, Any]:
    """Give one parameter the values its packed form reloads to, and record that form; its line of the report.

    ``before`` is the tensor as the step found it: errors and bytes are against it. None for ``packed`` leaves the
    parameter's values as they are now, changed by the step or not.
    """
    parameter = loaded.model.get_parameter(target.name)
    if packed is not None:
        loaded.packed[target.module] = packed
        parameter.data = packed.dequantize().to(parameter.dtype)
    after = parameter.data
    touched = packed is not None or not torch.equal(after, before)
    format_, bits, group, nbytes = _said(packed) or (
        str(after.dtype).removeprefix("torch."), 8.0 * after.element_size(), "none", after.nbytes,
    )  # fmt: skip
    return row(
        target, parameter, format_=format_, bits=bits, group_size=group, bytes_before=before.nbytes,
        bytes_after=nbytes, error=Error.between(before, after) if touched else Error(0.0, None), touched=touched,
        reason="" if touched else target.reason,
    )  # fmt: skip


def put_nearest(loaded: LoadedModel, target: Target, scheme: Scheme | None) -> dict[str, Any]:
    """``put`` a parameter rounded to nearest under its scheme, or as it is without one; its line of the report."""
    before = loaded.model.get_parameter(target.name).data
    return put(loaded, target, None if scheme is None else rounded(target, before, scheme), before)


def _said(packed: PackedTensor | PackedExperts | None) -> tuple[str, float, str, int] | None:
    """Format, bits per value, group size and stored bytes of a packed weight."""
    if packed is None:
        return None
    nbytes = packed.stored_bytes
    if isinstance(packed, PackedExperts):
        label = " / ".join(choice.scheme.label for choice in packed.choices)
        return label, 8 * nbytes / packed.choices[0].codes.numel(), "by expert", nbytes
    scheme = packed.scheme
    if isinstance(scheme, FloatScheme):
        return scheme.label, scheme.bits, scheme.scale, nbytes
    return scheme.label, scheme.bits, str(_shared_by(scheme) or "channel"), nbytes


def grid_notes(todo: Sequence[Target], schemes: Iterable[Scheme], *, symmetric: bool) -> tuple[str, ...]:
    """What a reader must know of the grids that were used: Conv1D's direction, experts without zero points, float8."""
    layouts = {target.layout for target in todo}
    notes = []
    if "conv1d" in layouts:
        notes.append(
            "This model's linear layers are Conv1D, stored [in, out]: groups and channels run along the outputs of one "
            "input, not along the inputs of one output."
        )
    if "experts" in layouts and not symmetric:
        notes.append(
            "Experts are on a symmetric grid: transformers reads packed experts without zero points."
        )
    if FloatScheme("float8_e4m3fn") in set(schemes):
        notes.append(
            "The 8-bit embedding or head is float8 (e4m3) without scales, because transformers reads one integer grid per "
            "model: about 31 dB signal to noise. With bits=8 it is int8; 16 keeps it almost exact."
        )
    return tuple(notes)


def _table_scheme(bits: int, name: str, settings: GridSettings) -> Scheme:
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


def _refuse_not_finite(target: Target, numbers: Tensor) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise CannotCompress(
            f"{target.module} holds NaN or infinite weights; repair the model before quantizing it"
        )
