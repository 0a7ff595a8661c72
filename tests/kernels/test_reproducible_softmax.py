"""The softmax that draws depend on: accurate, and the bits that IEEE 754 prescribes, by a second implementation in numpy."""

import hashlib

import numpy as np
import pytest
import torch

from megagrin.kernels.sparsemixer import reproducible_exp, reproducible_softmax

F = np.float32


def numpy_exp(x: np.ndarray) -> np.ndarray:
    """The same operations one by one; numpy neither contracts nor reorders them."""
    x = np.maximum(x, F(-88))
    exponent = np.floor(x * F(1.4426950408889634) + F(0.5))
    rest = (x - exponent * F(0.693359375)) + exponent * F(2.12194440054690583e-4)
    y = rest * F(1 / 5040) + F(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        y = y * rest + F(coefficient)
    return y * ((exponent.astype(np.int32) + 127) << 23).view(np.float32)


def arguments() -> torch.Tensor:
    """Numbers ≤ 0: dense near zero, over the whole range, halfway between two exponents, and beyond the end."""
    generator = torch.Generator().manual_seed(0)
    halves = -(torch.arange(127) + 0.5) * 0.6931471805599453
    parts = [torch.rand(20_000, generator=generator) * -scale for scale in (1e-6, 0.4, 5, 100)]
    near = [torch.nextafter(halves, torch.tensor(target)) for target in (0.0, -torch.inf)]
    return torch.cat([*parts, halves, *near, torch.tensor([0.0, -0.0, -1e-45, -87.0, -88.0, -200.0, -3e38, -torch.inf])])


def test_exponential_is_accurate() -> None:
    x = arguments()
    exact = x.double().exp()
    got = reproducible_exp(x).double()
    normal = x >= -87
    assert ((got - exact).abs() / exact)[normal].max() < 2 * 2.0**-24  # two halves of a unit in the last place
    assert (got[~normal] < 2.0**-125).all()
    assert got[x == 0].eq(1).all()
    assert reproducible_exp(torch.tensor([-torch.inf, -100.0])).tolist() == [0.0, 0.0]
    assert reproducible_exp(torch.tensor([torch.nan])).isnan().all()


def test_bits_of_the_exponential() -> None:
    x = arguments()
    assert np.array_equal(reproducible_exp(x).numpy().view(np.int32), numpy_exp(x.numpy()).view(np.int32))


@pytest.mark.parametrize("n_experts", [1, 5, 16, 128])
def test_bits_of_the_softmax(n_experts: int) -> None:
    z = torch.randn(300, n_experts, generator=torch.Generator().manual_seed(1)) * 4
    z[::5, : n_experts // 2] = -torch.inf
    gap = z - z.amax(-1, keepdim=True)
    e = numpy_exp(gap.numpy())
    total = np.array([[sum(int(value) for value in row)] for row in e.astype(np.float64) * 2**30])
    expected = e * (F(1) / (total.astype(np.float32) * F(2.0**-30)))
    got = reproducible_softmax(gap)
    assert np.array_equal(got.numpy().view(np.int32), expected.view(np.int32))
    torch.testing.assert_close(got.double(), torch.softmax(gap.double(), -1), rtol=5e-7, atol=1e-30)
    # In any order of the experts and however the rows are batched.
    order = torch.randperm(n_experts, generator=torch.Generator().manual_seed(2))
    assert torch.equal(reproducible_softmax(gap[:, order]), got[:, order])
    assert torch.equal(torch.cat([reproducible_softmax(row) for row in gap.split(7)]), got)


def test_bits_are_those_of_every_machine() -> None:
    """A fixed digest: a machine, thread count or vector unit that computes other bits would draw other experts."""
    x = -torch.arange(1 << 16, dtype=torch.int32).to(torch.float32) * 2.0**-10
    digest = hashlib.sha256(reproducible_exp(x).numpy().tobytes()).hexdigest()
    assert digest[:16] == "81e403cd535b273d"
