"""How a model's tensors are laid out in the file: names, parts, and the quantization_config that explains them.

Uses transformers' own inverse of its load-time conversions, so that fused experts are written one by one, as
Mixtral, OLMoE and Qwen-MoE checkpoints have them. The config says ``dequantize``: plain ``from_pretrained`` then
rebuilds every dense weight while loading, so that ties hold and hooks see ordinary modules. On that path
transformers 5.23 reads one integer scheme for all dense weights and one for experts, which must be symmetric.
(The other path, decompression at the first forward, loads neither zero points nor tied packed embeddings.)

Experts of one file share one description, but two forms of it may stand side by side (``PackedExperts``). Integer
codes of one width are multiplied by scales that broadcast: a group's, or one for the whole row. And where the
description says 8-bit float with scales, a weight is multiplied in float32 whatever narrow float it is stored as, so
that bfloat16 may stand beside float8. Nothing else is read expert by expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.compress._targets import tied_names
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.packed import PackedExperts, PackedTensor
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.numerics.sizes import DTYPE_NAMES, Entry

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS = "re:.*experts.*"


def file_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every tensor of the weight file by its name there; a tied tensor once."""
    dense, packed = _split(loaded)
    tensors = _on_disk(loaded.model, dense)
    for module, piece in _pieces(loaded, packed).items():
        tensors.update({f"{module}.{part}": tensor for part, tensor in piece.stored().items()})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def file_entries(loaded: LoadedModel) -> dict[str, Entry]:
    """The same by formula: dtype and shape of every tensor, without packing anything."""
    dense, packed = _split(loaded)
    entries = {
        name: Entry(DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in _on_disk(loaded.model, dense).items()
    }
    for module, piece in _pieces(loaded, packed).items():
        entries.update({f"{module}.{part}": entry for part, entry in piece.entries().items()})
    return entries


def quantization_config(loaded: LoadedModel) -> dict[str, Any] | None:
    """compressed-tensors' description of the packed weights; None where no integer grid was used."""
    experts = {block.experts for block in loaded.anatomy.blocks if block.experts is not None}
    groups: dict[str, Any] = {}
    for module, packed in loaded.packed.items():
        if isinstance(packed, PackedExperts):
            groups["experts"] = {"scheme": _described(packed), "targets": {EXPERTS}}
            continue
        if not isinstance(packed.scheme, IntegerScheme):
            continue
        in_experts = module.rpartition(".")[0] in experts
        name = "experts" if in_experts else "dense"
        group = groups.setdefault(name, {"scheme": packed.scheme, "targets": set()})
        assert group["scheme"] == packed.scheme, (
            f"{module}: one integer scheme per file, {packed.scheme} is a second"
        )
        group["targets"].add(EXPERTS if in_experts else type(loaded.model.get_submodule(module)).__name__)
    if not groups:
        return None
    kept = [name for name, m in loaded.model.named_modules() if _kept(loaded, name, m, groups)]
    described = {name: _group(g["scheme"], sorted(g["targets"])) for name, g in sorted(groups.items())}
    formats = {group["format"] for group in described.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": kept,
        "dequantize": True,
    }


def _described(packed: PackedExperts) -> IntegerScheme | FloatScheme:
    """The one scheme that the file names for experts: that with groups, or float8."""
    schemes = [choice.scheme for choice in packed.choices]
    integer = [scheme for scheme in schemes if isinstance(scheme, IntegerScheme)]
    if not integer:
        return FloatScheme("float8_e4m3fn")
    return max(integer, key=lambda scheme: scheme.group_size is not None)


def _group(scheme: IntegerScheme | FloatScheme, targets: list[str]) -> dict[str, Any]:
    if isinstance(scheme, FloatScheme):
        row = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        return {"targets": targets, "weights": row, "format": "float-quantized"}
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}


def _kept(loaded: LoadedModel, name: str, module: Any, groups: dict[str, Any]) -> bool:
    """Whether a module has a targeted type but no integer codes of its own."""
    packed = loaded.packed.get(name)
    targeted = type(module).__name__ in groups.get("dense", {"targets": ()})["targets"]
    return targeted and not isinstance(getattr(packed, "scheme", None), IntegerScheme)


def _split(loaded: LoadedModel) -> tuple[dict[str, Tensor], dict[str, PackedTensor | PackedExperts]]:
    """The dense tensors of the state dict, and the packed ones by parameter name."""
    names = dict(loaded.model.named_parameters())
    packed = {f"{m}.weight" if f"{m}.weight" in names else m: p for m, p in loaded.packed.items()}
    left_out = {*packed, *tied_names(loaded.model)}
    state = {n: t.detach() for n, t in loaded.model.state_dict().items() if n not in left_out}
    return state, packed


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
    for name, form in _on_disk(loaded.model, chosen).items():
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
    codes = _on_disk(model, {name: p.codes for name, p in packed.items()})
    scales = _on_disk(model, {name: p.scale for name, p in packed.items() if p.scale is not None})
    zeros = _on_disk(model, {name: p.zero_point for name, p in packed.items() if p.zero_point is not None})
    tags = _on_disk(model, {n: p.codes.new_full((*p.codes.shape[:-1], 1), i, dtype=torch.int32)
                            for i, (n, p) in enumerate(packed.items())})  # fmt: skip
    pieces = {}
    for name, part in codes.items():
        if part.ndim != 2:
            raise CannotCompress(
                f"{name}: {type(model).__name__} stores all experts of a layer in one tensor, which compressed-tensors "
                "cannot pack, so this variant would not reload; choose cast, or a family that stores experts one by one"
            )
        lead = part.shape[:-1]
        assert tags[name].shape[:-1] == lead, f"{name}: a tag was not cut as its codes were"
        tag = int(tags[name].flatten()[0])
        assert bool((tags[name] == tag).all()), f"{name} mixes several weights, whose schemes could differ"
        scale = scales.get(name)
        assert scale is None or scale.shape[:-1] == lead, f"{name}: scales were not cut as the codes were"
        scheme = origins[tag].scheme
        pieces[name.removesuffix(".weight")] = PackedTensor(part, scale, zeros.get(name), scheme)
    return pieces


def _on_disk(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and cuts of the checkpoint format, by transformers' inverse of its loading."""
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted
