"""What the interpreter's tests share: odd counts, fp64 numbers, memory that starts as NaN, distances with meaning."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

torch.set_num_threads(1)

COUNTS = [
    [5],
    [0],
    [0, 1, 63, 65],
    [65, 0, 0, 1],
    [0, 0, 97, 0],
    [1] * 16,
    [(7 * e) % 3 for e in range(128)],
]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert_of_row(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN (integers with their maximum): what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_near(got: Tensor | None, exact: Tensor | None, tolerance: float = 2e-6) -> None:
    """fp32: largest difference over the largest exact value (1 where that is zero).

    bf16: the norm of the difference over the norm of what rounding the exact value to bf16 alone costs. A result that is rounded
    once reads 1; truncation, as the interpreter's own casts do, reads 2.
    """
    assert got is not None
    assert exact is not None
    got, exact = got.detach(), exact.detach()
    assert got.shape == exact.shape
    if not exact.numel():
        return
    if got.dtype == torch.bfloat16:
        once = float((exact.bfloat16().double() - exact).norm())
        error, bound = float((got.double() - exact).norm()), 1.1 * once
    else:
        error, bound = float((got.double() - exact).abs().max()), tolerance * (float(exact.abs().max()) or 1.0)
    assert error <= bound, f"{error:.2e} > {bound:.2e}"
