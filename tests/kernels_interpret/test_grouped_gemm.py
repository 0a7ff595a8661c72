"""The grouped products' kernels against fp64, on rows and features that do not divide the blocks.

Shape suffixes: R routed rows, E experts, N output features, K input features.
"""

import pytest
import torch
from interpreted import COUNTS, assert_near, expert_of_row, normal, poisoned_memory

from megagrin.kernels.grouped_gemm import grouped_gemm, k_grouped_wgrad, m_grouped

# Of many experts, which take seconds each in the interpreter, only features that end inside a tile on both sides.
CASES = [
    pytest.param(counts, n, k, id=f"{sum(counts)}rows{len(counts)}experts-{n}-{k}")
    for counts in COUNTS
    for n, k in ((72, 40), (64, 64), (8, 136))
    if (n, k) == (72, 40) or len(counts) <= 16
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("counts", "n", "k"), CASES)
def test_products_and_gradients(counts: list[int], n: int, k: int, dtype: torch.dtype) -> None:
    rows = sum(counts)
    x_RK, dy_RN = normal(rows, k, seed=1, dtype=dtype), normal(rows, n, seed=2, dtype=dtype)
    w_ENK = normal(len(counts), n, k, seed=3, dtype=dtype)
    ours = [x_RK.clone().requires_grad_(), w_ENK.clone().requires_grad_()]
    with poisoned_memory():
        y_RN = grouped_gemm(*ours, torch.tensor(counts))
        y_RN.backward(dy_RN)
    plain = [x_RK.double().requires_grad_(), w_ENK.double().requires_grad_()]
    expected_RN = torch.einsum("rk,rnk->rn", plain[0], plain[1][expert_of_row(counts)])
    expected_RN.backward(dy_RN.double())
    assert_near(y_RN, expected_RN)
    for a, b in zip(ours, plain, strict=True):
        assert_near(a.grad, b.grad)
    for expert, count in enumerate(counts):
        assert count or not ours[1].grad[expert].any(), "an idle expert's gradient is zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wgrad_in_fp32_and_into_main_gradients(dtype: torch.dtype) -> None:
    counts = [0, 1, 63, 65]
    dy_RN, x_RK, main_ENK = normal(129, 72, seed=1, dtype=dtype), normal(129, 40, seed=2, dtype=dtype), normal(4, 72, 40, seed=3)
    hot_RE = torch.nn.functional.one_hot(expert_of_row(counts), 4).double()
    exact = torch.einsum("re,rn,rk->enk", hot_RE, dy_RN.double(), x_RK.double())
    with poisoned_memory():
        wide = k_grouped_wgrad(dy_RN, x_RK, torch.tensor(counts), torch.float32)
    assert wide.dtype == torch.float32
    assert_near(wide, exact, 1e-6)  # also from bf16 operands: their products are exact in fp32
    into = main_ENK.float()
    assert k_grouped_wgrad(dy_RN, x_RK, torch.tensor(counts), accumulate_into=into) is into
    assert_near(into, exact + main_ENK.float().double(), 1e-6)
    nothing = k_grouped_wgrad(dy_RN[:0], x_RK[:0], torch.zeros(4, dtype=torch.int64), accumulate_into=into.clone())
    assert torch.equal(nothing, into)


def test_a_neighbour_s_nan_stays_there() -> None:
    """Tiles overlap the next expert's rows, and blocks of features the next expert's weights: neither may leak."""
    counts = torch.tensor([5, 7, 3])
    x_RK, w_ENK = normal(15, 40, seed=1, dtype=torch.float32), normal(3, 72, 40, seed=2, dtype=torch.float32)
    x_RK[5:12], w_ENK[1] = torch.nan, torch.nan
    leaves = [x_RK.requires_grad_(), w_ENK.requires_grad_()]
    y_RN = grouped_gemm(*leaves, counts)
    dy_RN = torch.ones(15, 72)
    dy_RN[5:12] = torch.nan
    y_RN.backward(dy_RN)
    others = [0, 1, 2, 3, 4, 12, 13, 14]
    for clean in (y_RN[others], leaves[0].grad[others], leaves[1].grad[[0, 2]]):
        assert torch.isfinite(clean).all()
    assert y_RN[5:12].isnan().all()


def test_features_that_descriptors_cannot_address_take_the_reference() -> None:
    x_RK, w_ENK = normal(9, 7, seed=1, dtype=torch.float32), normal(2, 5, 7, seed=2, dtype=torch.float32)
    y_RN = m_grouped(x_RK, w_ENK, torch.tensor([4, 5]))
    assert_near(y_RN, torch.einsum("rk,rnk->rn", x_RK.double(), w_ENK.double()[expert_of_row([4, 5])]), 1e-6)


def test_strided_and_misaligned_inputs() -> None:
    counts = [3, 0, 4]
    x_RK = normal(40, 8, seed=1, dtype=torch.float32).t()[1:]
    w_ENK = normal(3 * 72 * 40 + 1, seed=2, dtype=torch.float32)[1:].view(3, 72, 40)
    assert w_ENK.data_ptr() % 16
    assert not x_RK.is_contiguous()
    y_RN = m_grouped(x_RK, w_ENK, torch.tensor(counts))
    assert_near(y_RN, torch.einsum("rk,rnk->rn", x_RK.double(), w_ENK.double()[expert_of_row(counts)]), 1e-6)


def test_one_row_and_one_expert_of_any_pitch() -> None:
    x_RK = normal(2, 41, seed=1, dtype=torch.float32)[1:, 1:]
    w_ENK = normal(2, 72 * 40 + 1, seed=2, dtype=torch.float32)[1:, 1:].unflatten(1, (72, 40))
    assert x_RK.is_contiguous()
    assert w_ENK.is_contiguous()
    y_RN = m_grouped(x_RK, w_ENK, torch.tensor([1]))
    assert_near(y_RN, x_RK.double() @ w_ENK[0].double().T, 1e-6)
