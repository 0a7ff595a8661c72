"""The permutation's kernels against a stable sort, and against plain indexing in fp64.

Shape suffixes: T tokens, K experts per token, R = T·K rows, D model width, E experts.
"""

import pytest
import torch
from interpreted import assert_near, normal, poisoned_memory

from megagrin.kernels.permute import permute, sort_by_expert, sort_weights, unpermute


@pytest.mark.parametrize("skew", ["even", "one expert", "lognormal"])
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts"), [(0, 2, 4), (1, 1, 1), (63, 1, 3), (64, 2, 16), (65, 8, 64), (130, 3, 128), (200, 8, 8)]
)
def test_sort_is_stable(n_tokens: int, top_k: int, n_experts: int, skew: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if skew == "one expert":
        expert_TK = torch.full((n_tokens, top_k), n_experts - 1)
    else:
        p_E = torch.ones(n_experts) if skew == "even" else torch.randn(n_experts, generator=generator).mul(2).exp()
        flat = torch.multinomial(p_E, max(n_tokens * top_k, 1), replacement=True, generator=generator)
        expert_TK = flat[: n_tokens * top_k].view(n_tokens, top_k)
    with poisoned_memory():
        plan = sort_by_expert(expert_TK, n_experts)
    order_R = torch.argsort(expert_TK.flatten(), stable=True)
    assert torch.equal(plan.order_R, order_R)
    assert torch.equal(plan.source_R, order_R // top_k)
    assert torch.equal(plan.place_TK.flatten()[order_R], torch.arange(n_tokens * top_k))
    assert torch.equal(plan.counts_E, torch.bincount(expert_TK.flatten(), minlength=n_experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "width"),
    [(0, 2, 40), (1, 1, 1100), (17, 2, 40), (5, 3, 1100), (5, 4, 32), (3, 5, 40), (5, 6, 32), (3, 7, 1100), (9, 8, 40)],
)
def test_there_and_back(n_tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    plan = sort_by_expert(torch.rand(n_tokens, 8).argsort(1)[:, :top_k], 8)
    rows = n_tokens * top_k
    x_TD, y_RD = normal(n_tokens, width, seed=1, dtype=dtype), normal(rows, width, seed=2, dtype=dtype)
    leaves = x_TD.clone().requires_grad_(), y_RD.clone().requires_grad_()
    with poisoned_memory():
        there, back = permute(leaves[0], plan), unpermute(leaves[1], plan)
        there.backward(y_RD)
        back.backward(x_TD)
    assert torch.equal(there, x_TD[plan.source_R])
    assert torch.equal(leaves[1].grad, x_TD[plan.source_R])
    summed = torch.zeros(n_tokens, width, dtype=torch.float64).index_add(0, plan.source_R, y_RD.double())
    for got in (back, leaves[0].grad):
        if top_k == 1:
            assert torch.equal(got.double(), summed)
        else:
            assert_near(got, summed)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("n_tokens", "top_k"), [(0, 2), (1, 1), (17, 2), (341, 3), (130, 8)])
def test_weights_travel_with_their_rows(n_tokens: int, top_k: int, both: bool) -> None:
    """341 · 3 and 130 · 8 rows lie on both sides of a program's 1024; every second weight is a view of a wider tensor."""
    plan = sort_by_expert(torch.rand(n_tokens, 8).argsort(1)[:, :top_k], 8)
    wide = normal(n_tokens, 2 * top_k, seed=1, dtype=torch.float32)
    weight_TK, backward_TK = wide[:, ::2].requires_grad_(), wide[:, 1::2].detach() if both else None
    grad_R = normal(n_tokens * top_k, seed=2, dtype=torch.float32)
    with poisoned_memory():
        weight_R, backward_R = sort_weights(weight_TK, backward_TK, plan)
        (grad_TK,) = torch.autograd.grad(weight_R, weight_TK, grad_R)
    assert torch.equal(weight_R, weight_TK.flatten()[plan.order_R])
    assert torch.equal(grad_TK, grad_R[plan.place_TK])
    if both:
        assert torch.equal(backward_R, backward_TK.flatten()[plan.order_R])
        assert not backward_R.requires_grad
    else:
        assert backward_R is None
