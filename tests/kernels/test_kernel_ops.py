"""The kernels as PyTorch operators: schemas, fakes and autograd checked by torch; torch.compile, checkpointing and FakeTensor.

Shape suffixes: T tokens, R routed rows, K experts per token, D model width, F expert width, E experts.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.grouped_gemm import grouped_gemm, k_grouped_wgrad
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import permute, sort_by_expert, unpermute
from megagrin.kernels.router_logits import router_logits
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer
from megagrin.moe.router import Draws, Router, RouterConfig

torch.set_num_threads(1)
OPS = torch.ops.megagrin


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert_choices(n_tokens: int, top_k: int, n_experts: int) -> Tensor:
    return torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]


def mlp_arguments(with_plan: bool, own_backward_weight: bool) -> tuple:
    plan = sort_by_expert(expert_choices(9, 2, 4), 4)
    x = normal(9 if with_plan else 18, 6, seed=1).requires_grad_()
    up, down = normal(4, 10, 6, seed=2).requires_grad_(), normal(4, 6, 5, seed=3).requires_grad_()
    v_R, b_R = normal(18, seed=4).requires_grad_(), normal(18, seed=5) if own_backward_weight else None
    routing = (plan.source_R, plan.place_TK) if with_plan else (None, None)
    copies = (up.detach() * 2, down.detach() * 2) if own_backward_weight else (None, None)
    return x, up, down, v_R, b_R, plan.counts_E, *routing, *copies, True


def op_cases() -> Iterator[tuple[str, Callable, tuple]]:
    counts = torch.tensor([2, 0, 3])
    x, w, dy = normal(5, 6, seed=1), normal(3, 4, 6, seed=2), normal(5, 4, seed=3)
    yield "m_grouped", OPS.m_grouped, (x.clone().requires_grad_(), w.clone().requires_grad_(), counts, False)
    yield "m_grouped_dgrad", OPS.m_grouped, (dy.clone().requires_grad_(), w.clone().requires_grad_(), counts, True)
    yield "wgrad", OPS.k_grouped_wgrad, (dy, x, counts, torch.float32)
    yield "wgrad bf16", OPS.k_grouped_wgrad, (dy.bfloat16(), x.bfloat16(), counts, torch.float32)
    yield "wgrad into", OPS.k_grouped_wgrad_, (dy, x, counts, normal(3, 4, 6, seed=4))
    plan = sort_by_expert(expert_choices(9, 2, 4), 4)
    yield "sort", OPS.sort_by_expert, (expert_choices(9, 2, 4), 4)
    yield "gather_rows", OPS.gather_rows, (normal(9, 6, seed=1).requires_grad_(), plan.source_R, plan.place_TK)
    yield "gather_sum", OPS.gather_sum, (normal(18, 6, seed=1).requires_grad_(), plan.source_R, plan.place_TK)
    x_bf16 = x.bfloat16()
    yield "router_logits", OPS.router_logits, (x_bf16.clone().requires_grad_(), w[0].clone().requires_grad_())
    yield "router_logits weights only", OPS.router_logits, (x.half(), w[0].clone().requires_grad_())
    yield "router_dgrad", OPS.router_dgrad, (dy, x_bf16, w[0])
    yield "router_wgrad", OPS.router_wgrad, (dy, x_bf16)
    weights = (normal(9, 2, seed=1).requires_grad_(), normal(9, 2, seed=2))
    yield "sort_weights", OPS.sort_weights, (*weights, plan.order_R, plan.place_TK)
    yield "sort_weights alone", OPS.sort_weights, (weights[0], None, plan.order_R, plan.place_TK)
    for with_plan in (False, True):
        arguments = mlp_arguments(with_plan, own_backward_weight=with_plan)
        yield f"mlp plan={with_plan}", OPS.expert_mlp, arguments
        y, h = OPS.expert_mlp(*(t.detach() if isinstance(t, Tensor) else t for t in arguments))
        rest = (t.detach() if isinstance(t, Tensor) else t for t in arguments[1:-1])
        backward = (torch.ones_like(y), h, arguments[0].detach(), *rest)
        yield f"mlp backward plan={with_plan}", OPS.expert_mlp_backward, backward
        yield f"mlp dgrad plan={with_plan}", OPS.expert_mlp_dgrad, backward


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(op, args, id=name) for name, op, args in op_cases()])
def test_registration(op: Callable, arguments: tuple) -> None:
    """torch's own check: schema, autograd registration, the fake against the real op, and AOT autograd with dynamic shapes."""
    library.opcheck(op, arguments)


