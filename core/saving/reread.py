"""The packed weights of an opened variant, read back from its file: ``layout``'s inverse.

Opening a variant gives dense weights. A step that goes on with what is stored (new scales for the same codes) needs the
codes themselves, exactly. So each weight that is built from them again must equal the one in memory, bit for bit, and
otherwise the model counts as dense: an earlier step has changed it, or another program stored it in a way not known here.
Knows every layout that ``layout`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.models.checkpoint import read_config, weight_files
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.narrow import unpack_codes
from core.numerics.packed import PackedExperts, PackedTensor
from core.numerics.packing import unpack
from core.numerics.schemes import (
    NARROW_BITS,
    FloatScheme,
    IntegerScheme,
    MxScheme,
    NarrowDtype,
    Nvfp4Scheme,
    Scheme,
)
from core.saving.description import MX_FORMATS
from core.saving.layout import on_disk

if TYPE_CHECKING:
    from torch import Tensor

    Packed = PackedTensor | PackedExperts

FLOAT8: tuple[NarrowDtype, ...] = ("float8_e4m3fn", "float8_e5m2")
NARROW: dict[str, NarrowDtype] = {f"torch.{dtype}": dtype for dtype in NARROW_BITS}
ELEMENTS = {format_: element for element, format_ in MX_FORMATS.items()}
ROW_BITS = 32
"""Of a tag that says which parameter and which of its rows a stored row is, the bits for the row."""


def reread(loaded: LoadedModel) -> dict[str, Packed]:
    """Module → packed weight, as ``LoadedModel.packed`` has them right after the step that packed them.

    Empty for a folder without packed weights, and where one of them does not give the weight in memory. The file does
    not say by which rule an MX block's power of two was chosen, nor that a 2-bit grid was ternary.
    """
    quantization = read_config(loaded.folder).get("quantization_config") or {}
    groups = list((quantization.get("config_groups") or {}).values())
    file = _File(loaded)
    lazy = bool(groups) and quantization.get("dequantize") is False
    found: dict[str, Packed] = {}
    of_parameter = _pieces(loaded)
    for target in targets(loaded):
        if target.layout == "none":
            continue
        scheme = _scheme(target, loaded, groups)
        pieces = [(rows, file.piece(name, scheme)) for name, rows in of_parameter[target.name]]
        if all(piece is None for _, piece in pieces):
            continue
        packed = _whole(loaded.model.get_parameter(target.name), pieces)
        if packed is not None and lazy and target.layout != "experts":
            packed = _multiplied_in(packed, loaded.model.get_parameter(target.name).dtype)
        if packed is None or not _same(packed, loaded.model.get_parameter(target.name)):
            return {}
        found[target.module] = packed
    return found


class _File:
    """The tensors of an opened model's files, and how a packed matrix is put together from them."""

    def __init__(self, loaded: LoadedModel) -> None:
        from safetensors import safe_open

        self.held: dict[str, Any] = {}
        for path in weight_files(loaded.folder):
            opened = safe_open(path, framework="pt")
            self.held |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]

    def piece(self, name: str, scheme: Scheme | None) -> PackedTensor | None:
        """The matrix that is stored under a name, which ends in ``.weight``; None for one that is not packed."""
        if f"{name}_packed" in self.held:
            return None if scheme is None else self._packed(name, scheme)
        if name not in self.held:
            return None
        codes = self._tensor(name)
        dtype = NARROW.get(str(codes.dtype))
        if dtype is None:
            return None
        if f"{name}_scale" not in self.held:
            return PackedTensor(codes, None, None, FloatScheme(dtype)) if dtype in FLOAT8 else None
        if dtype not in FLOAT8:  # an expert beside float8 ones
            return self._scaled(name, codes, FloatScheme(dtype))
        if not isinstance(scheme, FloatScheme | MxScheme):
            return None
        return self._scaled(name, codes, scheme)

    def _packed(self, name: str, scheme: Scheme) -> PackedTensor:
        stored = self._tensor(f"{name}_packed")
        match scheme:
            case IntegerScheme():
                rows, columns = (int(n) for n in self._tensor(f"{name}_shape"))
                codes = unpack(stored, scheme.bits, columns)
                zero = None
                if not scheme.symmetric:
                    zero = unpack(
                        self._tensor(f"{name}_zero_point").T.contiguous(), scheme.bits, rows
                    ).T.contiguous()
                packed = replace(self._scaled(name, codes, scheme), zero_point=zero)
                by_row = packed.scale is not None and packed.scale.shape[-1] == 1 and not scheme.whole
                return replace(packed, scheme=replace(scheme, group_size=None)) if by_row else packed
            case _:
                packed = self._scaled(name, unpack_codes(stored, scheme.bits), scheme)
                if not isinstance(scheme, Nvfp4Scheme):
                    return packed
                return replace(packed, global_scale=self._tensor(f"{name}_global_scale").reshape(1, 1))

    def _scaled(self, name: str, codes: Tensor, scheme: Scheme) -> PackedTensor:
        """With the scales beside it: one of a whole matrix is stored as a vector of one."""
        scale = self._tensor(f"{name}_scale")
        return PackedTensor(codes, scale.reshape(1, 1) if scale.ndim == 1 else scale, None, scheme)

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.held[name].get_tensor(name)
        return tensor


