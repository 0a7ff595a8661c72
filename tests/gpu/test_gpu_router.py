"""The router's product on CUDA against fp64.

Shape suffixes: T tokens, E experts, D model width.
"""

import pytest
import torch
from exact import roundings
from torch import Tensor

from megagrin.kernels.router_logits import router_logits
from megagrin.moe.router import Draws, Router, RouterConfig

SHAPES = [(1, 3, 8), (63, 16, 72), (4097, 16, 4096), (1000, 128, 2048), (300, 64, 1032), (129, 200, 264)]
BF16 = torch.bfloat16


def inputs(n_tokens: int, n_experts: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, w_ED = torch.randn(n_tokens, width, device="cuda"), 0.02 * torch.randn(n_experts, width, device="cuda")
    return x_TD.to(dtype), w_ED, torch.randn(n_tokens, n_experts, device="cuda")


def distance(got: Tensor, exact: Tensor, terms: Tensor) -> float:
    """Largest error over the sum of the terms' absolute values, in units of fp32's rounding."""
    return float(((got.double() - exact).abs() / terms.clamp_min(1e-300)).max()) * 2.0**24


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """bf16 weights would read 2^15/√(terms), TF32 2^13/√(terms): 128 and more. The bound is that of the interpreter's tests, half
    a unit an addition, doubled: tensor cores truncate."""
    x_TD, w_ED, dz_TE = inputs(*shape, dtype)
    leaves = x_TD.clone().requires_grad_(), w_ED.clone().requires_grad_()
    z_TE = router_logits(*leaves)
    dx, dw = torch.autograd.grad(z_TE, leaves, dz_TE)
    assert (z_TE.dtype, dx.dtype, dw.dtype) == (torch.float32, dtype, torch.float32)
    x, w, dz = x_TD.double(), w_ED.double(), dz_TE.double()
    assert distance(z_TE.detach(), x @ w.T, x.abs() @ w.abs().T) < 48
    assert distance(dw, dz.T @ x, dz.abs().T @ x.abs()) < 48
    assert roundings(dx, dz @ w, dtype) < 1.1
    for again, first in zip(torch.autograd.grad(router_logits(*leaves), leaves, dz_TE), (dx, dw), strict=True):
        assert torch.equal(again, first)


def test_a_token_depends_on_nothing_but_itself() -> None:
    """Its logits and its gradient have the same bits alone, elsewhere in the batch and beside a broken token."""
    x_TD, w_ED, dz_TE = inputs(1000, 16, 4096)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x_TD[rows].requires_grad_()
        z_TE = router_logits(leaf, w_ED)
        return z_TE.detach(), torch.autograd.grad(z_TE, leaf, dz_TE[rows])[0]

    everything = torch.arange(1000, device="cuda")
    whole = both(everything)
    for rows in (torch.randperm(1000, device="cuda"), everything[999:], everything[3:70]):
        for got, expected in zip(both(rows), whole, strict=True):
            assert torch.equal(got, expected[rows])
    for value in (torch.nan, torch.inf):
        x_TD[77, 5] = value
        z_TE, dx = both(everything)
        assert not z_TE[77].isfinite().any()
        assert torch.equal(z_TE[everything != 77], whole[0][everything != 77])
        assert torch.equal(dx, whole[1])


def test_router_keeps_and_makes_no_wide_tokens() -> None:
    """Peak memory of forward and backward: less than one fp32 copy of the tokens above what stays."""
    n_tokens, width = 16384, 4096
    router = Router(width, 16, 2, 0, RouterConfig()).cuda()
    torch.nn.init.normal_(router.weight, std=0.02)
    x_TD = torch.randn(n_tokens, width, device="cuda", dtype=BF16, requires_grad=True)
    draws = Draws(0, 0, torch.arange(n_tokens, device="cuda"))
    router(x_TD, draws)[1].weight_TK.sum().backward()
    router.zero_grad()
    x_TD.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, routing = router(x_TD, draws)
    assert torch.cuda.memory_allocated() - before < x_TD.nbytes // 8
    routing.weight_TK.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < x_TD.nbytes * 3 // 2
