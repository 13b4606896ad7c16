"""Orthogonal matrices to turn a model's channels by: Hadamard where one of that size is known, else drawn at random.

A Hadamard matrix spreads every channel evenly over all others: its entries are ±1/√n. Sylvester's doubling gives powers
of two, Paley's constructions sizes q + 1 and 2 (q + 1) for primes q, and products of two sizes their Kronecker product;
576 = 12 · 48 is made so. With random signs it is QuaRot's rotation (https://arxiv.org/abs/2404.00456).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def rotation(n: int, *, seed: int) -> Tensor:
    """A random orthogonal [n, n] in float64: Hadamard with random signs, or uniform where no Hadamard is known."""
    generator = torch.Generator().manual_seed(seed)
    plan = hadamard_plan(n)
    if plan is None:
        return uniform_orthogonal(n, generator)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * _built(plan) / math.sqrt(n)


def rotation_around_ones(n: int, *, seed: int) -> Tensor:
    """A random orthogonal [n, n] in float64 that leaves the vector of ones where it is.

    What a LayerNorm subtracts, the mean, stays 0 under it. A Householder reflection takes the first axis to the ones;
    the other n - 1 are turned uniformly.
    """
    generator = torch.Generator().manual_seed(seed)
    turned = torch.eye(n, dtype=torch.float64)
    turned[1:, 1:] = uniform_orthogonal(n - 1, generator)
    mirror = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    mirror[0] -= 1
    basis = torch.eye(n, dtype=torch.float64)
    if n > 1:
        basis -= 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    return basis @ turned @ basis.T


def uniform_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal [n, n] drawn uniformly: the Q of a Gaussian matrix, its signs made unique."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    unique: Tensor = q * r.diagonal().sign()
    return unique


@cache
def hadamard_plan(n: int) -> tuple[str | int, ...] | None:
    """How a Hadamard matrix of size ``n`` is made; None where no construction here gives one.

    ``(1,)``, ``("paley1", q)``, ``("paley2", q)`` or ``("product", a, b)``.
    """
    if n == 1:
        return (1,)
    if n == 2:
        return ("product", 2, 1)
    if n < 1 or n % 4:
        return None
    if (n - 1) % 4 == 3 and _is_prime(n - 1):
        return ("paley1", n - 1)
    if (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return ("paley2", n // 2 - 1)
    for a in (2, *range(4, math.isqrt(n) + 1, 4)):
        if n % a == 0 and hadamard_plan(n // a) is not None and hadamard_plan(a) is not None:
            return ("product", a, n // a)
    return None


def _built(plan: tuple[str | int, ...]) -> Tensor:
    """The matrix of ±1."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if plan[0] == "paley1":
        return _paley1(int(plan[1]))
    if plan[0] == "paley2":
        return _paley2(int(plan[1]))
    if plan[0] == "product":
        left, right = (int(size) for size in plan[1:])
        first = pair if left == 2 else _sized(left)
        return torch.kron(first, _sized(right))
    return torch.ones(1, 1, dtype=torch.float64)


def _sized(n: int) -> Tensor:
    plan = hadamard_plan(n)
    assert plan is not None, f"no Hadamard matrix of size {n}"
    return _built(plan)


def _paley1(q: int) -> Tensor:
    """Size q + 1 for a prime q = 3 mod 4: the identity plus a skew matrix of residues."""
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0] = 1, -1
    bordered[1:, 1:] = _residues(q)
    return bordered + torch.eye(q + 1, dtype=torch.float64)


def _paley2(q: int) -> Tensor:
    """Size 2 (q + 1) for a prime q = 1 mod 4: every residue becomes a 2 × 2 block."""
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 0] = 1, 1
    bordered[1:, 1:] = _residues(q)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)


def _residues(q: int) -> Tensor:
    """[q, q]: +1 where row - column is a square modulo q, -1 where it is not, 0 on the diagonal."""
    squares = {value * value % q for value in range(1, q)}
    symbol = torch.tensor([0.0, *(1.0 if value in squares else -1.0 for value in range(1, q))]).double()
    index = torch.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