def _pieces(loaded: LoadedModel) -> dict[str, list[tuple[str, Tensor]]]:
    """Parameter → the names its parts have in the file, and which of its rows (leading axes flattened) each holds."""
    names, tags = [], {}
    for index, (name, parameter) in enumerate(loaded.model.named_parameters()):
        names.append(name)
        if parameter.ndim > 1:
            lead = parameter.shape[:-1]
            rows = torch.arange(lead.numel(), dtype=torch.int64).view(*lead, 1)
            tags[name] = rows + (index << ROW_BITS)
    found: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in names}
    for stored, tag in on_disk(loaded.model, tags).items():
        owners, rows = tag.flatten() >> ROW_BITS, tag.flatten() & ((1 << ROW_BITS) - 1)
        found[names[int(owners[0])]].append((stored, rows))
    return found


def _whole(
    parameter: Tensor, pieces: list[tuple[Tensor, PackedTensor | None]]
) -> PackedTensor | PackedExperts | None:
    """One parameter of its stored matrices; None where they are not all packed, or two of them overlap.

    Matrices stored in more than one form are experts, each in one of the forms.
    """
    kept = [(rows, piece) for rows, piece in pieces if piece is not None]
    kinds: dict[Any, list[tuple[Tensor, PackedTensor]]] = {}
    for rows, piece in kept:
        form = (piece.scheme, None if piece.scale is None else piece.scale.shape[-1], piece.codes.dtype)
        kinds.setdefault(form, []).append((rows, piece))
    if sum(len(rows) for rows, _ in kept) != parameter.shape[:-1].numel():
        return None
    forms = [_placed(parameter, found) for found in kinds.values()]
    if len(forms) == 1:
        return forms[0]
    expert_rows = parameter.shape[-2]
    choice = {
        int(rows[0]) // expert_rows: form for form, found in enumerate(kinds.values()) for rows, _ in found
    }
    return PackedExperts(tuple(forms), tuple(choice[expert] for expert in range(parameter.shape[0])))


def _placed(parameter: Tensor, found: list[tuple[Tensor, PackedTensor]]) -> PackedTensor:
    """Matrices of one form at their rows of the parameter, zeros elsewhere."""
    first = found[0][1]
    if len(found) == 1 and parameter.ndim == 2:
        return first
    lead = parameter.shape[:-1]

    def gathered(part: str) -> Tensor | None:
        like = getattr(first, part)
        if like is None:
            return None
        whole = like.new_zeros((lead.numel(), like.shape[-1]))
        for rows, piece in found:
            whole[rows] = getattr(piece, part)
        shaped: Tensor = whole.view(*lead, -1)
        return shaped

    codes = gathered("codes")
    assert codes is not None
    return replace(first, codes=codes, scale=gathered("scale"), zero_point=gathered("zero_point"))


def _scheme(target: Target, loaded: LoadedModel, groups: list[dict[str, Any]]) -> Scheme | None:
    """What the config says of a weight."""
    kind = type(loaded.model.get_submodule(target.name.rpartition(".")[0])).__name__
    for group in groups:
        of_experts = any("experts" in named and named.startswith("re:.*") for named in group["targets"])
        if of_experts == (target.layout == "experts") and (
            of_experts or any(_names(named, target.module, kind) for named in group["targets"])
        ):
            return _described(group)
    return None


def _names(named: str, module: str, kind: str) -> bool:
    return bool(re.match(named[3:], module)) if named.startswith("re:") else named in (module, kind)


def _described(group: Mapping[str, Any]) -> Scheme | None:
    """A config group's scheme; None for one that is none of ours."""
    weights, format_ = group["weights"], group.get("format")
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    if weights.get("type") == "int":
        size = weights.get("group_size") if strategy == "group" else None
        return IntegerScheme(bits, size, bool(weights.get("symmetric")), whole=strategy == "tensor")
    if format_ in ELEMENTS:
        return MxScheme(ELEMENTS[format_])  # type: ignore[arg-type]
    if format_ == "nvfp4-pack-quantized":
        return Nvfp4Scheme()
    scale = {"channel": "row", "tensor": "tensor", "block": "block"}.get(str(strategy))
    return None if scale is None else FloatScheme("float8_e4m3fn", scale)  # type: ignore[arg-type]


def _multiplied_in(packed: PackedTensor | PackedExperts, dtype: torch.dtype) -> PackedTensor | PackedExperts:
    """As ``core.saving.description.settle`` leaves a weight that is read at the first forward."""
    if isinstance(packed, PackedExperts) or packed.scale is None:
        return packed
    scale = packed.scale if dtype == torch.float32 else packed.scale.to(dtype)
    return replace(packed, scale=scale, product_dtype=dtype)


def _same(packed: PackedTensor | PackedExperts, parameter: Tensor) -> bool:
    if parameter.shape != (packed.choices[0] if isinstance(packed, PackedExperts) else packed).codes.shape:
        return False
    return torch.equal(packed.dequantize().to(parameter.dtype), parameter)
