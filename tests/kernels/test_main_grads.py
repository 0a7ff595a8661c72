"""The expert MLP with kept 16-bit weights and with gradients that are added up outside of autograd.

Shape suffixes: R routed rows, E experts, D model width, F expert width.
"""

from collections.abc import Iterator

import pytest
import torch
from sums import Sum
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import sort_by_expert
from megagrin.moe.experts import WeightCopy

torch.set_num_threads(1)
E, D, F = 5, 6, 8


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(E, 2 * F, D, seed=1, dtype=dtype).requires_grad_(), normal(E, D, F, seed=2, dtype=dtype).requires_grad_()


def micro_batches(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, router weights and counts; the first and the last without rows of some experts, the second without any row."""
    for seed, counts in enumerate(([0, 3, 33, 1, 0], [0] * 5, [2, 0, 0, 4, 7])):
        rows, wide = sum(counts), torch.promote_types(dtype, torch.float32)
        x, v = normal(rows, D, seed=10 + seed, dtype=dtype), normal(rows, seed=20 + seed, dtype=wide)
        yield x.requires_grad_(), v.requires_grad_(), torch.tensor(counts)


@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_sums_are_those_of_autograd(dtype: torch.dtype, master: torch.dtype, recomputed: bool) -> None:
    """Of x and v the bits; of the weights the sum in another order of additions."""
    plain, summed = weights(master), weights(master)
    sums = Sum(summed[0]), Sum(summed[1])

    def run(*args: Tensor) -> Tensor:
        return expert_mlp(*args, main_grads=sums)

    for x_RD, v_R, counts_E in micro_batches(dtype):
        leaves = [(t.detach().clone().requires_grad_()) for t in (x_RD, v_R)]
        y_RD = expert_mlp(x_RD, *plain, v_R, counts_E)
        y_RD.square().sum().backward()
        args = (leaves[0], *(w.detach() for w in summed), leaves[1], counts_E)
        got_RD = checkpoint(run, *args, use_reentrant=False) if recomputed else run(*args)
        got_RD.square().sum().backward()
        assert torch.equal(got_RD, y_RD)
        for a, b in zip((x_RD, v_R), leaves, strict=True):
            assert torch.equal(a.grad, b.grad)
    for weight, total in zip(plain, sums, strict=True):
        assert weight.grad is not None
        assert total.total().dtype == master
        torch.testing.assert_close(total.total(), weight.grad, rtol=1e-5 if master == torch.float32 else 1e-13, atol=1e-6)
    assert [weight.grad for weight in summed] == [None, None]


def test_the_first_gradient_is_stored_and_the_others_added_there() -> None:
    summed = weights(torch.float64)
    sums, places = (Sum(summed[0]), Sum(summed[1])), []
    for x_RD, v_R, counts_E in micro_batches(torch.float64):
        expert_mlp(x_RD, *(w.detach() for w in summed), v_R, counts_E, main_grads=sums).sum().backward()
        places.append([total.total().data_ptr() for total in sums])
    assert places[0] == places[1] == places[2]
    assert [total.begun for total in sums] == [1, 1]


def test_weights_alone_have_gradients() -> None:
    """Nothing else asks for a backward pass: tokens without a gradient, as frozen embeddings give."""
    plain, summed = weights(torch.float64), weights(torch.float64)
    sums = Sum(summed[0]), Sum(summed[1])
    x_RD, v_R, counts_E = (t.detach() for t in next(micro_batches(torch.float64)))
    expert_mlp(x_RD, *plain, v_R, counts_E).sum().backward()
    expert_mlp(x_RD, *(w.detach() for w in summed), v_R, counts_E, main_grads=sums).sum().backward()
    for weight, total in zip(plain, sums, strict=True):
        assert torch.equal(total.total(), weight.grad)
    with torch.no_grad():
        assert not expert_mlp(x_RD, *summed, v_R, counts_E, main_grads=sums).requires_grad


def test_copies_stand_for_the_weights() -> None:
    """Values and gradients of the copies' numbers, and gradients in the dtype of the weights, which are not read."""
    master, never = weights(torch.float32), [torch.full_like(w, torch.nan).requires_grad_() for w in weights(torch.float32)]
    copies = tuple(w.detach().bfloat16() for w in master)
    plan = sort_by_expert(torch.tensor([[0, 3], [3, 1], [4, 3]]), E)
    results = []
    for given, kept in ((master, None), (never, copies)):
        x_TD, v_R = normal(3, D, seed=5, dtype=torch.bfloat16).requires_grad_(), normal(6, seed=6, dtype=torch.float32)
        y_RD = expert_mlp(x_TD, *given, v_R, plan.counts_E, plan=plan, copies=kept)
        results.append([y_RD, *torch.autograd.grad(y_RD.float().square().sum(), [x_TD, *given])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_copy_follows_its_weight() -> None:
    """Filled anew, in place, after any operation in place, and by `refresh` after writes that no version counts."""
    weight = torch.randn(3, 5).requires_grad_()
    copy = WeightCopy(torch.bfloat16)
    kept = copy.of(weight)
    assert torch.equal(kept, weight.bfloat16())
    with torch.no_grad():
        weight.mul_(1.5)
    assert copy.of(weight) is kept
    assert torch.equal(kept, weight.bfloat16())
    weight.data.mul_(1.5)
    copy.refresh(weight)
    assert torch.equal(copy.of(weight), weight.bfloat16())
    weight.data.mul_(1.5)
    copy.expire()
    assert torch.equal(copy.of(weight), weight.bfloat16())
    kept.zero_()
    assert not copy.of(weight).any(), "it is not filled without a reason"
    other = (2 * weight.detach()).requires_grad_()
    assert other._version < weight._version
    for _ in range(weight._version - other._version):
        with torch.no_grad():
            other.add_(0)
    assert torch.equal(copy.of(other), other.bfloat16()), "of a parameter in another place, the version apart"


def test_a_copy_made_in_inference_serves_training() -> None:
    master, x_RD, v_R = weights(torch.float32), normal(1, D, seed=1, dtype=torch.bfloat16), torch.ones(1)
    kept = [WeightCopy(torch.bfloat16) for _ in master]
    with torch.inference_mode():
        made = [copy.of(weight) for copy, weight in zip(kept, master, strict=True)]
    y_RD = expert_mlp(x_RD, *master, v_R, torch.tensor([1, 0, 0, 0, 0]), copies=(made[0], made[1]))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y_RD.sum(), master))


def test_copies_must_fit() -> None:
    master, x_RD, v_R, counts = weights(torch.float32), torch.ones(1, D).bfloat16(), torch.ones(1), torch.tensor([1, 0, 0, 0, 0])
    good = [w.detach().bfloat16() for w in master]
    for wrong in ((good[0].float(), good[1]), (good[0], good[1][:, :, :4])):
        with pytest.raises(ValueError, match=r"expert_mlp: the copy of (gate_up|down) .* must be torch.bfloat16 of shape"):
            expert_mlp(x_RD, *master, v_R, counts, copies=wrong)
