"""The ``quantization_config`` that explains a variant's packed weights to plain transformers, and which of its two
ways of reading them is asked for.

*While loading* (``dequantize: true``): every dense weight is rebuilt before the model is handed over, so that ties hold
and hooks see ordinary modules. transformers 5.23 then reads **one** scheme for all dense weights (integers may have zero
points, embeddings may be packed) and one for experts.

*At the first forward* (``dequantize: false``): each linear layer has a scheme of its own, and its inputs may be rounded
too. Only symmetric integers and scaled float8, only in ``nn.Linear``; embeddings stay plain floats. Codes and scales are
multiplied in the model's dtype, whatever scales are stored in. Experts are rebuilt while loading on this way too.

Which one is taken follows from the schemes in ``loaded.packed`` and from ``loaded.activations``: the first wherever it
can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.activations import ActivationScheme
from core.numerics.packed import PackedExperts, PackedTensor
from core.numerics.schemes import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FloatScheme,
    IntegerScheme,
    MxScheme,
    Nvfp4Scheme,
    Scheme,
    TernaryScheme,
)

EXPERTS = "re:.*experts.*"
LAZY_EXPERTS = r"re:.*\.experts\..*"
"""The same where targets are matched by name: shared experts are linear layers with schemes of their own."""
MX_FORMATS = {"e2m1": "mxfp4-pack-quantized", "e2m3": "mxfp6-pack-quantized", "e4m3": "mxfp8-quantized"}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def quantization_config(loaded: LoadedModel) -> dict[str, Any] | None:
    """compressed-tensors' description of the packed weights; None where nothing needs one."""
    dense, experts = described_schemes(loaded)
    if not dense and experts is None:
        return None
    lazy = is_lazy(loaded)
    groups = _lazy_groups(loaded, dense) if lazy else _eager_groups(loaded, dense)
    if experts is not None:
        groups["experts"] = _group(experts, [LAZY_EXPERTS if lazy else EXPERTS])
    elif loaded.anatomy.n_experts:
        # Experts that are not packed pass only where their group is an 8-bit float, whose weights may lack scales.
        groups["experts"] = _group(FloatScheme("float8_e4m3fn", "row"), [LAZY_EXPERTS if lazy else EXPERTS])
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if lazy else _ignored(loaded, groups),
        "dequantize": not lazy,
    }


def described_schemes(loaded: LoadedModel) -> tuple[dict[str, Scheme], Scheme | None]:
    """Dense module → its scheme, for those whose stored form needs words; and the one scheme that experts share."""
    experts_at = {block.experts for block in loaded.anatomy.blocks if block.experts is not None}
    dense: dict[str, Scheme] = {}
    of_experts: set[Scheme] = set()
    for module, packed in loaded.packed.items():
        if isinstance(packed, PackedExperts):
            of_experts.add(_shared(packed))
        elif packed.scale is None:
            continue  # a plain narrow float explains itself
        elif module.rpartition(".")[0] in experts_at:
            of_experts.add(_carried(packed.scheme))
        else:
            dense[module] = _carried(packed.scheme)
    assert len(of_experts) <= 1, f"one scheme for the experts of a file, not {of_experts}"
    return dense, next(iter(of_experts), None)


def is_lazy(loaded: LoadedModel) -> bool:
    """Whether the file is read at the first forward: several dense schemes, or inputs that are rounded."""
    dense, _ = described_schemes(loaded)
    return len(set(dense.values())) > 1 or bool(loaded.activations)


def settle(loaded: LoadedModel) -> None:
    """Give every packed weight the values that its reload will have, once all steps of a recipe are done.

    Where the file is read at the first forward, codes and scales are multiplied in the model's dtype: that is neither
    what the step that packed a weight could know nor what ``PackedTensor`` assumes. Elsewhere nothing changes. Raises
    ``CannotCompress`` where the file cannot be read that way.
    """
    if not is_lazy(loaded):
        return
    dense, _ = described_schemes(loaded)
    refuse_mixture(
        loaded, {f"{module}.weight": scheme for module, scheme in dense.items()}, loaded.activations
    )
    for module in dense:
        packed, parameter = loaded.packed[module], loaded.model.get_parameter(f"{module}.weight")
        assert isinstance(packed, PackedTensor)
        assert packed.scale is not None
        # The loader reads scales into parameters of the model's dtype.
        scale = packed.scale if parameter.dtype == torch.float32 else packed.scale.to(parameter.dtype)
        loaded.packed[module] = replace(packed, scale=scale, product_dtype=parameter.dtype)
        parameter.data = loaded.packed[module].dequantize().to(parameter.dtype)


