"""Grouped products and the expert MLP on CUDA against fp64 with the same rounding points, on odd shapes.

Shape suffixes: R routed rows, E experts, N and K features, D model width, F expert width.
"""

import pytest
import torch
from exact import expert_mlp as exact_mlp
from exact import per_expert, per_row, relative, rounded, roundings
from torch import Tensor

from megagrin.kernels import moe_mlp
from megagrin.kernels.grouped_gemm import k_grouped_wgrad, m_grouped, m_grouped_dgrad
from megagrin.kernels.split_backward import inputs_only

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = [[5], [0, 1, 63, 65], [0, 0, 300, 0], [129, 127, 0, 128], [(37 * e) % 50 for e in range(128)], [2000, 3, 0, 0]]
# Features: a tile and less, ragged ends of tiles, and a width that tensor descriptors cannot address.
WIDTHS = [(256, 128), (136, 72), (24, 264), (30, 50)]
# Every new number of experts or kind of width is a compilation of a second or two: not the whole product of all.
PRODUCTS = [
    *((counts, (136, 72), torch.bfloat16) for counts in COUNTS),
    *((COUNTS[1], widths, torch.bfloat16) for widths in WIDTHS if widths != (136, 72)),
    *((counts, widths, dtype) for counts in COUNTS[1:3] for widths in WIDTHS[1:] for dtype in DTYPES[1:]),
]
# In roundings of the result: sums in fp32 add next to nothing; fp32 itself is compared by a relative error.
MOST_ROUNDINGS, FP32_ERROR = 1.1, 2e-6


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda", dtype=torch.float64)).to(dtype)


def assert_close(got: Tensor, exact: Tensor, what: str, slack: float = 1.0) -> None:
    assert got.isfinite().all(), what
    if got.dtype == torch.float32:
        assert relative(got, exact) < FP32_ERROR * slack, (what, relative(got, exact))
    elif exact.any():
        assert roundings(got, exact, got.dtype) < MOST_ROUNDINGS * slack, (what, roundings(got, exact, got.dtype))
    else:
        assert not got.any(), what


def addressable(dtype: torch.dtype, *widths: int) -> bool:
    """Rows of whole 16 bytes."""
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


