"""The fused expert MLP's kernels against fp64 at the same rounding points, with and without a plan.

Shape suffixes: R routed rows, T tokens, K experts per token, D model width, F expert width, E experts.
"""

import pytest
import torch
from interpreted import COUNTS, assert_near, expert_of_row, normal, poisoned_memory
from sums import Sum
from torch import Tensor

from megagrin.kernels import grouped_gemm_triton, moe_mlp_triton, tuning
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import permute, sort_by_expert
from megagrin.kernels.split_backward import inputs_only


def exact_mlp(
    x_RD: Tensor, up: Tensor, down: Tensor, v_R: Tensor, b_R: Tensor, expert_R: Tensor, dy_RD: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """fp64 values and gradients, rounded where the kernels store something: h, v·act, b·act and dh."""

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).double()

    x_RD, up, down, v_R1, b_R1, dy_RD = (t.double() for t in (x_RD, up, down, v_R[:, None], b_R[:, None], dy_RD))
    h_R2F = rounded(torch.einsum("rd,rfd->rf", x_RD, up[expert_R]))
    g, u = h_R2F[:, 0::2], h_R2F[:, 1::2]
    s = torch.sigmoid(g)
    act = g * s * u
    dact = torch.einsum("rd,rdf->rf", dy_RD, down[expert_R])
    dh = rounded(torch.stack([dact * b_R1 * u * s * (1 + g * (1 - s)), dact * b_R1 * g * s], dim=2).flatten(1))
    hot_RE = torch.nn.functional.one_hot(expert_R, up.shape[0]).double()
    return {
        "y": torch.einsum("rf,rdf->rd", rounded(act * v_R1), down[expert_R]),
        "x": torch.einsum("rf,rfd->rd", dh, up[expert_R]),
        "up": torch.einsum("re,rf,rd->efd", hot_RE, dh, x_RD),
        "down": torch.einsum("re,rd,rf->edf", hot_RE, dy_RD, rounded(act * b_R1)),
        "v": (dact * act).sum(1),
    }


def weights(n_experts: int, d_model: int, d_ff: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        (0.2 * normal(n_experts, 2 * d_ff, d_model, seed=2)).to(dtype),
        (0.2 * normal(n_experts, d_model, d_ff, seed=3)).to(dtype),
    )


# Of many experts, which take seconds each in the interpreter, only the harder kind of weight.
CASES = [
    pytest.param(counts, own, id=f"{sum(counts)}rows{len(counts)}experts-{own}")
    for counts in COUNTS
    for own in (False, True)
    if own or len(counts) <= 16
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("counts", "own_backward_weight"), CASES)
def test_values_and_gradients(counts: list[int], dtype: torch.dtype, own_backward_weight: bool) -> None:
    # Fewer features for many experts.
    rows, (d_model, d_ff) = sum(counts), (72, 40) if len(counts) <= 16 else (40, 24)
    x_RD, dy_RD = normal(rows, d_model, seed=1, dtype=dtype), normal(rows, d_model, seed=4, dtype=dtype)
    up, down = weights(len(counts), d_model, d_ff, dtype)
    v_R, b_R = normal(rows, seed=5).abs().float(), normal(rows, seed=6).abs().float()
    ours = [t.clone().requires_grad_() for t in (x_RD, up, down, v_R)]
    with poisoned_memory():
        y_RD = expert_mlp(*ours, torch.tensor(counts), b_R if own_backward_weight else None)
        y_RD.backward(dy_RD)
    exact = exact_mlp(x_RD, up, down, v_R, b_R if own_backward_weight else v_R, expert_of_row(counts), dy_RD, dtype)
    assert y_RD.dtype == dtype
    assert_near(y_RD, exact["y"], 1e-5)
    for name, leaf in zip(("x", "up", "down", "v"), ours, strict=True):
        # dv is fp32 in both; under bf16 it carries the flips of h's rounding where an fp32 sum falls beside a tie.
        assert_near(leaf.grad, exact[name], 1e-5 if dtype == torch.float32 else 2e-4)
    with torch.no_grad():  # nothing is kept, and nothing changes
        assert torch.equal(expert_mlp(*ours, torch.tensor(counts), b_R), y_RD)


@pytest.mark.parametrize("major", [8, 9, 10])
def test_fallback_blocks_of_gpus(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that GPUs run, on widths and counts that end within a second tile."""
    for module in (moe_mlp_triton, grouped_gemm_triton):
        monkeypatch.setattr(module, "config", lambda op, dtype, *_: tuning.fallback(op, dtype, major))
    counts, d_model, d_ff, dtype = [129, 0, 3], 72, 264, torch.bfloat16
    x_RD, dy_RD = normal(132, d_model, seed=1, dtype=dtype), normal(132, d_model, seed=4, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x_RD, *weights(3, d_model, d_ff, dtype), torch.rand(132))]
    b_R = torch.rand(132)
    with poisoned_memory():
        y_RD = expert_mlp(*leaves, torch.tensor(counts), b_R)
        y_RD.backward(dy_RD)
    exact = exact_mlp(*(t.detach() for t in leaves), b_R, expert_of_row(counts), dy_RD, dtype)
    assert_near(y_RD, exact["y"])
    for name, leaf in zip(("x", "up", "down", "v"), leaves, strict=True):
        assert_near(leaf.grad, exact[name], 2e-4)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts"), [(0, 2, 4), (1, 1, 1), (33, 2, 4), (17, 8, 9), (63, 1, 3)])
def test_tokens_with_a_plan(n_tokens: int, top_k: int, n_experts: int, gather: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering inside gives, bit for bit, what gathering before gives; also in the product's own loads."""
    blocks = tuning.BlockConfig(32, 64, 32, 4, 2, group_m=2, slices=4, gather=gather)
    monkeypatch.setattr(moe_mlp_triton, "config", lambda *_: blocks)
    expert_TK = torch.rand(n_tokens, n_experts).argsort(1)[:, :top_k]
    plan = sort_by_expert(expert_TK, n_experts)
    x_TD, v_R = normal(n_tokens, 72, seed=1, dtype=torch.bfloat16), torch.rand(n_tokens * top_k)
    up, down = weights(n_experts, 72, 40, torch.bfloat16)
    dy_RD = normal(n_tokens * top_k, 72, seed=4, dtype=torch.bfloat16)
    results = []
    for with_plan in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x_TD, up, down, v_R)]
        with poisoned_memory():
            x = leaves[0] if with_plan else permute(leaves[0], plan)
            y_RD = expert_mlp(x, *leaves[1:], plan.counts_E, plan=plan if with_plan else None)
            y_RD.backward(dy_RD)
        results.append([y_RD.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_tokens", [0, 33])
@pytest.mark.parametrize("with_plan", [False, True])
def test_backward_in_two_halves(n_tokens: int, with_plan: bool) -> None:
    """Inputs first, weights later, nothing in both: the bits of one pass."""
    plan = sort_by_expert(1 + torch.rand(n_tokens, 3).argsort(1)[:, :2], 4)  # nobody chooses expert 0
    x = normal(n_tokens if with_plan else 2 * n_tokens, 72, seed=1, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, *weights(4, 72, 40, torch.float32), torch.rand(2 * n_tokens))]
    dy_RD = normal(2 * n_tokens, 72, seed=4, dtype=torch.bfloat16)
    with poisoned_memory():
        y_RD = expert_mlp(*leaves, plan.counts_E, torch.rand(2 * n_tokens), plan if with_plan else None)
        once = torch.autograd.grad(y_RD, leaves, dy_RD, retain_graph=True)
        with inputs_only():
            dx, *none, dv_R = torch.autograd.grad(y_RD, leaves, dy_RD, retain_graph=True, allow_unused=True)
        no_dx, d_up, d_down, no_dv = torch.autograd.grad(y_RD, leaves, dy_RD, allow_unused=True)
    assert [*none, no_dx, no_dv] == [None] * 4
    for half, whole in zip((dx, d_up, d_down, dv_R), once, strict=True):
        assert half.dtype == whole.dtype
        assert torch.equal(half, whole)


def test_fp32_masters_beside_bf16_rows() -> None:
    """Weights are cast inside; their gradients keep the fp32 sums: a rounding to bf16 would read 2^-9."""
    counts = [40, 0, 25]
    x_RD, dy_RD = normal(65, 72, seed=1, dtype=torch.bfloat16), normal(65, 72, seed=4, dtype=torch.bfloat16)
    masters = [t.requires_grad_() for t in weights(3, 72, 40, torch.float32)]
    v_R = torch.rand(65)
    y_RD = expert_mlp(x_RD, *masters, v_R, torch.tensor(counts))
    y_RD.backward(dy_RD)
    narrow = [t.detach().bfloat16() for t in masters]
    exact = exact_mlp(x_RD, *narrow, v_R, v_R, expert_of_row(counts), dy_RD, torch.bfloat16)
    assert_near(y_RD, exact["y"])
    for name, master in zip(("up", "down"), masters, strict=True):
        assert master.grad.dtype == torch.float32
        error = (master.grad.double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-4, "what is left are flips of the inner roundings"


@pytest.mark.parametrize("with_plan", [False, True], ids=["rows", "plan"])
def test_gradients_of_weights_are_added_in_memory(with_plan: bool) -> None:
    """Two micro-batches and one without rows, on kept bf16 weights: the fp32 sum of what each gives by itself."""
    masters = weights(3, 72, 40, torch.float32)
    copies = masters[0].bfloat16(), masters[1].bfloat16()
    leaves = [t.clone().requires_grad_() for t in masters]
    sums, alone = (Sum(leaves[0]), Sum(leaves[1])), [torch.zeros_like(t) for t in masters]
    for n_tokens in (21, 0, 13):
        plan = sort_by_expert((torch.arange(n_tokens * 2).view(n_tokens, 2) * 2) % 3, 3)
        x_TD, v_R = normal(n_tokens, 72, seed=n_tokens, dtype=torch.bfloat16), torch.rand(2 * n_tokens)
        x = x_TD if with_plan else permute(x_TD, plan)
        given_plan = plan if with_plan else None
        dy_RD = normal(2 * n_tokens, 72, seed=4, dtype=torch.bfloat16)
        separate = [t.clone().requires_grad_() for t in masters]
        with poisoned_memory():
            y_RD = expert_mlp(x, *separate, v_R, plan.counts_E, plan=given_plan)
            for total, gradient in zip(alone, torch.autograd.grad(y_RD, separate, dy_RD), strict=True):
                total += gradient
            got_RD = expert_mlp(x, *masters, v_R, plan.counts_E, None, given_plan, copies, sums)
            got_RD.backward(dy_RD)
        assert torch.equal(got_RD, y_RD)
    for total, expected in zip(sums, alone, strict=True):
        assert total.begun == 1
        torch.testing.assert_close(total.total(), expected, rtol=1e-6, atol=1e-7)