def refuse_mixture(
    loaded: LoadedModel,
    schemes: Mapping[str, Scheme],
    activations: Mapping[str, ActivationScheme] | None = None,
) -> None:
    """Raise ``CannotCompress`` where no file could hold these schemes (parameter → scheme) together.

    Call it before anything is changed. Plain narrow floats and experts fit beside anything; experts among themselves
    must share a scheme (or be ``PackedExperts``).
    """
    of = {target.name: target for target in targets(loaded)}
    dense = {
        name: _carried(scheme)
        for name, scheme in schemes.items()
        if of[name].layout != "experts" and not _is_plain(scheme)
    }
    experts = {_carried(scheme) for name, scheme in schemes.items() if of[name].layout == "experts"}
    if len(experts) > 1:
        raise CannotCompress(
            f"experts were given {len(experts)} formats ({_labels(experts)}), but transformers reads one for all experts "
            "of a file; give them one, or use expert_bits"
        )
    if len(set(dense.values())) <= 1 and not activations:
        return
    for name, scheme in dense.items():
        _refuse_lazy(of[name], scheme, loaded)
    for module in activations or ():
        if f"{module}.weight" not in dense:
            raise CannotCompress(
                f"the inputs of {module} are rounded but its weight is not packed; quantize the weight too"
            )


def _refuse_lazy(target: Target, scheme: Scheme, loaded: LoadedModel) -> None:
    why = "a model with several formats, or with rounded inputs, is read layer by layer"
    if target.layout == "embedding":
        raise CannotCompress(
            f"{target.module} cannot be {scheme.label}: {why}, embeddings as plain floats only; choose 8 (float8) or 16 "
            "bits for the embedding"
        )
    if target.layout != "linear" or type(loaded.model.get_submodule(target.module)) is not torch.nn.Linear:
        raise CannotCompress(
            f"{target.module} is a {type(loaded.model.get_submodule(target.module)).__name__}: {why}, nn.Linear only; "
            f"give every matrix of this {loaded.anatomy.architecture} one format"
        )
    if isinstance(scheme, IntegerScheme) and not scheme.symmetric:
        raise CannotCompress(
            f"{target.module} cannot be {scheme.label}: {why}, without zero points; choose symmetric"
        )
    if isinstance(scheme, FloatScheme) and scheme.scale == "block":
        raise CannotCompress(
            f"{target.module} cannot be {scheme.label}: {why}, float8 by row or tensor; choose row"
        )
    if not isinstance(scheme, IntegerScheme | FloatScheme):
        raise CannotCompress(
            f"{target.module} cannot be {scheme.label}: {why}, and this format would come back in bfloat16; use it for "
            "every matrix, or choose integers or float8"
        )


def _labels(schemes: Iterable[Scheme]) -> str:
    return ", ".join(sorted(scheme.label for scheme in schemes))


def _is_plain(scheme: Scheme) -> bool:
    return isinstance(scheme, FloatScheme) and scheme.scale == "none"


def _carried(scheme: Scheme) -> Scheme:
    """The grid that a scheme is stored on."""
    return scheme.carrier if isinstance(scheme, TernaryScheme) else scheme


def _shared(packed: PackedExperts) -> Scheme:
    """The one scheme that the file names for experts: that with groups, or float8."""
    schemes = [choice.scheme for choice in packed.choices]
    integer = [scheme for scheme in schemes if isinstance(scheme, IntegerScheme)]
    if not integer:
        return FloatScheme("float8_e4m3fn", "row")
    return max(integer, key=lambda scheme: scheme.group_size is not None)


