"""How many kernels a MoE layer starts, and that the host waits for none: counted on the CPU, with nothing behind the launches.

Small micro-batches are bound by them. Every launch costs host time, whatever the number of tokens.

Shape suffixes: T tokens, K experts per token, R = T·K rows, E experts, D model width, B sequences, S positions.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from offline_launches import Calls, calls_of, offline_launches
from sums import Sum

from megagrin.kernels.launch import eager
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import permute, sort_by_expert, sort_weights, unpermute
from megagrin.kernels.router_logits import router_logits
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig

torch.set_num_threads(1)
counts_launches = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels are computed")
T, D, F, E, K = 64, 64, 64, 16, 2


def layer_calls(change: Callable[[Tensor], Tensor] = lambda y: y) -> tuple[Calls, Calls]:
    """Forward and backward of one layer in bf16, after a first round that compiles; gradients are fresh, not added to."""
    layer = MoELayer(D, F, E, K, 0, RouterConfig(), BalanceConfig())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.experts.to(torch.bfloat16)
    train = TrainRouting(Draws(1, 2, torch.arange(T)), T, torch.full((1, E), 1 / E))
    x_BSD, dy_BSD = torch.randn(1, T, D).bfloat16().requires_grad_(), torch.randn(1, T, D).bfloat16()
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = [change(layer(x_BSD, train)[0])]

    def backward() -> None:
        torch.autograd.backward(outputs, [dy_BSD])

    with offline_launches() as launched:
        forward()
        backward()
        for leaf in (x_BSD, *layer.parameters()):
            leaf.grad = None
        return calls_of(forward, launched), calls_of(backward, launched)


@counts_launches
def test_launches_of_a_layer() -> None:
    """Ceilings for kernels and torch's operators together: 19 and 23 before they were counted."""
    forward, backward = layer_calls()
    assert len(forward.kernels) + len(forward.operators) <= 12, forward
    assert len(backward.kernels) + len(backward.operators) <= 16, backward
    assert forward.waits == backward.waits == []
    assert forward.kernels[-8:] == [
        "count_kernel", "place_kernel", "gather_numbers_kernel",
        "gather_rows_kernel", "schedule_kernel", "up_swiglu_kernel", "m_grouped_kernel", "gather_sum_kernel",
    ]  # fmt: skip
    assert backward.kernels[:9] == [
        "gather_rows_kernel", "schedule_kernel", "down_dgrad_kernel", "wgrad_kernel", "gather_rows_kernel", "wgrad_kernel",
        "m_grouped_kernel", "gather_sum_kernel", "gather_numbers_kernel",
    ]  # fmt: skip


@counts_launches
def test_an_operator_more_is_seen() -> None:
    plain, more = layer_calls(), layer_calls(lambda y: y * 2)
    assert [len(calls.operators) + 1 for calls in plain] == [len(calls.operators) for calls in more]
    waiting = layer_calls(lambda y: y + 0 * y.detach().sum().item())[0]
    assert "_local_scalar_dense" in waiting.waits
    assert layer_calls(lambda y: y[: len(y.tolist())])[0].waits == ["tolist"]


@counts_launches
def test_sorting_is_two_kernels_and_a_running_sum() -> None:
    expert_TK = torch.zeros(T, K, dtype=torch.int64)
    with offline_launches() as launched:
        calls = calls_of(lambda: sort_by_expert(expert_TK, E), launched)
    assert calls.kernels == ["count_kernel", "place_kernel"]
    assert calls.operators == ["cumsum"]


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_operators_are_seen_by_those_who_look_and_change_nothing() -> None:
    """The direct way of eager mode and the registered operator: the same bits, forward and backward."""
    expert_TK = torch.rand(9, E).argsort(1)[:, :K]

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x_TD, v_TK = torch.randn(9, D, generator=generator), torch.rand(9, K, generator=generator)
        x_TD.requires_grad_()
        v_TK.requires_grad_()
        plan = sort_by_expert(expert_TK, E)
        weight_R, backward_R = sort_weights(v_TK, v_TK.detach() + 1, plan)
        assert backward_R is not None
        assert not backward_R.requires_grad
        y_TD = unpermute(permute(x_TD, plan) * weight_R.unsqueeze(1) * backward_R.unsqueeze(1), plan)
        return [*(t for t in vars(plan).values()), y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, v_TK])]

    with _Seen() as seen:
        watched = run()
    ours = [name for name in seen.names if name.startswith("megagrin.")]
    assert [name.split(".")[1] for name in ours] == [
        "sort_by_expert", "sort_weights", "gather_rows", "gather_sum", "gather_rows", "gather_sum", "sort_weights",
    ]  # fmt: skip
    for a, b in zip(run(), watched, strict=True):
        assert torch.equal(a, b)


class _Wrapped(Tensor):
    """A subclass, whose operators are its own matter."""


def test_the_direct_way_is_taken_where_nobody_looks() -> None:
    call = eager(lambda *args: "operator", lambda *args: "direct")  # type: ignore[arg-type]
    x = torch.ones(2)
    assert call(x, None, 3) == call(torch.nn.Parameter(x)) == "direct"
    assert call(x, x.as_subclass(_Wrapped)) == "operator"
    with _Seen():
        assert call(x) == "operator"
    found = []
    torch.vmap(lambda part: found.append(call(part)) or part)(x)
    assert found == ["operator"]


def experts(main_grads: bool) -> tuple[Tensor, Tensor]:
    x_RD, up_E2FD, down_EDF = (torch.randn(size, requires_grad=True) for size in ((3, 8), (2, 8, 8), (2, 8, 4)))
    counts_E, sums = torch.tensor([1, 2]), (Sum(up_E2FD), Sum(down_EDF)) if main_grads else None
    return x_RD, expert_mlp(x_RD, up_E2FD, down_EDF, torch.rand(3), counts_E, main_grads=sums)


def router() -> tuple[Tensor, Tensor]:
    x_TD = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    return x_TD, router_logits(x_TD, torch.randn(4, 8, requires_grad=True))


@pytest.mark.parametrize(
    "run", [lambda: experts(False), lambda: experts(True), router], ids=["experts", "experts, main gradients", "router"]
)
def test_a_second_derivative_is_refused(run: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Backward passes call kernels: taken for constants, they would leave a part of it out without a word."""
    x, y = run()
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
