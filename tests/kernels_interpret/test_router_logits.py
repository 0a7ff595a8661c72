"""The router's product in the kernels against fp64: exact products, sums in fp32, tokens that know nothing of each other.

Shape suffixes: T tokens, E experts, D model width.
"""

from typing import Any

import pytest
import torch
from interpreted import assert_near, normal, poisoned_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagrin.kernels import router_logits_triton
from megagrin.kernels.router_logits import router_logits
from megagrin.kernels.split_backward import inputs_only

# The interpreter computes with numpy, which warns of inf − inf and of NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16 = torch.bfloat16
# Widths and counts on both sides of a block's end; a second block of experts; a second block of tokens in the weight gradient.
SHAPES = [(1, 1, 8), (5, 3, 72), (63, 16, 128), (65, 16, 264), (129, 64, 200), (131, 128, 136), (17, 200, 72), (1030, 5, 40)]


def inputs(n_tokens: int, n_experts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and the gradient of the logits, each column of its own size: cancellation and parts of any magnitude."""
    x_TD = normal(n_tokens, width, seed=1) * torch.logspace(-3, 3, width, dtype=torch.float64)
    w_ED = normal(n_experts, width, seed=2) * torch.logspace(2, -4, width, dtype=torch.float64)
    return x_TD.to(BF16), w_ED.float(), normal(n_tokens, n_experts, seed=3, dtype=torch.float32)


def within(got: Tensor, exact: Tensor, terms: Tensor, bound: float) -> None:
    """Every element within `bound` of the sum of its terms' absolute values."""
    error = float(((got.double() - exact).abs() / terms.clamp_min(1e-300)).max())
    assert error <= bound, f"{error:.2e} > {bound:.2e}"


def fp32_sum(length: int) -> float:
    """Largest error of an fp32 sum of exact products over the sum of their absolute values, in steps of at most 128."""
    # At most three products of 128 terms inside a step, one addition a step outside.
    return 2.0**-24 * (3 * min(length, 128) + length / 64 + 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape: tuple[int, int, int]) -> None:
    """Logits and weight gradient to fp32's sums, for which weights or gradients in fewer than 24 bits would be too coarse; the
    gradient of x rounded once."""
    x_TD, w_ED, dz_TE = inputs(*shape)
    leaves = x_TD.clone().requires_grad_(), w_ED.clone().requires_grad_()
    with poisoned_memory():
        z_TE = router_logits(*leaves)
        z_TE.backward(dz_TE)
    x, w, dz = x_TD.double(), w_ED.double(), dz_TE.double()
    assert (z_TE.dtype, leaves[0].grad.dtype, leaves[1].grad.dtype) == (torch.float32, BF16, torch.float32)
    within(z_TE.detach(), x @ w.T, x.abs() @ w.abs().T, fp32_sum(shape[2]))
    within(leaves[1].grad, dz.T @ x, dz.abs().T @ x.abs(), fp32_sum(shape[0]))
    assert_near(leaves[0].grad, dz @ w)
    rounding = 2.0**-8 * (dz @ w).abs()
    within(leaves[0].grad, dz @ w, 1.01 * rounding + 3 * 2.0**-16 * (dz.abs() @ w.abs()), 1.0)


@pytest.mark.parametrize("shape", [(65, 16, 136), (67, 40, 72)], ids=str)
def test_other_tiles(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of capability 8, which have several blocks of experts sooner."""
    monkeypatch.setattr(router_logits_triton, "_tiles", lambda op, n_experts, major: router_logits_triton._AMPERE[op])
    test_against_fp64(shape)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_bounds_notice_bf16_weights(shape: tuple[int, int, int]) -> None:
    """Weights, or gradients of logits, rounded to bf16 are outside of the bounds above."""
    x, w, dz = (t.double() for t in inputs(*shape))
    rounded_ED, rounded_TE = w.bfloat16().double(), dz.bfloat16().double()
    with pytest.raises(AssertionError):
        within(x @ rounded_ED.T, x @ w.T, x.abs() @ w.abs().T, fp32_sum(shape[2]))
    with pytest.raises(AssertionError):
        within(rounded_TE.T @ x, dz.T @ x, dz.abs().T @ x.abs(), fp32_sum(shape[0]))
    for product in (dz @ rounded_ED, rounded_TE @ w):
        with pytest.raises(AssertionError):
            assert_near(product.to(BF16), dz @ w)


def test_parts_are_exact() -> None:
    """One number that is 1 against 24 bits: logits that are the weights, and a weight gradient that is dz, bit for bit."""
    w_ED = torch.zeros(200, 8)
    w_ED[:, 3] = normal(200, seed=1, dtype=torch.float32) * torch.logspace(-30, 38, 200)
    w_ED[:4, 3] = torch.tensor([0.0, -0.0, 1 + 2.0**-23, -(2.0**127) * (2 - 2.0**-7)])
    x_TD = torch.zeros(3, 8, dtype=BF16)
    x_TD[1, 3] = 1
    z_TE = router_logits(x_TD, w_ED)
    assert torch.equal(z_TE, torch.stack([torch.zeros(200), w_ED[:, 3], torch.zeros(200)]))
    dz_TE = torch.stack([torch.ones(200), w_ED[:, 3], torch.ones(200)])
    dw_ED = router_logits_triton.run_wgrad(dz_TE, x_TD)
    assert torch.equal(dw_ED, w_ED)


def test_a_token_depends_on_nothing_but_itself() -> None:
    """Its logits and its gradient have the same bits beside other tokens and in another block.

    In the same row of it: numpy, which multiplies here, sums its last rows in another order. tests/gpu moves them freely.
    """
    x_TD, w_ED, dz_TE = inputs(192, 16, 264)

    def both(x_TD: Tensor, dz_TE: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x_TD.clone().requires_grad_()
        z_TE = router_logits(leaf, w_ED)
        return z_TE.detach(), torch.autograd.grad(z_TE, leaf, dz_TE)[0]

    whole = both(x_TD, dz_TE)
    x_other, dz_other = normal(256, 264, seed=5, dtype=BF16), normal(256, 16, seed=6, dtype=torch.float32)
    x_other[130:190], dz_other[130:190] = x_TD[2:62], dz_TE[2:62]
    for got, expected in zip(both(x_other, dz_other), whole, strict=True):
        assert torch.equal(got[130:190], expected[2:62])
        assert not torch.equal(got[:60], expected[:60])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_number_stays_where_it_is(value: float) -> None:
    """Of a token: its own logits; of a weight: its expert's; of a logit's gradient: its token's x and its expert's weights."""
    x_TD, w_ED, dz_TE = inputs(150, 16, 264)
    x_bad, w_bad, dz_bad = x_TD.clone(), w_ED.clone(), dz_TE.clone()
    x_bad[77, 5] = w_bad[2, 7] = dz_bad[70, 3] = value
    tokens, experts = torch.arange(150), torch.arange(16)
    for got, expected, own in (
        (router_logits(x_bad, w_ED), router_logits(x_TD, w_ED), (tokens == 77)[:, None].expand(-1, 16)),
        (router_logits(x_TD, w_bad), router_logits(x_TD, w_ED), (experts == 2).expand(150, -1)),
        *(
            (run(dz_bad, other), run(dz_TE, other), own[:, None].expand(-1, 264))
            for run, other, own in (
                (router_logits_triton.run_dgrad, w_ED, tokens == 70),
                (router_logits_triton.run_wgrad, x_TD, experts == 3),
            )
        ),
    ):
        assert not got[own].isfinite().any()
        assert torch.equal(got[~own], expected[~own])


def test_weight_gradient_over_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits every time; other blocks of tokens change the last ones only."""
    x_TD, _, dz_TE = inputs(1030, 5, 40)
    whole = router_logits_triton.run_wgrad(dz_TE, x_TD)
    assert torch.equal(router_logits_triton.run_wgrad(dz_TE, x_TD), whole)
    monkeypatch.setattr(router_logits_triton, "_split_tokens", lambda n_experts: 2048)
    together = router_logits_triton.run_wgrad(dz_TE, x_TD)
    assert not torch.equal(together, whole)
    terms = dz_TE.double().abs().T @ x_TD.double().abs()
    within(together, whole.double(), terms, 2 * fp32_sum(1030))


@pytest.mark.parametrize(("n_tokens", "n_experts"), [(0, 3), (1, 3), (4, 3)])
def test_nothing_to_do_and_strided_inputs(n_tokens: int, n_experts: int) -> None:
    """One token is contiguous whatever its rows' pitch."""
    x_TD, w_ED, dz_TE = inputs(n_tokens, n_experts, 24)
    wide_TD = torch.cat([x_TD, x_TD, x_TD[:, :1]], 1)
    leaf, weight = wide_TD[:, 12:36].requires_grad_(), w_ED.t().contiguous().t().requires_grad_()
    z_TE = router_logits(leaf, weight)
    dx, dw = torch.autograd.grad(z_TE, (leaf, weight), dz_TE.t().contiguous().t())
    x, w = leaf.detach().double(), w_ED.double()
    assert (z_TE.shape, dx.shape, dw.shape) == ((n_tokens, n_experts), (n_tokens, 24), (n_experts, 24))
    assert_near(z_TE, x @ w.T)
    assert_near(dw, dz_TE.double().T @ x)
    assert_near(dx, dz_TE.double() @ w)


class _Made(TorchDispatchMode):
    """What operators make with as many elements as a tensor has and more bytes."""

    def __init__(self, narrow: Tensor) -> None:
        super().__init__()
        self.narrow, self.wide = narrow, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() == self.narrow.numel() and leaf.itemsize > self.narrow.itemsize:
                self.wide.append(str(func))
        return out


def test_tokens_are_never_widened_in_memory() -> None:
    x_TD, w_ED, dz_TE = inputs(33, 5, 72)
    with _Made(x_TD) as made:
        router_logits_triton.run_logits(x_TD, w_ED)
        router_logits_triton.run_dgrad(dz_TE, w_ED)
        router_logits_triton.run_wgrad(dz_TE, x_TD)
    assert made.wide == []
    with made:
        torch.nn.functional.linear(x_TD.float(), w_ED)
    assert made.wide == ["aten._to_copy.default"]


def test_backward_in_two_halves() -> None:
    """Inputs first, weights later, nothing in both: the bits of one pass."""
    x_TD, w_ED, dz_TE = inputs(33, 5, 72)
    leaves = x_TD.requires_grad_(), w_ED.requires_grad_()
    z_TE = router_logits(*leaves)
    once = torch.autograd.grad(z_TE, leaves, dz_TE, retain_graph=True)
    with inputs_only():
        dx, no_dw = torch.autograd.grad(z_TE, leaves, dz_TE, retain_graph=True, allow_unused=True)
    no_dx, dw = torch.autograd.grad(z_TE, leaves, dz_TE, allow_unused=True)
    assert (no_dx, no_dw) == (None, None)
    assert torch.equal(dx, once[0])
    assert torch.equal(dw, once[1])