def moe_layer() -> MoELayer:
    layer = MoELayer(8, 6, 4, 2, 0, RouterConfig(), BalanceConfig())
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def run_and_differentiate(layer: Callable, parameters: list[Tensor], x_BSD: Tensor) -> list[Tensor]:
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = layer(x_BSD, None)[0]
    return [y_BSD.detach(), *torch.autograd.grad(y_BSD.square().sum(), [x_BSD, *parameters])]


def test_layer_compiles_into_one_graph() -> None:
    layer, x_BSD = moe_layer(), normal(2, 7, 8, seed=1)
    parameters = list(layer.parameters())
    eager = run_and_differentiate(layer, parameters, x_BSD)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(run_and_differentiate(compiled, parameters, x_BSD), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layer_under_checkpointing(reentrant: bool) -> None:
    layer, x_BSD = moe_layer(), normal(2, 7, 8, seed=1)
    parameters = list(layer.parameters())

    def recomputed(x: Tensor, train: None) -> tuple[Tensor, None]:
        return checkpoint(lambda t: layer(t, train)[0], x, use_reentrant=reentrant), None

    def gradients(function: Callable) -> list[Tensor]:
        x = x_BSD.clone().requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        function(x, None)[0].square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in parameters)]

    for a, b in zip(gradients(recomputed), gradients(layer), strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_go_through() -> None:
    """Shapes and dtypes of outputs and gradients without computing: what plans of memory and FLOPs run on."""
    with FakeTensorMode():
        plan = sort_by_expert(torch.zeros(9, 2, dtype=torch.int64), 4)
        x_TD, v_R = torch.empty(9, 6, dtype=torch.bfloat16, requires_grad=True), torch.empty(18, requires_grad=True)
        up, down = torch.empty(4, 10, 6, requires_grad=True), torch.empty(4, 6, 5, requires_grad=True)
        y_TD = unpermute(expert_mlp(x_TD, up, down, v_R, plan.counts_E, plan=plan), plan)
        w_ED = torch.empty(4, 6, requires_grad=True)
        z_TE = router_logits(y_TD, w_ED)
        assert (z_TE.shape, z_TE.dtype) == ((9, 4), torch.float32)
        z_TE.sum().backward(retain_graph=True)
        w_VD, b_V = (torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((11, 6), (11,)))
        loss = linear_cross_entropy(y_TD, w_VD, b_V, torch.zeros(9, dtype=torch.int64))
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        loss.backward()
        for leaf in (x_TD, up, down, v_R, w_ED, w_VD, b_V):
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
        assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, torch.bfloat16)


