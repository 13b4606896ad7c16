"""How a model's tensors are laid out in the file: names, parts, and the quantization_config that explains them.

Uses transformers' own inverse of its load-time conversions, so that fused experts are written one by one, as
Mixtral, OLMoE and Qwen-MoE checkpoints have them. The config says ``dequantize``: plain ``from_pretrained`` then
rebuilds every dense weight while loading, so that ties hold and hooks see ordinary modules. On that path
transformers 5.23 reads one integer scheme for all dense weights and one for experts, which must be symmetric.
(The other path, decompression at the first forward, loads neither zero points nor tied packed embeddings.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.compress._targets import tied_names
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.packed import PackedTensor
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.numerics.sizes import DTYPE_NAMES, Entry, entries_of

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
        scale = "F16" if piece.scale is None else DTYPE_NAMES[str(piece.scale.dtype).removeprefix("torch.")]
        rows, columns = piece.codes.shape
        parts = entries_of(rows, columns, piece.scheme, scale_dtype=scale)
        entries.update({f"{module}.{part}": entry for part, entry in parts.items()})
    return entries


def quantization_config(loaded: LoadedModel) -> dict[str, Any] | None:
    """compressed-tensors' description of the packed weights; None where no integer grid was used."""
    experts = {block.experts for block in loaded.anatomy.blocks if block.experts is not None}
    groups: dict[str, Any] = {}
    for module, packed in loaded.packed.items():
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
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            name: _group(g["scheme"], sorted(g["targets"])) for name, g in sorted(groups.items())
        },
        "ignore": kept,
        "dequantize": True,
    }


def _group(scheme: IntegerScheme, targets: list[str]) -> dict[str, Any]:
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
    return targeted and (packed is None or isinstance(packed.scheme, FloatScheme))


def _split(loaded: LoadedModel) -> tuple[dict[str, Tensor], dict[str, PackedTensor]]:
    """The dense tensors of the state dict, and the packed ones by parameter name."""
    names = dict(loaded.model.named_parameters())
    packed = {f"{m}.weight" if f"{m}.weight" in names else m: p for m, p in loaded.packed.items()}
    left_out = {*packed, *tied_names(loaded.model)}
    state = {n: t.detach() for n, t in loaded.model.state_dict().items() if n not in left_out}
    return state, packed


def _pieces(loaded: LoadedModel, packed: dict[str, PackedTensor]) -> dict[str, PackedTensor]:
    """Packed weights by their module's name in the file; a fused expert tensor becomes one per expert and matrix.

    Un-fusing renames and cuts the leading axes only, so codes, scales and a tag that says which weight a piece came
    from are all cut alike.
    """
    model, origins = loaded.model, list(packed.values())
    codes = _on_disk(model, {name: p.codes for name, p in packed.items()})
    scales = _on_disk(model, {name: p.scale for name, p in packed.items() if p.scale is not None})
    zeros = _on_disk(model, {name: p.zero_point for name, p in packed.items() if p.zero_point is not None})
    tags = _on_disk(model, {n: p.codes.new_full((*p.codes.shape[:-1], 1), i, dtype=torch.int32)
                            for i, (n, p) in enumerate(packed.items())})  # fmt: skip
    pieces = {}
    for name, part in codes.items():
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