def _eager_groups(loaded: LoadedModel, dense: Mapping[str, Scheme]) -> dict[str, Any]:
    if not dense:
        return {}
    (scheme,) = set(dense.values())
    return {"dense": _group(scheme, sorted({type(loaded.model.get_submodule(m)).__name__ for m in dense}))}


def _lazy_groups(loaded: LoadedModel, dense: Mapping[str, Scheme]) -> dict[str, Any]:
    """One group per scheme and kind of activations, its modules named by one expression."""

    def kind(module: str) -> tuple[Scheme, str]:
        activation = loaded.activations.get(module)
        return dense[module], "" if activation is None else activation.label

    def order(module: str) -> tuple[str, str]:
        scheme, activation = kind(module)
        return scheme.label, activation

    groups = {}
    for index, (_, found) in enumerate(groupby(sorted(dense, key=order), key=order)):
        modules = list(found)
        # transformers takes the first group whose target speaks of experts as theirs: that is "experts", in the order
        # of names, in which the file is written.
        groups[f"group_{index:03}"] = _group(
            dense[modules[0]], [modules_pattern(modules)], loaded.activations.get(modules[0])
        )
    return groups


def modules_pattern(modules: Iterable[str]) -> str:
    """One target that matches exactly these modules; those that differ in their layer's number are named together."""
    numbers: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        before, number, after = _at_number(module)
        numbers.setdefault((before, after), []).append(number)
    parts = []
    for (before, after), found in numbers.items():
        inner = found[0] if len(found) == 1 else f"(?:{'|'.join(sorted(found, key=int))})"
        parts.append(re.escape(before) + inner + re.escape(after))
    return f"re:^(?:{'|'.join(parts)})$"


def _at_number(module: str) -> tuple[str, str, str]:
    match = NUMBER.search(module)
    return (module[: match.start()], match[0], module[match.end() :]) if match else (module, "", "")


def _group(scheme: Scheme, targets_: list[str], activation: ActivationScheme | None = None) -> dict[str, Any]:
    """One config group: what weights are, and what inputs are rounded to."""
    weights: dict[str, Any] = {"num_bits": scheme.bits, "symmetric": True, "dynamic": False, "type": "float"}
    match scheme:
        case IntegerScheme():
            format_ = "pack-quantized"
            strategy = "tensor" if scheme.whole else "channel" if scheme.group_size is None else "group"
            weights |= {
                "type": "int", "symmetric": scheme.symmetric, "strategy": strategy, "group_size": scheme.group_size,
            }  # fmt: skip
        case FloatScheme():
            format_ = "float-quantized"
            weights["strategy"] = {"row": "channel"}.get(scheme.scale, scheme.scale)
            if scheme.scale == "block":
                weights["block_structure"] = [BLOCK_ROWS, BLOCK_COLUMNS]
        case MxScheme():
            format_ = MX_FORMATS[scheme.element]
            weights |= {"strategy": "group", "group_size": scheme.block, "scale_dtype": "torch.uint8"}
        case Nvfp4Scheme():
            format_ = "nvfp4-pack-quantized"
            weights |= {
                "strategy": "tensor_group", "group_size": scheme.block, "scale_dtype": "torch.float8_e4m3fn",
            }  # fmt: skip
        case _:
            raise AssertionError(f"no file format holds {scheme.label}")
    group = {"targets": targets_, "weights": weights, "format": format_}
    if activation is not None:
        group["input_activations"] = {
            "num_bits": activation.bits, "type": "int", "symmetric": True,
            "strategy": "token" if activation.scale is None else "tensor", "dynamic": activation.scale is None,
        }  # fmt: skip
    return group


def _ignored(loaded: LoadedModel, groups: Mapping[str, Any]) -> list[str]:
    """Modules that have a targeted type but no codes of their own."""
    types = groups.get("dense", {"targets": ()})["targets"]
    packed, _ = described_schemes(loaded)
    return [n for n, m in loaded.model.named_modules() if type(m).__name__ in types and n not in packed]
