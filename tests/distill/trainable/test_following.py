"""Scales and exact weights behind stored forms: their gradients against autograd's, and values as a reload gives them."""

import pytest
import torch

from core.distill.trainable.behind_rounding import NarrowFloat, OnGrid, behind_rounding
from core.distill.trainable.exact_weight import LowRankUpdate, Whole
from core.distill.trainable.on_grid import nearest, step_of
from core.distill.trainable.scales_and_norms import LearnedScales
from core.numerics.packed import PackedTensor
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


def bounds(scheme: Scheme) -> tuple[int, int]:
    if isinstance(scheme, TernaryScheme):
        return -1, 1
    return -(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1


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
    rule = OnGrid(packed, Whole(packed.dequantize().float()))
    assert torch.equal(rule.packed().codes, packed.codes), "it begins at what is stored"
    rule.learned["exact"].data += 0.7 * weight(4)  # some of it beyond the grid
    now, gradient = rule.packed().dequantize().float(), weight(5)
    rule.pull(now, gradient)

    exact = rule.learned["exact"].detach().clone().requires_grad_()
    theta = torch.zeros(packed.scale.numel(), requires_grad=True)
    groups = 1 if packed.scale.shape[-1] == 1 else packed.scale.shape[-1]
    scale = packed.scale.float() * theta.exp().view(packed.scale.shape)
    zero = 0 if packed.zero_point is None else packed.zero_point.unsqueeze(-1)
    bound = bounds(scheme)
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
    rule = NarrowFloat(packed, Whole(packed.dequantize().float()))
    assert torch.equal(rule.packed().dequantize(), packed.dequantize())
    rule.learned["exact"].data = 3 * weight(6)
    assert torch.equal(rule.packed().dequantize(), quantize(3 * weight(6), scheme).dequantize())
    rule.pull(weight(), weight(7))
    rule.pull(weight(), weight(7))
    assert torch.equal(rule.learned["exact"].grad, 2 * weight(7))


def low_rank(packed: PackedTensor) -> LowRankUpdate:
    start, drawn = packed.dequantize().float(), torch.Generator().manual_seed(8)
    return LowRankUpdate(start, step_of(packed), rank=4, alpha=8.0, drawn=drawn)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_a_low_rank_update_begins_with_nothing(scheme: Scheme):
    packed = quantize(weight(), scheme)
    rule = behind_rounding(packed, low_rank(packed))
    assert torch.equal(rule.packed().dequantize(), packed.dequantize())
    rule.learned["lora_B"].data += torch.randn(160, 4, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(rule.packed().dequantize(), packed.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=lambda s: s.label)
def test_a_low_rank_update_counts_in_steps(scheme: Scheme):
    """One update, value by value: codes are those before and the product, rounded and held within the codes."""
    packed = quantize(weight(), scheme)
    rule = behind_rounding(packed, low_rank(packed))
    a, b = rule.learned["lora_A"], rule.learned["lora_B"]
    b.data += torch.randn(160, 4, generator=torch.Generator().manual_seed(9))
    low, high = bounds(scheme)
    product = (8.0 / 4) * b.detach() @ a.detach()
    gradient, within = weight(5), torch.zeros(160, 192)
    wanted = torch.zeros(160, 192)
    for row in range(0, 160, 40):
        for column in range(192):
            at = float(packed.codes[row, column]) + float(product[row, column])
            wanted[row, column] = min(max(round(at), low), high)
            within[row, column] = low <= at <= high
    now = rule.packed()
    apart = (now.codes[::40].float() - wanted[::40]).abs()
    assert apart.max() <= 1
    assert apart.mean() < 0.01, (
        "but for ties: stored weights are 16-bit numbers, a little beside the middle of their codes"
    )
    rule.pull(now.dequantize().float(), gradient)
    groups = packed.scale.float().expand(160, -1)
    step = groups.repeat_interleave(192 // groups.shape[-1], -1)
    by_hand = (gradient * step * within * 2.0)[::40] @ a.detach().T
    torch.testing.assert_close(b.grad[::40], by_hand, rtol=0.02, atol=0.02 * float(by_hand.abs().max()))


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[8]], ids=lambda s: s.label)
def test_both_factors_get_the_gradient_of_their_product(scheme: Scheme):
    """Against autograd, on stacked experts."""
    packed = quantize(torch.stack([weight(), weight(1)]), scheme)
    update = low_rank(packed)
    update.learned["lora_B"].data += 0.3
    factors = [update.learned[name].detach().clone().requires_grad_() for name in ("lora_B", "lora_A")]
    value = packed.dequantize().float() + step_of(packed) * (2.0 * factors[0] @ factors[1])
    torch.testing.assert_close(update.value(), value.detach())
    gradient = torch.stack([weight(2), weight(3)])
    (value * gradient).sum().backward()
    update.pull(gradient)
    for name, factor in zip(("lora_B", "lora_A"), factors, strict=True):
        torch.testing.assert_close(update.learned[name].grad, factor.grad, rtol=1e-4, atol=1e-4)
