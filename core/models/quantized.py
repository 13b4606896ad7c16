"""Checkpoints that another library quantized, read back as dense weights.

Probes, anatomy checks and gradients want plain linear layers, and a fused kernel may round more than the weights. So
each quantized layer becomes the dense one whose weights the packed ones stand for, before it has run once:
bitsandbytes repacks 4-bit weights for its CPU kernel at the first forward pass, and what its ``dequantize`` returns
after that is wrong (seen with 0.50.2: outputs off by more than their own size). One layer is therefore held against
its own kernel.

compressed-tensors' files are read as dense by transformers itself: while loading where all dense weights have one
scheme, else at the first forward, which ``unpack`` anticipates. The layers' own roundings of their inputs are given
back as plain data.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from core.errors import CannotOpen
from core.lazy import torch
from core.numerics.activations import ActivationScheme

LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum-quanto ninja"}
"""Quantization methods, as a config names them (quanto: as a file beside it does), and what pip calls the packages that
read them."""
MODULES = {"quanto": "optimum.quanto"}
"""How a package is imported, where not by its method's name."""
TOLERANCE = 0.1
"""Largest difference to the library's own kernel, as a share of the output's root mean square. LLM.int8 rounds
activations too and is off by about 0.02, a wrong layout by more than 1."""