@pytest.mark.parametrize(("counts", "widths", "dtype"), PRODUCTS, ids=str)
def test_grouped_products(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = widths
    rows, counts_E = sum(counts), torch.tensor(counts, device="cuda")
    x, w, dy = normal(rows, k, dtype=dtype), normal(len(counts), n, k, dtype=dtype), normal(rows, n, dtype=dtype)
    x64, w64, dy64 = x.double(), w.double(), dy.double()
    assert_close(m_grouped(x, w, counts_E), per_row(x64, w64, counts), "forward")
    assert_close(m_grouped_dgrad(dy, w, counts_E), per_row(dy64, w64.transpose(1, 2), counts), "dgrad")
    exact = per_expert(dy64, x64, counts)
    assert_close(k_grouped_wgrad(dy, x, counts_E), exact, "wgrad")
    wide = k_grouped_wgrad(dy, x, counts_E, out_dtype=torch.float32)
    # Widths that tensor descriptors cannot address take torch's products, whose sums are rounded on the way to fp32.
    kept = addressable(dtype, n, k)
    assert wide.dtype == torch.float32
    if kept:
        # Tensor cores cut off what falls below the sum's last bit, 2^-24, in each of rows / 16 additions.
        slack = max(1.0, rows / 16 * 2.0**-24 / FP32_ERROR)
        assert_close(wide, exact, "wgrad in fp32", slack)
    else:
        assert relative(wide, exact) < 5e-3
    start = torch.randn_like(wide)
    into = start.clone()
    k_grouped_wgrad(dy, x, counts_E, accumulate_into=into)
    if kept:
        assert_close(into, exact + start.double(), "wgrad added", slack)
    else:
        assert relative(into, exact + start.double()) < 5e-3
    for expert, count in enumerate(counts):
        assert count or not wide[expert].any(), f"idle expert {expert} has a gradient"


def test_weights_beyond_31_bits() -> None:
    """Weights and their gradient of more than 2^31 numbers: the last expert lies where a 32-bit offset would wrap."""
    n_experts, n, k, rows = 128, 4352, 4096, 65
    w = torch.empty(n_experts, n, k, device="cuda", dtype=torch.bfloat16)
    assert w[-1].storage_offset() > 1 << 31
    w[-1] = normal(n, k, dtype=torch.bfloat16)
    counts_E = torch.tensor([0] * (n_experts - 1) + [rows], device="cuda")
    x, dy = normal(rows, k, dtype=torch.bfloat16), normal(rows, n, dtype=torch.bfloat16)
    x64, w64, dy64 = x.double(), w[-1].double(), dy.double()
    assert_close(m_grouped(x, w, counts_E), x64 @ w64.T, "forward")
    assert_close(m_grouped_dgrad(dy, w, counts_E), dy64 @ w64, "dgrad")
    dw = k_grouped_wgrad(dy, x, counts_E)
    assert_close(dw[-1], dy64.T @ x64, "wgrad")
    assert not dw[-2].any()


@pytest.mark.parametrize("own_backward_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[0, 1, 63, 65], [300, 0, 17, 0]], ids=str)
def test_expert_mlp(counts: list[int], dtype: torch.dtype, own_backward_weight: bool) -> None:
    rows, d, f = sum(counts), 136, 72
    x, dy = normal(rows, d, dtype=dtype), normal(rows, d, dtype=dtype)
    gate_up, down = normal(len(counts), 2 * f, d, dtype=dtype, scale=0.2), normal(len(counts), d, f, dtype=dtype, scale=0.2)
    v_R, b_R = torch.rand(rows, device="cuda") + 0.2, torch.rand(rows, device="cuda") + 0.2
    leaves = [t.requires_grad_() for t in (x, gate_up, down, v_R)]
    y = moe_mlp.expert_mlp(*leaves, torch.tensor(counts, device="cuda"), b_R if own_backward_weight else None)
    gradients = torch.autograd.grad(y, leaves, dy)
    inputs = [t.detach().double() for t in (x, gate_up, down, v_R, b_R if own_backward_weight else v_R, dy)]
    exact = exact_mlp(*inputs, counts, dtype)
    for name, got in zip(exact, (y.detach(), *gradients), strict=True):
        if name == "dv":
            assert relative(got, exact[name]) < 1e-4, (name, relative(got, exact[name]))
        else:
            # An inner value beside a rounding boundary may round the other way: a few flips. In fp32, sigmoid is approximate.
            assert_close(got, exact[name], name, slack=1.15 if got.dtype != torch.float32 else 5.0)


def test_expert_mlp_backward_in_two_halves() -> None:
    """Also across autograd's own thread: gradients of inputs first, those of weights later, the bits of one pass."""
    counts, d, f = [64, 0, 65], 136, 72
    x, dy = normal(129, d, dtype=torch.bfloat16), normal(129, d, dtype=torch.bfloat16)
    weights = normal(3, 2 * f, d, dtype=torch.float32, scale=0.2), normal(3, d, f, dtype=torch.float32, scale=0.2)
    leaves = [t.requires_grad_() for t in (x, *weights, torch.rand(129, device="cuda"))]
    y = moe_mlp.expert_mlp(*leaves, torch.tensor(counts, device="cuda"))
    once = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with inputs_only():
        dx, *none, dv_R = torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)
    no_dx, d_up, d_down, no_dv = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    assert [*none, no_dx, no_dv] == [None] * 4
    for half, whole in zip((dx, d_up, d_down, dv_R), once, strict=True):
        assert torch.equal(half, whole)


def test_the_tolerance_notices_a_moved_rounding_point() -> None:
    """Weight after the down product instead of before: more roundings than the bound of `test_expert_mlp` allows."""
    counts, d, f, dtype = [64, 65], 136, 72, torch.bfloat16
    x, gate_up = normal(129, d, dtype=dtype).double(), normal(2, 2 * f, d, dtype=dtype, scale=0.2).double()
    down, v_R = normal(2, d, f, dtype=dtype, scale=0.2).double(), torch.rand(129, device="cuda").double() + 0.2
    exact = exact_mlp(x, gate_up, down, v_R, v_R, torch.zeros_like(x), counts, dtype)["y"]
    ones = torch.ones_like(v_R)
    after = rounded(exact_mlp(x, gate_up, down, ones, ones, torch.zeros_like(x), counts, dtype)["y"] * v_R[:, None], dtype)
    assert roundings(after, exact, dtype) > MOST_ROUNDINGS * 1.15


def test_float32_masters_get_unrounded_gradients() -> None:
    """fp32 weights beside bf16 rows: cast inside, and the gradient is the fp32 sum, not a bf16 number."""
    counts, d, f = [70, 0, 59], 128, 64
    x, dy = normal(129, d, dtype=torch.bfloat16), normal(129, d, dtype=torch.bfloat16)
    masters = [normal(3, 2 * f, d, dtype=torch.float32).requires_grad_(), normal(3, d, f, dtype=torch.float32).requires_grad_()]
    v_R, counts_E = torch.rand(129, device="cuda") + 0.2, torch.tensor(counts, device="cuda")
    gradients = torch.autograd.grad(moe_mlp.expert_mlp(x, *masters, v_R, counts_E), masters, dy)
    narrow = [w.detach().bfloat16().double() for w in masters]
    exact = exact_mlp(x.double(), *narrow, v_R.double(), v_R.double(), dy.double(), counts, torch.bfloat16)
    for name, got in zip(("d gate_up", "d down"), gradients, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, exact[name]) < 1e-3, name
        assert (got != got.bfloat16().float()).any(), f"{name} was rounded to bf16"


class _Sum:
    """A main gradient, see `moe_mlp.MainGrad`."""

    def __init__(self, weight: Tensor) -> None:
        self.parameter = weight
        self._total: Tensor | None = None

    def total(self) -> Tensor | None:
        return self._total

    def keep(self, total: Tensor) -> None:
        self._total = total

    def for_autograd(self, gradient: Tensor) -> Tensor:
        return gradient


def test_gradients_of_micro_batches_are_added_in_memory() -> None:
    """On kept bf16 weights, from autograd's own thread: the fp32 sum of what each micro-batch gives, the same bits every time."""
    d, f = 136, 72
    masters = [normal(3, 2 * f, d, dtype=torch.float32).requires_grad_(), normal(3, d, f, dtype=torch.float32).requires_grad_()]
    copies = masters[0].detach().bfloat16(), masters[1].detach().bfloat16()
    parts = []
    for counts in ([70, 0, 59], [0, 0, 0], [1, 200, 0]):
        x, dy = (normal(sum(counts), d, dtype=torch.bfloat16) for _ in range(2))
        parts.append((x, torch.rand(sum(counts), device="cuda") + 0.2, torch.tensor(counts, device="cuda"), dy))
    expected = [torch.zeros_like(w) for w in masters]
    for x, v_R, counts_E, dy in parts:
        y = moe_mlp.expert_mlp(x, *masters, v_R, counts_E)
        for total, gradient in zip(expected, torch.autograd.grad(y, masters, dy), strict=True):
            total += gradient
    totals = []
    for _ in range(5):
        sums = _Sum(masters[0]), _Sum(masters[1])
        for x, v_R, counts_E, dy in parts:
            weights = [w.detach() for w in masters]
            moe_mlp.expert_mlp(x, *weights, v_R, counts_E, copies=copies, main_grads=sums).backward(dy)
        totals.append([total.total() for total in sums])
    for got, exact in zip(totals[0], expected, strict=True):
        assert relative(got, exact) < FP32_ERROR
    for again in totals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, totals[0], strict=True))
