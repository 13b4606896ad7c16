"""Scales and exact weights behind stored forms: their gradients against autograd's, and values as a reload gives them."""

import pytest
import torch

from core.distill.trainable.on_grid import nearest
from core.distill.trainable.scales_and_norms import LearnedScales
from core.distill.trainable.straight_through import NarrowFloat, OnGrid
from core.numerics.quantize import quantize
from core.numerics.schemes import FloatScheme, IntegerScheme, MxScheme, Nvfp4Scheme, Scheme, TernaryScheme

SCHEMES: tuple[Scheme, ...] = (
    IntegerScheme(3, 32, symmetric=False),
    IntegerScheme(4, None, symmetric=True),
    IntegerScheme(8, None, symmetric=True, whole=True),
    TernaryScheme(32),
    FloatScheme("float8_e4m3fn", "row"),
    FloatScheme("float8_e4m3fn", "tensor"),
    FloatScheme("float8_e4m3fn", "block"),
    FloatScheme("float8_e4m3fn"),
    Nvfp4Scheme(),
    MxScheme("e2m1"),
    MxScheme("e2m3"),
    MxScheme("e4m3"),
)
SCALED = tuple(s for s in SCHEMES if not isinstance(s, MxScheme) and s != FloatScheme("float8_e4m3fn"))


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(160, 192, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_a_stored_weight_is_on_its_own_grid(scheme: Scheme):
    packed = quantize(weight(), scheme)
    again = nearest(packed.dequantize(), packed)
    assert torch.equal(again.dequantize(), packed.dequantize())
    moved = nearest(weight(1), packed)
    assert torch.equal(moved.dequantize(), nearest(moved.dequantize(), packed).dequantize()), "a projection"
    assert not torch.equal(moved.dequantize(), packed.dequantize())


@pytest.mark.parametrize("scheme", SCALED, ids=lambda s: s.label)
def test_the_gradient_of_scales_is_that_of_an_expansion_in_full(scheme: Scheme):
    """W as a function of θ by finite differences, along the gradient itself."""
    packed = quantize(weight(), scheme)
    rule = LearnedScales(packed)
    assert torch.equal(rule.packed().dequantize(), packed.dequantize()), "nothing learned, nothing changed"
    gradient = weight(2)
    rule.pull(packed.dequantize().float(), gradient)
    (change,) = rule.learned.values()
    direction = change.grad / change.grad.square().mean().sqrt()
    step = 0.2  # far above what rounding stored scales and values to 16 bits changes
    values = []
    for sign in (1, -1):
        change.data = sign * step * direction
        values.append(rule.packed().dequantize().double())
    numeric = float(((values[0] - values[1]) * gradient).sum()) / (2 * step)
    assert float(change.grad @ direction) == pytest.approx(numeric, rel=0.03)


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=lambda s: s.label)
def test_straight_through_is_the_clamp_without_the_rounding(scheme: Scheme):
    """The gradients of s · (clamp(V / s + z) - z) with the rounding error held fixed, by autograd."""
    packed = quantize(weight(), scheme)
    rule = OnGrid(packed)
    assert torch.equal(rule.packed().codes, packed.codes), "it begins at what is stored"
    rule.learned["exact"].data += 0.7 * weight(4)  # some of it beyond the grid
    now, gradient = rule.packed().dequantize().float(), weight(5)
    rule.pull(now, gradient)

    exact = rule.learned["exact"].detach().clone().requires_grad_()
    theta = torch.zeros(packed.scale.numel(), requires_grad=True)
    groups = 1 if packed.scale.shape[-1] == 1 else packed.scale.shape[-1]
    scale = packed.scale.float() * theta.exp().view(packed.scale.shape)
    zero = 0 if packed.zero_point is None else packed.zero_point.unsqueeze(-1)
    bound = (
        (-1, 1)
        if isinstance(scheme, TernaryScheme)
        else (-(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1)
    )
    steps = exact.reshape(160, groups, -1) / scale.unsqueeze(-1) + zero
    clamped = steps.clamp(*bound)
    assert not torch.equal(clamped, steps)
    codes = clamped + (clamped.round() - clamped).detach()
    value = ((codes - zero) * scale.unsqueeze(-1)).reshape(160, 192)
    torch.testing.assert_close(value, now, rtol=2e-3, atol=1e-4)
    (value * gradient).sum().backward()
    torch.testing.assert_close(rule.learned["exact"].grad, exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rule.learned["scale"].grad, theta.grad, rtol=5e-3, atol=0.05)


@pytest.mark.parametrize("scheme", SCHEMES[4:], ids=lambda s: s.label)
def test_narrow_floats_are_rounded_anew(scheme: Scheme):
    packed = quantize(weight(), scheme)
    rule = NarrowFloat(packed)
    assert torch.equal(rule.packed().dequantize(), packed.dequantize())
    rule.learned["exact"].data = 3 * weight(6)
    assert torch.equal(rule.packed().dequantize(), quantize(3 * weight(6), scheme).dequantize())
    rule.pull(weight(), weight(7))
    rule.pull(weight(), weight(7))
    assert torch.equal(rule.learned["exact"].grad, 2 * weight(7))
