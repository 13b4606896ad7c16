"""How a model's tensors are laid out in the file: names and parts; the words that explain them are ``description``'s.

Uses transformers' own inverse of its load-time conversions, so that fused experts are written one by one, as
Mixtral, OLMoE and Qwen-MoE checkpoints have them.

A tensor that nothing packed is written in the 16-bit float that the base's own file is in, where that holds every one
of its values: a model opened in float32 then costs no more on disk than it did.

Experts of one file share one description, but two forms of it may stand side by side (``PackedExperts``). Integer
codes of one width are multiplied by scales that broadcast: a group's, or one for the whole row. And where the
description says 8-bit float with scales, a weight is multiplied in float32 whatever narrow float it is stored as, so
that bfloat16 may stand beside float8. Nothing else is read expert by expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.checkpoint import stored_tensors, weight_files
from core.models.loaded import LoadedModel
from core.models.quantized import make_invertible
from core.models.targets import targets, tied_names
from core.numerics.packed import PackedExperts, PackedTensor
from core.numerics.sizes import DTYPE_NAMES, Entry
from core.saving.description import described_schemes

if TYPE_CHECKING:
    from torch import Tensor

HALVES = {"F16": "float16", "BF16": "bfloat16"}
PARTS = ("_scale", "_shape", "_zero_point", "_packed")
"""How the names of what is stored beside or instead of a weight end."""


def file_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every tensor of the weight file by its name there; a tied tensor once."""
    dense, packed = _split(loaded)
    tensors = on_disk(loaded.model, dense)
    for module, piece in _pieces(loaded, packed).items():
        tensors.update({f"{module}.{part}": tensor for part, tensor in piece.stored().items()})
    for module, scheme in loaded.activations.items():
        if scheme.scale is not None:
            tensors[f"{module}.input_scale"] = torch.tensor([scheme.scale], dtype=loaded.model.dtype)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def file_entries(loaded: LoadedModel) -> dict[str, Entry]:
    """The same by formula: dtype and shape of every tensor, without packing anything."""
    dense, packed = _split(loaded)
    entries = {
        name: Entry(DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in on_disk(loaded.model, dense).items()
    }
    for module, piece in _pieces(loaded, packed).items():
        entries.update({f"{module}.{part}": entry for part, entry in piece.entries().items()})
    for module, scheme in loaded.activations.items():
        if scheme.scale is not None:
            entries[f"{module}.input_scale"] = Entry(DTYPE_NAMES[loaded.dtype], (1,))
    return entries


def _split(loaded: LoadedModel) -> tuple[dict[str, Tensor], dict[str, PackedTensor | PackedExperts]]:
    """The dense tensors of the state dict, and the packed ones by parameter name."""
    names = dict(loaded.model.named_parameters())
    packed = {f"{m}.weight" if f"{m}.weight" in names else m: p for m, p in loaded.packed.items()}
    left_out = {*packed, *tied_names(loaded.model)}
    half = stored_half(loaded)
    # Beside packed weights experts pass through code that leaves them in the dtype they are stored in.
    wide = (
        {t.name for t in targets(loaded) if t.component == "experts"}
        if any(described_schemes(loaded))
        else ()
    )
    state = {
        name: _narrowed(tensor.detach(), None if name in wide else half)
        for name, tensor in loaded.model.state_dict().items()
        if name not in left_out
    }
    return state, packed


def stored_half(loaded: LoadedModel) -> torch.dtype | None:
    """The 16-bit float that most of the base's own file is in; None where it has none."""
    found: Counter[str] = Counter()
    for name, tensor in stored_tensors(weight_files(loaded.folder)).items():
        if tensor.dtype in HALVES and not name.endswith(PARTS):
            found[tensor.dtype] += tensor.nbytes
    return getattr(torch, HALVES[found.most_common(1)[0][0]]) if found else None


def _narrowed(tensor: Tensor, half: torch.dtype | None) -> Tensor:
    """The tensor in a 16-bit float where that loses nothing, else as it is."""
    if half is None or tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(half)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _pieces(loaded: LoadedModel, packed: dict[str, PackedTensor | PackedExperts]) -> dict[str, PackedTensor]:
    """Packed weights by their module's name in the file; a fused expert tensor becomes one per expert and matrix."""
    mixed = {name: p for name, p in packed.items() if isinstance(p, PackedExperts)}
    pieces = _cut(loaded.model, {n: p for n, p in packed.items() if isinstance(p, PackedTensor)})
    if not mixed:
        return pieces
    forms = [
        _cut(loaded.model, {name: p.choices[form] for name, p in mixed.items()})
        for form in range(max(len(p.choices) for p in mixed.values()))
    ]
    chosen = {
        n: torch.tensor(p.choice_E).view(-1, 1, 1).expand_as(p.choices[0].codes) for n, p in mixed.items()
    }
    for name, form in on_disk(loaded.model, chosen).items():
        assert form.ndim == 2, f"{name} holds several experts, whose forms could differ"
        module = name.removesuffix(".weight")
        pieces[module] = forms[int(form[0, 0])][module]
    return pieces


def _cut(model: Any, packed: dict[str, PackedTensor]) -> dict[str, PackedTensor]:
    """Packed weights cut as the file has them.

    Un-fusing renames and cuts the leading axes only, so codes, scales and a tag that says which weight a piece came
    from are all cut alike.
    """
    origins = list(packed.values())
    codes = on_disk(model, {name: p.codes for name, p in packed.items()})
    scales = on_disk(model, {name: p.scale for name, p in packed.items() if p.scale is not None})
    zeros = on_disk(model, {name: p.zero_point for name, p in packed.items() if p.zero_point is not None})
    tags = on_disk(model, {n: p.codes.new_full((*p.codes.shape[:-1], 1), i, dtype=torch.int32)
                            for i, (n, p) in enumerate(packed.items())})  # fmt: skip
    pieces = {}
    for name, part in codes.items():
        if part.ndim != 2:
            raise _fused_on_disk(model, name)
        lead = part.shape[:-1]
        assert tags[name].shape[:-1] == lead, f"{name}: a tag was not cut as its codes were"
        tag = int(tags[name].flatten()[0])
        assert bool((tags[name] == tag).all()), f"{name} mixes several weights, whose schemes could differ"
        piece = origins[tag]
        if part.shape != piece.codes.shape:
            scale = scales.get(name)
            assert scale is None or scale.shape[:-1] == lead, f"{name}: scales were not cut as the codes were"
            piece = replace(piece, codes=part, scale=scale, zero_point=zeros.get(name))
        pieces[name.removesuffix(".weight")] = piece
    return pieces


def refuse_fused_on_disk(loaded: LoadedModel, parameters: Iterable[str]) -> None:
    """Raise ``CannotCompress`` where packed experts could not be written: for costly steps, before they begin."""
    fused = {
        name: parameter for name in parameters if (parameter := loaded.model.get_parameter(name)).ndim == 3
    }
    shapes = {name: torch.empty_like(parameter, device="meta") for name, parameter in fused.items()}
    for name, part in on_disk(loaded.model, shapes).items():
        if part.ndim != 2:
            raise _fused_on_disk(loaded.model, name)


def _fused_on_disk(model: Any, name: str) -> CannotCompress:
    return CannotCompress(
        f"{name}: {type(model).__name__} stores all experts of a layer in one tensor, which compressed-tensors "
        "cannot pack, so this variant would not reload; choose cast, or a family that stores experts one by one"
    )


def on_disk(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and cuts of the checkpoint format, by transformers' inverse of its loading."""
    from transformers.core_model_loading import revert_weight_conversion

    make_invertible(model)
    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted
