"""Balance loss and z-loss: value, gradient, scope, and a scale that does not depend on how the batch is cut.

Shape suffixes: T tokens, E experts, D model width, L layers.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool
from torch import Tensor

from megagrin.moe.balance import BalanceConfig, GlobalCounts, attach, balance_loss, load_fraction, z_term
from megagrin.moe.layer import MoELayer, RouterStats, TrainRouting
from megagrin.moe.router import Draws, RouterConfig

torch.set_num_threads(1)

E, D = 8, 6


def logits(n_tokens: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("n_experts", [2, 16, 64])
def test_loss_is_one_when_balanced(n_experts: int, top_k: int) -> None:
    f_E = load_fraction(torch.full((n_experts,), 5 * top_k))
    assert balance_loss(f_E, torch.full((n_experts,), 1 / n_experts)) == pytest.approx(1, rel=1e-6)


def test_loss_of_hand_made_loads() -> None:
    counts_LE = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    mean_prob_LE = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    f_LE = load_fraction(counts_LE, torch.float64)
    # 4·(0.75·0.5 + 0.25·0.3) = 1.8, and 1 for balanced counts whatever the probabilities
    torch.testing.assert_close(balance_loss(f_LE, mean_prob_LE), torch.tensor([1.8, 1.0], dtype=torch.float64))
    collapsed = balance_loss(load_fraction(torch.tensor([9, 0, 0, 0])), torch.tensor([1.0, 0, 0, 0]))
    assert collapsed == 4


def test_no_rows_count_as_balanced() -> None:
    assert load_fraction(torch.zeros(3, dtype=torch.int64), torch.float64).tolist() == [1 / 3] * 3
    assert load_fraction(torch.zeros(4, dtype=torch.int64)).tolist() == [0.25] * 4


def test_counts_beyond_fp32_integers_stay_fractions() -> None:
    f_E = load_fraction(torch.tensor([(1 << 40) + 1, (1 << 40) - 1]))
    assert f_E.sum() == 1
    assert f_E.tolist() == [0.5, 0.5]


def test_attach_adds_the_written_out_gradient_and_changes_no_value() -> None:
    config, tokens = BalanceConfig(coef=0.03, z_coef=0.002), 100
    f_E = load_fraction(torch.tensor([5, 0, 1, 9, 30, 2, 2, 31]), torch.float64)
    x_TD = torch.randn(40, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dy_TD = torch.randn(40, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def output(z_TE: Tensor) -> Tensor:
        return z_TE.sin() * x_TD

    z_TE = logits().requires_grad_()
    y_TD = output(z_TE)
    attached_TD = attach(y_TD, torch.softmax(z_TE, -1).sum(0), z_term(z_TE), f_E, config, tokens)
    assert torch.equal(attached_TD, y_TD)
    attached_TD.backward(dy_TD)

    plain = logits().requires_grad_()
    p_TE = plain.exp() / plain.exp().sum(-1, keepdim=True)
    balance = 0.03 * E * (f_E * p_TE.sum(0) / tokens).sum()
    z_loss = 0.002 * plain.exp().sum(-1).log().pow(2).sum() / tokens
    ((output(plain) * dy_TD).sum() + balance + z_loss).backward()
    torch.testing.assert_close(z_TE.grad, plain.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("coef", "z_coef"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_zero_coefficients_switch_a_loss_off(coef: float, z_coef: float) -> None:
    z_TE = logits().requires_grad_()
    y_TD = torch.zeros(40, D, dtype=torch.float64, requires_grad=True)
    p_E, z_sum = torch.softmax(z_TE, -1).sum(0), z_term(z_TE)
    f_E = torch.linspace(0, 1, E, dtype=torch.float64)
    attach(y_TD, p_E, z_sum, f_E, BalanceConfig(coef=coef, z_coef=z_coef), 40).sum().backward()
    assert torch.equal(y_TD.grad, torch.ones_like(y_TD))
    expected = torch.zeros_like(z_TE)
    if coef or z_coef:
        plain = logits().requires_grad_()
        (coef * E / 40 * (f_E * torch.softmax(plain, -1).sum(0)).sum() + z_coef / 40 * z_term(plain)).backward()
        expected = plain.grad
        assert expected.abs().max() > 1e-4
    torch.testing.assert_close(z_TE.grad, expected, rtol=1e-12, atol=0)


def test_z_term_against_its_formula() -> None:
    z_TE = logits().requires_grad_()
    z_term(z_TE).backward()
    lse_T1 = z_TE.detach().exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(z_TE.grad, 2 * lse_T1 * torch.softmax(z_TE.detach(), -1), rtol=1e-12, atol=1e-14)
    assert torch.isfinite(z_term(1e4 * logits()))


def moe_layer(balance: BalanceConfig) -> MoELayer:
    layer = MoELayer(D, 4, E, 2, 0, RouterConfig(mask_eps=0.4), balance).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def balance_gradients(
    scope: str, micro_batches: int, previous_f_LE: Tensor, n_tokens: int = 48
) -> tuple[Tensor, list[RouterStats]]:
    """Gradient of the router from balance loss and z-loss alone, summed over equal micro-batches of one global batch."""
    layer = moe_layer(BalanceConfig(scope=scope, coef=0.7, z_coef=0.01))
    x_BSD = torch.randn(n_tokens, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    index_T = torch.arange(n_tokens)
    stats = []
    for x_bSD, index_t in zip(x_BSD.chunk(micro_batches), index_T.chunk(micro_batches), strict=True):
        y_bSD, stat = layer(x_bSD, TrainRouting(Draws(1, 0, index_t), n_tokens, previous_f_LE))
        y_bSD.backward(torch.zeros_like(y_bSD))  # nothing but the attached losses
        stats.append(stat)
    assert layer.experts.down_proj.grad.abs().max() == 0
    return layer.router.weight.grad, stats


def test_scope_batch_does_not_depend_on_the_cut() -> None:
    previous_f_LE = torch.softmax(logits(1, seed=5), -1)
    whole, (whole_stats,) = balance_gradients("batch", 1, previous_f_LE)
    for micro_batches in (2, 3, 16, 48):
        parts, stats = balance_gradients("batch", micro_batches, previous_f_LE)
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)
        assert torch.equal(sum(s.counts_E for s in stats), whole_stats.counts_E)
        torch.testing.assert_close(sum(s.prob_sum_E for s in stats), whole_stats.prob_sum_E)
        torch.testing.assert_close(sum(s.z_sum for s in stats), whole_stats.z_sum)
    # The previous step's load is what counts.
    other, _ = balance_gradients("batch", 1, previous_f_LE.flip(-1))
    assert (other - whole).abs().max() > 1e-2


def written_out(scope: str, micro_batches: int, n_tokens: int = 48) -> Tensor:
    """Σ over micro-batches of α·n·Σ_i f_i·P_i/T and the z-loss, with f of each micro-batch's sampled experts."""
    layer = moe_layer(BalanceConfig(scope=scope, coef=0.0))
    x_TD = torch.randn(n_tokens, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).squeeze(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x_tD, index_t in zip(x_TD.chunk(micro_batches), torch.arange(n_tokens).chunk(micro_batches), strict=True):
        z_tE, routing = layer.router(x_tD, Draws(1, 0, index_t))
        f_E = torch.stack([(routing.expert_TK == e).double().sum() for e in range(E)]) / routing.expert_TK.numel()
        p_E = (z_tE.exp() / z_tE.exp().sum(-1, keepdim=True)).sum(0)
        loss = loss + 0.7 * E * (f_E * p_E).sum() / n_tokens + 0.01 * z_tE.exp().sum(-1).log().square().sum() / n_tokens
    loss.backward()
    return layer.router.weight.grad


@pytest.mark.parametrize("scope", ["local", "global"])  # without a group, global means this rank alone
@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_local_scope_uses_the_load_of_its_micro_batch(scope: str, micro_batches: int) -> None:
    ignored = torch.zeros(1, E)
    got, _ = balance_gradients(scope, micro_batches, ignored)
    torch.testing.assert_close(got, written_out(scope, micro_batches), rtol=1e-11, atol=1e-13)


def _loads_of_two_groups() -> tuple[list[float], list[float], list[int], Any]:
    """Ranks 0 and 1 share one load, rank 2 has one alone; asked twice. And the router's gradient under scope global."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[rank // 2]
    mine_E = torch.tensor([[6, 0, 0], [0, 3, 1], [0, 0, 5]])[rank]
    counts = GlobalCounts(mine_E, group)
    loads = counts.fraction(torch.float64).tolist(), counts.fraction(torch.float64).tolist()
    layer = moe_layer(BalanceConfig(scope="global", coef=0.7, z_coef=0.01))
    x_TD = torch.randn(48, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cut = slice(0, 20) if rank == 0 else slice(20, 48)
    y_TD, _ = layer(x_TD[cut], TrainRouting(Draws(1, 0, torch.arange(48)[cut]), 48, torch.zeros(1, E), group))
    y_TD.backward(torch.zeros_like(y_TD))
    return *loads, mine_E.tolist(), layer.router.weight.grad


def test_global_scope_sums_the_loads_of_its_group(gloo: GlooPool) -> None:
    """f over two unequal ranks is that of all their rows, another group's stay out, and a rank's own counts are not touched."""
    ranks = gloo.run(3, _loads_of_two_groups)
    for first, again, mine, _ in ranks[:2]:
        assert first == again == [0.6, 0.3, 0.1]
        assert sum(mine) in (6, 4)
    assert ranks[2][:2] == ([0, 0, 1], [0, 0, 1])
    summed = ranks[0][3] + ranks[1][3]
    torch.testing.assert_close(summed, written_out("global", 1), rtol=1e-11, atol=1e-13)


def test_counts_are_the_sampled_experts() -> None:
    layer = moe_layer(BalanceConfig())
    x_BSD = torch.randn(4, 50, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    index_T = torch.arange(200)
    _, stats = layer(x_BSD, TrainRouting(Draws(1, 0, index_T), 200, torch.full((1, E), 1 / E)))
    z_TE, routing = layer.router(x_BSD.flatten(0, 1), Draws(1, 0, index_T))
    assert stats.counts_E.dtype == torch.int64
    assert torch.equal(stats.counts_E, torch.bincount(routing.expert_TK.flatten(), minlength=E))
    assert not torch.equal(stats.counts_E, torch.bincount(z_TE.topk(2).indices.flatten(), minlength=E))
    assert not stats.prob_sum_E.requires_grad
    assert not stats.z_sum.requires_grad


def test_inference_attaches_nothing() -> None:
    layer = moe_layer(BalanceConfig(coef=1e6, z_coef=1e6))
    x_BSD = torch.randn(1, 20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    y_BSD, stats = layer(x_BSD, None)
    y_BSD.backward(torch.zeros_like(y_BSD))
    assert layer.router.weight.grad.abs().max() == 0
    assert stats.counts_E.sum() == 40


def test_violations_name_field_value_and_rule() -> None:
    assert BalanceConfig(coef=0.0).violations() == []
    assert BalanceConfig(coef=-0.1, z_coef=-1.0).violations() == [
        "balance.coef: -0.1 must not be negative",
        "balance.z_coef: -1.0 must not be negative",
    ]