def is_lazy(quantization: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors config must be read layer by layer, at the first forward.

    So it must be where it says so, where dense weights have several schemes (read while loading, all would be taken for
    the first), and where inputs are rounded in a way that can be gone on with.
    """
    dense = [group for group in _groups(quantization) if not any("experts" in t for t in group["targets"])]
    rounds = any(_is_known(group.get("input_activations") or {}) for group in dense)
    return quantization.get("dequantize") is False or len(dense) > 1 or rounds


def left_out(quantization: Mapping[str, Any]) -> str:
    """A note on what reading such a config while loading does not keep; empty where it keeps everything."""
    if not any(group.get("input_activations") for group in _groups(quantization)):
        return ""
    return (
        "Its config rounds what linear layers read, in a way that is not reproduced here: weights are as stored, inputs "
        "exact."
    )


def _groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((quantization.get("config_groups") or {}).values())


def unpack(model: Any) -> tuple[dict[str, ActivationScheme], str]:
    """Make a model that was loaded to be read at its first forward plain and dense, as that forward would.

    Returns what its linear layers' inputs are rounded to, for ``LoadedModel.round_inputs``, and a note where they are
    rounded in a way that is not known here, and so is left out.
    """
    from compressed_tensors.compressors.base import decompress_module

    activations, unknown = {}, []
    for name, module in list(model.named_modules()):
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        if scheme.input_activations is not None:
            found = _activation(module, scheme.input_activations.model_dump(mode="json"))
            if found is None:
                unknown.append(name)
            else:
                activations[name] = found
        decompress_module(module, leave_decompressed=False)
        module.weight.data = module.weight.data.to(model.dtype)  # packed floats come back in bfloat16
        vars(module).pop("forward", None)
        for part in ("weight_shape", "input_scale", "input_zero_point"):
            if hasattr(module, part):
                delattr(module, part)
    if hasattr(model, "ct_decompress_hook"):
        model.ct_decompress_hook.remove()
        del model.ct_decompress_hook
    model.hf_quantizer.remove_quantization_config(model)
    note = (
        f"{len(unknown)} layers round their inputs in a way that is not reproduced here (first {unknown[0]}): their "
        "weights are as stored, their inputs exact."
        if unknown
        else ""
    )
    return activations, note


def make_invertible(model: Any) -> None:
    """Let transformers say how a model that it unpacked while loading is laid out in a file.

    Conversions that unpacked experts have no inverse. What they did besides (stacking, fusing) has, and the model's kind
    alone decides that. Changes nothing for a model that was dense in its file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    def unpacks(conversion: Any) -> bool:
        return any(
            isinstance(step, CompressedTensorsDequantize) for step in getattr(conversion, "operations", ())
        )

    used = getattr(model, "_weight_conversions", None) or []
    if any(unpacks(conversion) for conversion in used):
        plain = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [
            *(conversion for conversion in used if not isinstance(conversion, WeightConverter)),
            *(conversion for conversion in plain if isinstance(conversion, WeightConverter)),
        ]


def _activation(module: Any, args: Mapping[str, Any]) -> ActivationScheme | None:
    """The scheme of a linear layer's inputs; None where it is none of ours."""
    if not _is_known(args):
        return None
    return ActivationScheme(None if args["dynamic"] else float(module.input_scale.detach()))


def _is_known(args: Mapping[str, Any]) -> bool:
    """Whether inputs are rounded as ``ActivationScheme`` does: 8-bit integers, by token or by one stored scale."""
    integer = (args.get("type"), args.get("symmetric"), args.get("num_bits")) == ("int", True, 8)
    return integer and (args.get("dynamic"), args.get("strategy")) in ((True, "token"), (False, "tensor"))


def densify(model: Any, method: str) -> tuple[Any, str]:
    """The model with dense weights, and a note on it; raises ``CannotOpen`` where they do not reproduce a layer.

    Call it right after loading, before any forward pass.
    """
    quantized = _first_quantized(model)
    if quantized is None:
        raise CannotOpen(
            f"the config says {method}, but no layer is quantized by it; open the original instead"
        )
    # quanto's modules cannot be copied, and are replaced rather than changed.
    name, before = quantized[0], quantized[1] if method == "quanto" else copy.deepcopy(quantized[1])
    if method == "bitsandbytes":
        model = model.dequantize()
    elif method == "quanto":
        _dequantize_modules(model)
    else:
        _dequantize_parameters(model)
    after = model.get_submodule(name)
    difference = _difference(before, after)
    if difference > TOLERANCE:
        raise CannotOpen(
            f"{name}: the dense weights that {method} gives back miss its own kernel by {difference:.0%}; "
            "use another version of it, or open the original"
        )
    return model, (
        f"Quantized by {method}; read back as dense weights. {name} differs from that library's own kernel by "
        f"{difference:.1%} of its output, which is what the kernel rounds besides the weights."
    )


def _first_quantized(model: Any) -> tuple[str, Any] | None:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith(("bitsandbytes", "optimum.quanto")) or _is_packed(weight):
            return name, module
    return None


def _is_packed(parameter: Any) -> bool:
    return type(parameter).__module__.startswith("torchao") or type(
        getattr(parameter, "data", None)
    ).__module__.startswith("torchao")


def _dequantize_modules(model: Any) -> None:
    """optimum-quanto's layers as torch's own."""
    from optimum.quanto import QConv2d, QLinear

    plain: dict[Any, Any] = {QLinear: torch.nn.Linear, QConv2d: torch.nn.Conv2d}
    for name, module in list(model.named_modules()):
        kind = plain.get(type(module))
        if kind is not None:
            made = kind.__new__(kind)
            made.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("_")})
            torch.nn.Module.__init__(made)
            made.weight = torch.nn.Parameter(module.weight.dequantize().detach(), requires_grad=False)
            made.register_parameter("bias", module.bias)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made)


def _dequantize_parameters(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if _is_packed(parameter):
                setattr(module, name, torch.nn.Parameter(parameter.dequantize(), requires_grad=False))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _difference(packed: Any, dense: Any) -> float:
    """Between two forms of a linear layer on seeded noise, as a share of the dense one's root mean square."""
    generator = torch.Generator().manual_seed(0)
    weight = dense.weight
    noise = torch.randn(16, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode(False), torch.no_grad():  # quanto's layers refuse inference mode
        expected, given = dense(noise).float(), packed(noise).float()
    return float((given - expected).square().mean().sqrt() / expected.square().mean().sqrt())
