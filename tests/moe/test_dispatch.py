"""The token exchange inside one process: nothing is dropped, nothing is mixed up, rows come in a fixed order.

Shape suffixes: T tokens, K experts per token, R = T·K rows, D model width, E experts.
"""

import pytest
import torch
from torch import Tensor

from megagrin.kernels.permute import permute
from megagrin.moe.dispatch import Dispatched, LocalDispatch
from megagrin.moe.router import Routing

torch.set_num_threads(1)


def random_routing(n_tokens: int, top_k: int, n_experts: int, with_backward: bool, seed: int = 0) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k]
    weight_TK = torch.rand(n_tokens, top_k, dtype=torch.float64, generator=generator).requires_grad_()
    backward_TK = torch.rand(n_tokens, top_k, dtype=torch.float64, generator=generator) if with_backward else None
    x_TD = torch.randn(n_tokens, 5, dtype=torch.float64, generator=generator).requires_grad_()
    return x_TD, Routing(expert_TK, weight_TK, backward_TK)


def rows_of(sent: Dispatched) -> Tensor:
    """The rows as the experts see them; in one process they gather them themselves."""
    assert sent.plan is not None
    return permute(sent.x, sent.plan)


@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts"), [(1, 1, 1), (7, 2, 4), (33, 1, 8), (40, 8, 64), (0, 2, 4)])
def test_rows_come_by_expert_then_token(n_tokens: int, top_k: int, n_experts: int, with_backward: bool) -> None:
    x_TD, routing = random_routing(n_tokens, top_k, n_experts, with_backward)
    sent = LocalDispatch(n_experts).dispatch(x_TD, routing)
    rows = sorted(
        (routing.expert_TK[t, k].item(), t, k) for t in range(n_tokens) for k in range(top_k)
    )  # the order the docstring promises
    source = [t for _, t, _ in rows]
    assert sent.x is x_TD
    assert torch.equal(rows_of(sent), x_TD[source])
    assert sent.weight_R.tolist() == [routing.weight_TK[t, k].item() for _, t, k in rows]
    if with_backward:
        assert sent.backward_weight_R.tolist() == [routing.backward_weight_TK[t, k].item() for _, t, k in rows]
        assert not sent.backward_weight_R.requires_grad
    else:
        assert sent.backward_weight_R is None
    assert sent.counts_L.tolist() == [sum(e == expert for e, _, _ in rows) for expert in range(n_experts)]
    assert torch.equal(sent.counts_E, sent.counts_L)


@pytest.mark.parametrize("with_backward", [False, True])
def test_weights_and_rows_carry_their_gradients_home(with_backward: bool) -> None:
    """A per-row function of (x, weight, expert) after dispatch, against the same function token by token."""
    x_TD, routing = random_routing(30, 3, 6, with_backward)
    scale_ED = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dispatch = LocalDispatch(6)
    sent = dispatch.dispatch(x_TD, routing)
    expert_R = torch.repeat_interleave(torch.arange(6), sent.counts_L)
    y_RD = (rows_of(sent) * scale_ED[expert_R]).sin() * sent.weight_R.unsqueeze(1)
    y_TD = dispatch.combine(y_RD, sent)

    x_plain, weight_plain = (t.detach().clone().requires_grad_() for t in (x_TD, routing.weight_TK))
    plain_TKD = (x_plain.unsqueeze(1) * scale_ED[routing.expert_TK]).sin() * weight_plain.unsqueeze(2)
    torch.testing.assert_close(y_TD, plain_TKD.sum(1), rtol=1e-13, atol=1e-13)
    dy_TD = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y_TD.backward(dy_TD)
    plain_TKD.sum(1).backward(dy_TD)
    torch.testing.assert_close(x_TD.grad, x_plain.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(routing.weight_TK.grad, weight_plain.grad, rtol=1e-13, atol=1e-13)


def test_all_tokens_to_one_expert_lose_nothing() -> None:
    """No capacity: one expert takes every row, the others none, and the sum comes home complete."""
    n, dispatch = 1000, LocalDispatch(16)
    x_TD = torch.arange(n, dtype=torch.float64).unsqueeze(1).expand(n, 4).contiguous()
    routing = Routing(torch.full((n, 1), 11), torch.ones(n, 1, dtype=torch.float64), None)
    sent = dispatch.dispatch(x_TD, routing)
    assert sent.counts_L.tolist() == [n if expert == 11 else 0 for expert in range(16)]
    assert torch.equal(dispatch.combine(rows_of(sent), sent), x_TD)


def test_combining_repeats_bit_for_bit() -> None:
    x_TD, routing = random_routing(500, 4, 8, False)
    dispatch = LocalDispatch(8)
    results = []
    for _ in range(3):
        x = x_TD.detach().float().requires_grad_()
        sent = dispatch.dispatch(x, routing)
        y_TD = dispatch.combine(rows_of(sent) * 1.1, sent)
        y_TD.backward(x_TD.detach().float())
        results.append((y_TD.detach(), x.grad))
    for y_TD, dx_TD in results[1:]:
        assert torch.equal(y_TD, results[0][0])
        assert torch.equal(dx_TD, results[0][1])