def saved_bytes(run: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, weights left out."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    for weight in weights:
        storages.pop(weight.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def test_bytes_saved_for_backward() -> None:
    """The counts of docs/kernels.md: tokens, the pre-activation and the routing, against a layer of single ops."""
    n_tokens, top_k, n_experts, d_model, d_ff = 256, 2, 4, 64, 96
    rows, bf16 = n_tokens * top_k, torch.bfloat16
    plan = sort_by_expert(expert_choices(n_tokens, top_k, n_experts), n_experts)
    x_TD, v_R = normal(n_tokens, d_model, seed=1, dtype=bf16).requires_grad_(), normal(rows, seed=2).requires_grad_()
    up = normal(n_experts, 2 * d_ff, d_model, seed=3, dtype=bf16).requires_grad_()
    down = normal(n_experts, d_model, d_ff, seed=4, dtype=bf16).requires_grad_()

    def fused(backward_weight_R: Tensor | None = None) -> Tensor:
        return unpermute(expert_mlp(x_TD, up, down, v_R, plan.counts_E, backward_weight_R, plan), plan)

    def naive() -> Tensor:
        h_R2F = grouped_gemm(permute(x_TD * 1, plan), up, plan.counts_E)
        act_RF = torch.nn.functional.silu(h_R2F[:, 0::2]) * h_R2F[:, 1::2]
        return unpermute(grouped_gemm(act_RF, down, plan.counts_E) * v_R[:, None], plan)

    routing = 8 * rows * 2 + 8 * n_experts + 4 * rows  # source, place; counts; v
    two_bytes = 2 * (n_tokens * d_model + rows * 2 * d_ff)  # x, h
    assert saved_bytes(fused, [up, down]) == two_bytes + routing
    assert saved_bytes(lambda: fused(torch.ones(rows)), [up, down]) == two_bytes + routing + 4 * rows
    beyond_h = 2 * rows * (d_model + d_ff)  # sorted x and act
    # silu(gate) too, y in two dtypes: how many copies a layer of single ops keeps depends on how it is written.
    assert saved_bytes(naive, [up, down]) >= two_bytes - 2 * n_tokens * d_model + beyond_h + 2 * rows * d_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_router_saves_its_input_as_it_is(dtype: torch.dtype) -> None:
    """No wide copy of the tokens: of T × D numbers only the given ones are kept, which the experts keep, too."""
    router = Router(48, 4, 2, 0, RouterConfig(mask_eps=0.3))
    torch.nn.init.normal_(router.weight, std=0.1)
    x_TD, kept = normal(64, 48, seed=1, dtype=dtype).requires_grad_(), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z_TE, routing = router(x_TD, Draws(0, 0, torch.arange(64)))
    tokens = [t for t in kept if t.numel() >= x_TD.numel()]
    assert {t.untyped_storage().data_ptr() for t in tokens} == {x_TD.untyped_storage().data_ptr()}
    assert saved_bytes(lambda: router_logits(x_TD, router.weight), [router.weight]) == x_TD.untyped_storage().nbytes()
    wide = saved_bytes(lambda: torch.nn.functional.linear(x_TD.float() * 1, router.weight), [router.weight])
    assert wide == 4 * x_TD.numel()
    (z_TE.sum() + routing.weight_TK.sum()).backward()
    assert x_TD.grad.dtype == dtype


def test_plan_gives_what_rows_give() -> None:
    arguments = mlp_arguments(with_plan=True, own_backward_weight=True)
    plan = sort_by_expert(expert_choices(9, 2, 4), 4)
    inside, outside = ([t.detach().clone().requires_grad_() for t in arguments[:4]] for _ in range(2))
    y_R = expert_mlp(*inside, plan.counts_E, arguments[4], plan)
    expected_R = expert_mlp(permute(outside[0], plan), *outside[1:], plan.counts_E, arguments[4])
    assert torch.equal(y_R, expected_R)
    for y in (y_R, expected_R):
        y.square().sum().backward()
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a.grad, b.grad)
    with pytest.raises(ValueError, match=r"the plan sorts 9 tokens, x \(8, 6\) holds 8"):
        expert_mlp(inside[0][:8], *inside[1:], plan.counts_E, None, plan)


def test_wgrad_into_main_gradients() -> None:
    counts, x, dy = torch.tensor([2, 0, 3]), normal(5, 6, seed=1), normal(5, 4, seed=2)
    into = normal(3, 4, 6, seed=3)
    expected = into + k_grouped_wgrad(dy, x, counts)
    assert k_grouped_wgrad(dy, x, counts, accumulate_into=into) is into
    torch.testing.assert_close(into, expected)
    for wrong in (into.bfloat16(), into[:2], into.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(ValueError, match=r"accumulate_into .* must be contiguous torch.float32 of shape \(3, 4, 6\)"):
            k_grouped_wgrad(dy, x, counts, accumulate_into=wrong)
