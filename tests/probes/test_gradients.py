"""Gradients are given where they are right, and refused by module and reason where they are not."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from core.errors import CannotMeasure
from core.models.gradients import differentiable, require_gradients
from core.models.loaded import LoadedModel
from tests.tiny import FAMILIES, n_hooks, tiny_model


def own(family: str) -> LoadedModel:
    loaded = tiny_model(family)
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plain_family_has_gradients_and_keeps_no_hook(family: str) -> None:
    loaded = own(family)
    before = n_hooks(loaded.model)
    with torch.inference_mode():
        require_gradients(loaded)
    assert n_hooks(loaded.model) == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


class _Rounding(torch.autograd.Function):
    """A fast kernel without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def _drop(loaded: LoadedModel) -> None:
    linear = loaded.model.model.layers[1].mlp.up_proj
    linear.register_forward_hook(lambda module, args, output: output.detach())


def _no_backward(loaded: LoadedModel) -> None:
    linear = loaded.model.model.layers[1].mlp.up_proj
    linear.register_forward_hook(lambda module, args, output: _Rounding.apply(output))


def _pack(loaded: LoadedModel) -> None:
    linear = loaded.model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def _inference(loaded: LoadedModel) -> None:
    linear = loaded.model.model.layers[1].mlp.up_proj
    with torch.inference_mode():
        linear.weight = torch.nn.Parameter(linear.weight.clone(), requires_grad=False)


def _int8(loaded: LoadedModel) -> None:
    class Linear8bitLt(torch.nn.Linear):
        pass

    loaded.model.model.layers[1].mlp.up_proj = Linear8bitLt(128, 256, bias=False).requires_grad_(False)


def _compressed_tensors(loaded: LoadedModel) -> None:
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme("W8A8", ["re:.*layers.1.mlp.up_proj"])
    apply_quantization_config(loaded.model, QuantizationConfig(config_groups={"all": scheme}))


REFUSED = [
    (_drop, "layers.1.mlp.up_proj: its kernel .Linear. drops it"),
    (_no_backward, "kernels have no backward pass"),
    (_pack, "layers.1.mlp.up_proj: its weights are packed as int8"),
    (_inference, "layers.1.mlp.up_proj: its weights were made in inference mode"),
    (_int8, "layers.1.mlp.up_proj: bitsandbytes int8 rounds its input"),
    (_compressed_tensors, "layers.1.mlp.up_proj: compressed-tensors quantizes it anew"),
]


@pytest.mark.parametrize(("spoil", "reason"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_a_kernel_without_derivative_is_refused_by_name(spoil: Any, reason: str) -> None:
    loaded = own("llama")
    spoil(loaded)
    with pytest.raises(CannotMeasure, match=f"{reason}.*use a method that only runs forward"):
        require_gradients(loaded)


def test_a_gradient_that_overflows_is_refused() -> None:
    loaded = own("llama")
    loaded.model.lm_head.weight.fill_(1e38)
    with pytest.raises(CannotMeasure, match="not finite in float32"):
        require_gradients(loaded)


def test_differentiable_undoes_inference_mode_inside_it_only() -> None:
    with torch.inference_mode():
        with differentiable():
            x = torch.ones(2, requires_grad=True)
            assert torch.autograd.grad((x * x).sum(), x)[0].tolist() == [2, 2]
        assert torch.is_inference_mode_enabled()
