"""Errors of the kernels' public ops name field, value and rule: on a GPU a wrong shape would be read out of bounds.

Shape suffixes: T tokens, R routed rows, E experts, D model width, F expert width, N output and K input features, V vocabulary.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megagrin.kernels import grouped_gemm as gemm
from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import permute, sort_by_expert, sort_weights, unpermute
from megagrin.kernels.router_logits import router_logits
from megagrin.kernels.sparsemixer import sparsemixer


def refused(message: str, function: Callable, *arguments: object, **named: object) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments, **named)


def elsewhere(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on another device than the CPU."""
    return torch.empty(shape, dtype=dtype, device="meta")


def test_grouped_gemm() -> None:
    x, w, counts = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([1, 3])
    for function in (gemm.grouped_gemm, gemm.m_grouped):
        one_k = r"x {} and w {} must be \(R, K\) and \(E, N, K\) with one K"
        refused(one_k.format(r"\(4, 3\)", r"\(2, 5, 4\)"), function, x, torch.zeros(2, 5, 4), counts)
        refused(one_k.format(r"\(3,\)", r"\(2, 5, 3\)"), function, x[0], w, counts)
        refused(r"counts \(3,\) torch.int64 must be int64 of shape \(2,\)", function, x, w, torch.tensor([1, 1, 2]))
        refused(r"counts \(2,\) torch.int32 must be int64", function, x, w, counts.int())
        refused(r"x is torch.float64 on cpu, w is torch.float32 on cpu; they must agree", function, x.double(), w, counts)
        refused(r"x is torch.float32 on cpu, w is torch.float32 on meta", function, x, elsewhere(2, 5, 3), counts)
        refused(r"counts are on meta, x on cpu", function, x, w, elsewhere(2, dtype=torch.int64))
        refused(r"x is torch.int32; it must be float32, float64, bfloat16 or float16", function, x.int(), w.int(), counts)
        for wrong, total in (([1, 2], 3), ([1, 4], 5)):
            refused(rf"counts sum to {total}, x has 4 rows; they must be equal", function, x, w, torch.tensor(wrong))


def test_dgrad_and_wgrad() -> None:
    dy, w, x, counts = torch.zeros(4, 5), torch.zeros(2, 5, 3), torch.zeros(4, 3), torch.tensor([1, 3])
    one_n = r"dy \(4, 3\) and w \(2, 5, 3\) must be \(R, N\) and \(E, N, K\) with one N"
    refused(one_n, gemm.m_grouped_dgrad, x, w, counts)
    wgrad = gemm.k_grouped_wgrad
    refused(r"dy \(4, 5\) and x \(3, 3\) must be \(R, N\) and \(R, K\) with one R", wgrad, dy, x[:3], counts)
    refused(r"dy \(5,\) and x \(4, 3\) must be", wgrad, dy[0], x, counts)
    refused(r"dy is torch.float32 on cpu, x is torch.float64 on cpu; they must agree", wgrad, dy, x.double(), counts)
    refused(r"dy is torch.float32 on cpu, x is torch.float32 on meta; they must agree", wgrad, dy, elsewhere(4, 3), counts)
    refused(r"counts \(2, 1\) torch.int64 must be int64 of shape \(E,\)", wgrad, dy, x, counts[:, None])
    refused(r"counts \(2,\) torch.int32 must be int64", wgrad, dy, x, counts.int())
    refused(r"counts are on meta, dy on cpu", wgrad, dy, x, elsewhere(2, dtype=torch.int64))
    refused(r"out_dtype torch.bfloat16 must be torch.float32 or that of dy, torch.float32", wgrad, dy, x, counts, torch.bfloat16)
    refused(r"dy is torch.int64; it must be float32", wgrad, dy.long(), x.long(), counts)
    into = torch.zeros(2, 5, 3)
    strided = into.transpose(1, 2).contiguous().transpose(1, 2)
    for wrong in (into.bfloat16(), into[:1], strided, elsewhere(2, 5, 3)):
        rule = r"accumulate_into .* must be contiguous torch.float32 of shape \(2, 5, 3\) on cpu"
        refused(rule, wgrad, dy, x, counts, accumulate_into=wrong)


def test_expert_mlp() -> None:
    x, gate_up, down, v = torch.zeros(4, 3), torch.zeros(2, 10, 3), torch.zeros(2, 3, 5), torch.zeros(4)
    counts, plan = torch.tensor([1, 3]), sort_by_expert(torch.tensor([[0], [1], [1], [1]]), 2)
    wrong = [
        ((x, gate_up, down.mT, v, counts), r"gate_up \(2, 10, 3\) and down \(2, 5, 3\) must be \(E, 2F, D\) and \(E, D, F\)"),
        ((x, gate_up[:, :9], down, v, counts), r"gate_up \(2, 9, 3\) and down"),
        (
            (x, gate_up, down.double(), v, counts),
            r"down is torch.float64 on cpu, gate_up is torch.float32 on cpu",
        ),
        ((x, gate_up, down, v[:3], counts), r"weight \(3,\) must be \(4,\), one number a row"),
        ((x, gate_up, down, v, counts, v[:, None]), r"backward_weight \(4, 1\) must be \(4,\), one number a row"),
        ((x, gate_up, down, v.bfloat16(), counts), r"weight is torch.bfloat16 on cpu; it must be float32 or float64 on cpu"),
        ((x, gate_up, down, v, counts, elsewhere(4)), r"backward_weight is torch.float32 on meta; it must be float32 .* on cpu"),
        ((x, gate_up, down, v, counts[:1]), r"counts \(1,\) torch.int64 must be int64 of shape \(2,\)"),
        ((x[:3], gate_up, down, v, counts, None, plan), r"the plan sorts 4 tokens, x \(3, 3\) holds 3"),
        ((x.int(), gate_up.int(), down.int(), v, counts), r"x is torch.int32; it must be"),
    ]
    for arguments, message in wrong:
        refused(message, expert_mlp, *arguments)


def test_permutation() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [2, 0]])
    plan, x, y = sort_by_expert(experts, 3), torch.zeros(3, 4), torch.zeros(6, 4)
    for wrong in (experts.int(), experts[0]):
        refused(r"experts .* must be int64 \(T, K\)", sort_by_expert, wrong, 3)
    refused(r"n_experts 0 must be at least 1", sort_by_expert, experts, 0)
    refused(r"permute: x \(6, 4\) must be \(3, D\), one row a token of the plan", permute, y, plan)
    refused(r"permute: x \(3,\) must be \(3, D\)", permute, x[:, 0], plan)
    refused(r"permute: x is on meta, the plan on cpu; they must agree", permute, elsewhere(3, 4), plan)
    refused(r"unpermute: y \(3, 4\) must be \(6, D\), one row a choice of the plan", unpermute, x, plan)
    refused(r"unpermute: y is on meta, the plan on cpu; they must agree", unpermute, elsewhere(6, 4), plan)
    weights, message = torch.zeros(3, 2), r"must be \(3, 2\) on cpu, one number a choice of the plan"
    refused(r"sort_weights: weight \(3, 4\) on cpu " + message, sort_weights, x, None, plan)
    refused(r"sort_weights: backward_weight \(3, 2\) on meta " + message, sort_weights, weights, elsewhere(3, 2), plan)
    refused(
        r"sort_weights: backward_weight is torch.float64, weight is torch.float32", sort_weights, weights, weights.double(), plan
    )


def test_cross_entropy() -> None:
    x, w, b, label = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(7), torch.zeros(4, dtype=torch.int64)
    shapes = r"linear_cross_entropy: x .* w .* b .* label .* must be \(T, D\), \(V, D\), \(V,\) or None, \(T,\)"
    for arguments in (
        (x, w[:, :2], b, label),
        (x, w, b, label[:3]),
        (x[0], w, b, label),
        (x, w[0], b, label),
        (x, w, b[:6], label),
    ):
        refused(shapes, linear_cross_entropy, *arguments)
    refused(
        r"w is torch.float64 on cpu, x is torch.float32 on cpu; they must agree", linear_cross_entropy, x, w.double(), b, label
    )
    refused(r"b is torch.float32 on meta, x is torch.float32 on cpu", linear_cross_entropy, x, w, elsewhere(7), label)
    refused(r"label is torch.int32 on cpu; it must be int64 on cpu", linear_cross_entropy, x, w, b, label.int())
    refused(r"x is torch.int64; it must be", linear_cross_entropy, x.long(), w.long(), b.long(), label)
    for wrong in (-1, -99, 7):
        label[2] = wrong
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            linear_cross_entropy(x, w, None, label)


def test_router_logits() -> None:
    x, w = torch.zeros(4, 3), torch.zeros(2, 3)
    for arguments in ((x[:, :2], w), (x[0], w), (x, w[0]), (x[None], w)):
        refused(r"router_logits: x .* and w .* must be \(T, D\) and \(E, D\) with one D", router_logits, *arguments)
    refused(r"w is torch.bfloat16; it must be float32 or float64", router_logits, x, w.bfloat16())
    refused(r"x is torch.int32; it must be float32, float64, bfloat16 or float16", router_logits, x.int(), w)
    for wrong in ((x.double(), w), (x, w.double()), (x.bfloat16(), elsewhere(2, 3)), (elsewhere(4, 3), w)):
        refused(
            r"x is .* on .*, w is .* on .*; x must be bfloat16, float16 or of w's dtype, on one device", router_logits, *wrong
        )


def test_fused_router_names_the_device() -> None:
    rules = {"mask_rule": "code", "mask_eps": 0.1, "temperature": 1.0, "bernoulli": 0.25, "gradient": 1.0}
    place = {"top_k": 2, "seed": 0, "step": 0, "layer": 0}
    refused(r"sparsemixer: z is on cpu; the fused router needs CUDA", sparsemixer, torch.zeros(4, 3), None, **place, **rules)


@pytest.mark.parametrize(("n", "k", "taken"), [(32, 64, True), (30, 64, False), (32, 50, False)])
def test_torch_s_grouped_product_gets_only_what_it_takes(n: int, k: int, taken: bool) -> None:
    """On CUDA without Triton, or in widths that our kernels cannot address: torch's product has the same limit."""
    with FakeTensorMode():
        assert gemm._use_grouped_mm(torch.empty(5, k, dtype=torch.bfloat16, device="cuda"), n, k) == taken
    if k == 50:
        x_RK, w_EKN = torch.zeros(5, k, dtype=torch.bfloat16), torch.zeros(2, n, k, dtype=torch.bfloat16).transpose(1, 2)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch._grouped_mm(x_RK, w_EKN, offs=torch.tensor([2, 5], dtype=torch.int32))
