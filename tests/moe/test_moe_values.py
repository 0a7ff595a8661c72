"""Settings of routers and losses: the published values, what a border admits, and estimators as the paper writes them."""

import math

import pytest
import torch

from megagrin.moe.balance import BalanceConfig, GlobalCounts, attach, load_fraction
from megagrin.moe.router import Draws, Router, RouterConfig, gshard, round_robin, sample, sparsemixer


def test_defaults_are_the_published_ones() -> None:
    """The mask of the released weights, from transformers; the rest as the docs say."""
    phimoe = pytest.importorskip("transformers").PhimoeConfig()
    router, balance = RouterConfig(), BalanceConfig()
    assert router.mask_eps == phimoe.router_jitter_noise == 0.01
    assert (router.kind, router.mask_rule, router.expert_gradient) == ("sparsemixer_v2", "code", "paper")
    assert router.forced_balance is False
    assert (balance.scope, balance.coef, balance.z_coef) == ("batch", 0.01, 0.0)


def test_borders_of_the_settings() -> None:
    """Open and closed ends of the intervals that the messages name."""
    assert RouterConfig(mask_eps=1e-9, input_jitter=0.0).violations() == []
    assert RouterConfig(mask_eps=1 - 1e-9, input_jitter=1 - 1e-9).violations() == []
    for eps in (-1e-9, 0.0, 1.0, 1.5):
        assert RouterConfig(mask_eps=eps).violations() == [f"router.mask_eps: {eps} must lie in (0, 1)"]
    for jitter in (-1e-9, 1.0, 1.5):
        assert RouterConfig(input_jitter=jitter).violations() == [f"router.input_jitter: {jitter} must lie in [0, 1)"]
    assert BalanceConfig(coef=0.0, z_coef=0.0).violations() == []
    assert BalanceConfig(z_coef=-1e-9).violations() == ["balance.z_coef: -1e-09 must not be negative"]


@pytest.mark.parametrize(
    ("kind", "temperature", "bernoulli", "gradient"),
    [("sparsemixer_v2", 1, 1 / 4, 1), ("sparsemixer_v2_star", 2, 5 / 8, 2)],
)
def test_weights_are_those_of_the_algorithm(kind: str, temperature: float, bernoulli: float, gradient: float) -> None:
    """Algorithms 1 and 2 with the random words given: ω = max(δ, (1 + 2B)/3), h = p_D, c·p_D for the backward pass."""
    z_E = torch.tensor([1.0, 0.9, 0.2], dtype=torch.float64)  # r = 0.3: of 1.0 the code's rule keeps 0.4 and above
    e = [math.exp(z / temperature) for z in (1.0, 0.9)]
    p = [e[0] / sum(e), e[1] / sum(e), 0.0]
    below = int(bernoulli * 2**32)
    for expert_word in (0, (1 << 32) - 1):  # the first and the last possible expert
        for bit_word in (0, below - 1, below, (1 << 32) - 1):
            routing = sparsemixer(
                z_E.unsqueeze(0), 1, RouterConfig(kind=kind, mask_eps=0.3), torch.tensor([[expert_word, bit_word]])
            )
            drawn = 0 if expert_word == 0 else 1
            assert routing.expert_TK.tolist() == [[drawn]]
            omega = 1 if drawn == 0 or bit_word < below else 1 / 3
            assert routing.weight_TK.item() == pytest.approx(omega * p[drawn], rel=1e-14)
            assert routing.backward_weight_TK.item() == pytest.approx(gradient * p[drawn], rel=1e-14)


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    """Words at the very borders of [0, 0.25), [0.25, 0.75), [0.75, 1)."""
    words = [0, (1 << 30) - 1, 1 << 30, 3 * (1 << 30) - 1, 3 * (1 << 30), (1 << 32) - 1]
    p_TE = torch.tensor([0.25, 0.5, 0.25]).expand(len(words), 3)
    assert sample(p_TE, torch.tensor(words)).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_control_recipes_by_hand() -> None:
    z_TE = torch.tensor([[0.0, math.log(2), math.log(5)], [math.log(6), 0.0, 0.0]], dtype=torch.float64)
    routing = gshard(z_TE, 2)
    assert routing.expert_TK[0].tolist() == [2, 1]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[5 / 8, 2 / 8], [6 / 8, 1 / 8]], dtype=torch.float64))
    routing = round_robin(z_TE, 2)
    assert routing.expert_TK.tolist() == [[0, 1], [2, 0]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[1 / 8, 2 / 8], [1 / 8, 6 / 8]], dtype=torch.float64))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_router_draws_with_the_words_of_its_address(top_k: int) -> None:
    """Two rounds share a block of four words; an odd last round has one of its own."""
    from megagrin import rng

    config = RouterConfig(mask_eps=0.5)
    router = Router(5, 6, top_k, 7, config).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x_TD = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    token_T = torch.arange(100, 140)
    z_TE, routing = router(x_TD, Draws(3, 4, token_T))
    torch.testing.assert_close(z_TE, x_TD @ router.weight.T)
    words_TW = rng.routing_words(3, 4, 7, token_T, 2)
    given = sparsemixer(z_TE, top_k, config, words_TW)
    assert torch.equal(routing.expert_TK, given.expert_TK)
    assert torch.equal(routing.weight_TK, given.weight_TK)
    assert torch.equal(routing.backward_weight_TK, given.backward_weight_TK)


def test_load_fractions_keep_dtype_and_shape() -> None:
    """Rows per expert over all rows, each layer by itself; a layer without rows counts as balanced."""
    f_LE = load_fraction(torch.tensor([[1, 3], [0, 0]]), torch.float64)
    assert f_LE.dtype == torch.float64
    assert f_LE.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert load_fraction(torch.tensor([1])).dtype == torch.float32
    assert load_fraction(torch.tensor([1, 0])).tolist() == [1.0, 0.0]


def test_counts_of_a_group_of_one_are_its_own() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        counts_E = torch.tensor([3, 1])
        counts = GlobalCounts(counts_E, torch.distributed.group.WORLD)
        y_TD = torch.zeros(2, 2, dtype=torch.float64)
        prob_sum_E = torch.ones(2, dtype=torch.float64, requires_grad=True)
        z_sum = torch.ones((), dtype=torch.float64, requires_grad=True)
        attach(y_TD, prob_sum_E, z_sum, counts, BalanceConfig(coef=0.3, z_coef=0.7), 10).sum().backward()
        # α·n·f_i/T and z_coef/T, in the dtype of the probabilities
        torch.testing.assert_close(prob_sum_E.grad, torch.tensor([0.3 * 2 * 0.75 / 10, 0.3 * 2 * 0.25 / 10], dtype=torch.float64))
        assert z_sum.grad.item() == pytest.approx(0.07, rel=1e-15)
        assert counts.fraction(torch.float64).tolist() == [0.75, 0.25]  # and once more, after it was waited for
        assert counts_E.tolist() == [3, 1]
    finally:
        torch.distributed.destroy_process_group()
