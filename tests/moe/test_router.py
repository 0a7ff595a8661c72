"""The routers: transformers' phimoe as a second opinion, masks, sampling, dependence on position, precision, the other recipes.

Shape suffixes: T tokens, E experts, K experts per token, D model width, F expert width.
"""

import math
from types import ModuleType

import pytest
import torch
from router_models import moe_layer
from torch import Tensor

from megagrin import rng
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, Router, RouterConfig, dropped_by_code, dropped_by_paper, sample, sparsemixer

torch.set_num_threads(1)

KINDS = ("sparsemixer_v2", "sparsemixer_v2_star")


def draws(n_tokens: int, seed: int = 3, step: int = 0, first: int = 0) -> Draws:
    return Draws(seed, step, torch.arange(first, first + n_tokens))


def bernoulli_of(words_TW: Tensor) -> list[list[bool]]:
    """B of SparseMixer-v2 for each token and two rounds, from the words themselves: word / 2^32 < 1/4."""
    return [[word / 2**32 < 1 / 4 for word in row[1:4:2]] for row in words_TW.tolist()]


def phimoe() -> ModuleType:
    return pytest.importorskip("transformers.models.phimoe.modeling_phimoe")


class GivenDraws:
    """Makes phimoe's sampling take our draws: its exponential noise favours our expert, its uniform number gives our B."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, experts_TK: Tensor, bits: list[list[bool]], n_experts: int) -> None:
        self.noise = iter(
            torch.ones(len(bits), n_experts, dtype=torch.float64).scatter(1, experts_TK[:, k : k + 1], 1e-300)
            for k in range(experts_TK.shape[1])
        )
        self.uniform = iter([torch.where(torch.tensor(bits)[:, k : k + 1], 0.9, 0.1) for k in range(experts_TK.shape[1])])
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda _tensor: next(self.noise))
        monkeypatch.setattr(torch, "rand_like", lambda _tensor: next(self.uniform))
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor)

    def all_used(self) -> bool:
        return next(self.noise, None) is None and next(self.uniform, None) is None


def test_routing_equals_phimoe_given_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    hf, n, n_experts = phimoe(), 2000, 16
    generator = torch.Generator().manual_seed(5)
    z_TE = torch.randn(n, n_experts, dtype=torch.float64, generator=generator)
    dweight_TK = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    words_TW = rng.routing_words(1, 1, 1, torch.arange(n), 1)
    ours = z_TE.clone().requires_grad_()
    routing = sparsemixer(ours, 2, RouterConfig(mask_eps=0.3), words_TW)
    routing.weight_TK.backward(dweight_TK)

    given = GivenDraws(monkeypatch, routing.expert_TK, bernoulli_of(words_TW), n_experts)
    theirs = z_TE.clone().requires_grad_()
    multiplier_TK, expert_TK = hf.sparsemixer(theirs, jitter_eps=0.3, training=True)
    multiplier_TK.backward(dweight_TK)
    assert given.all_used()
    assert torch.equal(expert_TK, routing.expert_TK)
    # They write 0.3333 and 0.6667 for 1/3 and 2/3 in the forward value; the gradient does not see it.
    torch.testing.assert_close(routing.weight_TK, multiplier_TK, rtol=1.1e-4, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)
    assert (routing.expert_TK[:, 0] != z_TE.argmax(-1)).float().mean() > 0.2  # it does sample


def halves(gate_up: Tensor) -> Tensor:
    """Gate rows before up rows, as phimoe holds them; ours alternate."""
    return torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), dim=1)


def phimoe_block(layer: MoELayer) -> torch.nn.Module:
    hf = phimoe()
    n_experts, d_ff, d_model = layer.experts.gate_up_proj.shape[0], layer.experts.down_proj.shape[2], layer.router.weight.shape[1]
    config = hf.PhimoeConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_local_experts=n_experts,
        router_jitter_noise=layer.router.config.mask_eps,
        input_jitter_noise=0.0,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config._experts_implementation = "eager"
    block = hf.PhimoeSparseMoeBlock(config).double()
    state = {
        "router.weight": layer.router.weight,
        "experts.gate_up_proj": halves(layer.experts.gate_up_proj),
        "experts.down_proj": layer.experts.down_proj,
    }
    block.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return block


@pytest.mark.parametrize("expert_gradient", ["code", "paper"])
def test_layer_equals_phimoe_block_given_the_same_draws(monkeypatch: pytest.MonkeyPatch, expert_gradient: str) -> None:
    """Mode `code` has the block's gradients; mode `paper` differs in the experts' alone, by ω against 1."""
    n, config = 64, RouterConfig(mask_eps=0.3, expert_gradient=expert_gradient)
    layer = moe_layer(8, 6, 4, 2, config, seed=4)
    block = phimoe_block(layer).train()
    generator = torch.Generator().manual_seed(6)
    x_BSD, dy_BSD = (torch.randn(2, n // 2, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    train = TrainRouting(draws(n), n, torch.full((1, 8), 1 / 8))
    ours, theirs = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    y_BSD, _ = layer(ours, train)
    y_BSD.backward(dy_BSD)
    _, routing = layer.router(x_BSD.flatten(0, 1), train.draws)
    bits = bernoulli_of(rng.routing_words(3, 0, 0, train.draws.token_T, 1))
    given = GivenDraws(monkeypatch, routing.expert_TK, bits, 8)
    y_theirs = block(theirs)
    y_theirs.backward(dy_BSD)
    assert given.all_used()

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).detach().norm() / b.detach().norm())

    assert distance(y_BSD, y_theirs) < 1e-4
    assert distance(layer.router.weight.grad, block.router.weight.grad) < 1e-12
    ours_theirs = {
        "gate_up_proj": (halves(layer.experts.gate_up_proj.grad), block.experts.gate_up_proj.grad),
        "down_proj": (layer.experts.down_proj.grad, block.experts.down_proj.grad),
    }
    for name, pair in ours_theirs.items():
        apart = distance(*pair)
        assert apart < 1e-4 if expert_gradient == "code" else apart > 0.05, name
    assert (distance(ours.grad, theirs.grad) < 1e-4) == (expert_gradient == "code")


def awkward_logits() -> Tensor:
    """fp32 logits: ordinary, negative, zero, tied, huge, tiny, and at the very edge of the mask."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(20000, 16, generator=generator) * scale for scale in (0.01, 1, 30)]
    rows += [-rows[1].abs() - 0.1, rows[1].round(), -rows[1].abs().round(), rows[1] * 1e30, rows[1] * 1e-42]
    best = torch.rand(40000, 1, generator=generator) * 4 + 0.01
    ulps = torch.randint(-3, 4, (40000, 15), generator=generator)
    edge = (best * (1 - 0.02)).expand(-1, 15).contiguous()
    rows.append(torch.cat([best, (edge.view(torch.int32) + ulps.int()).view(torch.float32)], dim=1))
    negative_edge = (-best / (1 - 0.02)).expand(-1, 15).contiguous()
    rows.append(torch.cat([-best, (negative_edge.view(torch.int32) + ulps.int()).view(torch.float32)], dim=1))
    extreme = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45])
    rows.append(extreme[torch.randint(0, 8, (20000, 16), generator=generator)])
    rows.append(torch.zeros(1, 16))
    rows.append(torch.full((1, 16), -7.0))
    return torch.cat(rows)


def test_inference_equals_phimoe_bit_for_bit() -> None:
    z_TE = awkward_logits()
    multiplier_TK, expert_TK = phimoe().sparsemixer(z_TE, jitter_eps=0.01, training=False)
    for kind, top_k in (("sparsemixer_v2", 2), ("sparsemixer_v2", 1)):
        routing = sparsemixer(z_TE, top_k, RouterConfig(kind=kind), None)
        assert routing.backward_weight_TK is None
        assert torch.equal(routing.expert_TK, expert_TK[:, :top_k])
        assert torch.equal(routing.weight_TK, multiplier_TK[:, :top_k])
    assert torch.isfinite(routing.weight_TK).all()


def test_mask_rules_on_hand_made_logits() -> None:
    z = torch.tensor([[1.0, 0.98, 0.979, 0.0, -1.0], [-1.0, -1.02, -1.03, -2.0, -1.0]], dtype=torch.float64)
    # code: (z* − z_i)/max(|z_i|, z*) ≤ 0.02, so 0.98 of 1.0 stays; of negative logits −1 the limit is −1/0.98 = −1.0204.
    assert dropped_by_code(z, 0.0100001).tolist() == [[False, False, True, True, True], [False, False, True, True, False]]
    # paper: z* − z_i ≤ 0.01·(|z_i| + |z*|): the limit is 0.99/1.01 = 0.98020 of 1.0, and 1.01/0.99 = −1.0202 of −1.0.
    assert dropped_by_paper(z, 0.01).tolist() == [[False, True, True, True, True], [False, False, True, True, False]]


def test_mask_is_formed_anew_over_what_remains() -> None:
    """Round one sees one expert far ahead; once it is drawn, the next two are close together and both can be drawn."""
    z_TE = torch.tensor([[10.0, 2.0, 1.99, 1.0]], dtype=torch.float64).repeat(4000, 1)
    words_TW = rng.routing_words(0, 0, 0, torch.arange(4000), 1)
    routing = sparsemixer(z_TE, 2, RouterConfig(), words_TW)
    assert (routing.expert_TK[:, 0] == 0).all()
    assert torch.equal(routing.expert_TK[:, 1].unique(), torch.tensor([1, 2]))


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected)[p > 0].sum())


def test_sampled_frequencies_follow_p() -> None:
    n, generator = 200_000, torch.Generator().manual_seed(8)
    for scale in (0.1, 1.0, 3.0):
        p_E = torch.softmax(scale * torch.randn(16, generator=generator), -1)
        drawn_T = sample(p_E.expand(n, 16), rng.routing_words(2, 3, 4, torch.arange(n), 1)[:, 0])
        assert chi_square(torch.bincount(drawn_T, minlength=16).double(), p_E.double()) < 44.3  # 15 degrees: 1e-4


def test_impossible_experts_are_never_drawn() -> None:
    words_T = torch.cat([torch.tensor([0, 1, (1 << 32) - 1, 1 << 31]), torch.randint(0, 1 << 32, (5000,))])
    for p in ([0, 0, 1, 0], [0.5, 0, 0.5, 0], [0, 1e-5, 0, 1 - 1e-5], [1, 0, 0, 0], [0, 0, 0, 1]):
        p_TE = torch.tensor([p], dtype=torch.float32).expand(len(words_T), 4)
        drawn_T = sample(p_TE, words_T)
        assert (p_TE.gather(1, drawn_T.unsqueeze(1)) > 0).all()


@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_distinct_experts_and_finite_weights(kind: str, mask_rule: str) -> None:
    z_TE = awkward_logits()[::7]
    words_TW = rng.routing_words(1, 0, 0, torch.arange(z_TE.shape[0]), 2)
    words_TW[:50], words_TW[50:100] = 0, (1 << 32) - 1
    for top_k in (1, 2, 3, 4):
        for words in (words_TW, None):
            routing = sparsemixer(z_TE, top_k, RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.3), words)
            assert torch.isfinite(routing.weight_TK).all()
            assert (routing.weight_TK > 0).all()
            ordered = routing.expert_TK.sort(dim=1).values
            assert (ordered[:, 1:] != ordered[:, :-1]).all()
            assert ordered.min() >= 0
            assert ordered.max() < 16


def test_every_expert_can_be_taken() -> None:
    z_TE = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    routing = sparsemixer(z_TE, 4, RouterConfig(), rng.routing_words(0, 0, 0, torch.arange(500), 2))
    assert torch.equal(routing.expert_TK.sort(1).values, torch.arange(4).expand(500, 4))
    routing.weight_TK.sum().backward()
    assert torch.isfinite(z_TE.grad).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_break_the_weights_not_the_indices(bad: float) -> None:
    """A NaN or an infinity must surface as a non-finite loss, not as an index out of range (on CUDA: a dead process)."""
    z_TE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    z_TE[::2, 3] = bad
    z_TE[::4] = bad
    words_TW = rng.routing_words(0, 0, 0, torch.arange(64), 1)
    for kind in KINDS:
        for words in (words_TW, None):
            routing = sparsemixer(z_TE, 2, RouterConfig(kind=kind), words)
            assert routing.expert_TK.min() >= 0
            assert routing.expert_TK.max() < 16
            assert torch.isnan(routing.weight_TK[::4]).all()
            assert torch.isfinite(routing.weight_TK[1::2]).all()


def make_router(config: RouterConfig, top_k: int = 2, d_model: int = 32, n_experts: int = 8) -> Router:
    router = Router(d_model, n_experts, top_k, 5, config)
    torch.nn.init.normal_(router.weight, std=0.02, generator=torch.Generator().manual_seed(9))
    return router


@pytest.mark.parametrize("kind", [*KINDS, "gshard"])
def test_routing_follows_the_token_not_the_batch(kind: str) -> None:
    router = make_router(RouterConfig(kind=kind, mask_eps=0.5, input_jitter=0.3))
    x_TD = torch.randn(200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    router.double()
    _, whole = router(x_TD, draws(200))

    order = torch.randperm(200, generator=torch.Generator().manual_seed(11))
    _, permuted = router(x_TD[order], Draws(3, 0, order))
    assert torch.equal(permuted.expert_TK, whole.expert_TK[order])
    torch.testing.assert_close(permuted.weight_TK, whole.weight_TK[order])
    halves = [router(x_TD[at : at + 100], draws(100, first=at))[1] for at in (0, 100)]
    assert torch.equal(torch.cat([half.expert_TK for half in halves]), whole.expert_TK)
    # And it does depend on seed, step and layer.
    other_layer = make_router(router.config).double()
    other_layer.layer = 6
    for changed in (router(x_TD, draws(200, seed=4)), router(x_TD, draws(200, step=1)), other_layer(x_TD, draws(200))):
        assert not torch.equal(changed[1].expert_TK, whole.expert_TK)


def test_inference_does_not_draw() -> None:
    for kind in (*KINDS, "gshard"):
        router = make_router(RouterConfig(kind=kind, mask_eps=0.5, input_jitter=0.3))
        x_TD = torch.randn(100, 32, generator=torch.Generator().manual_seed(12))
        z_TE, routing = router(x_TD, None)
        assert torch.equal(routing.expert_TK, z_TE.topk(2).indices)
        assert torch.equal(z_TE, x_TD @ router.weight.T)


@pytest.mark.parametrize("autocast", [False, True])
def test_routing_runs_in_fp32_under_bf16(autocast: bool) -> None:
    router = make_router(RouterConfig(), d_model=512)
    x_TD = torch.randn(64, 512, generator=torch.Generator().manual_seed(13)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z_TE, routing = router(x_TD, draws(64))
    assert z_TE.dtype == routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(z_TE, (x_TD.double() @ router.weight.double().T).float(), rtol=1e-5, atol=1e-6)
    z_narrow, _ = router.bfloat16()(x_TD, draws(64))
    assert z_narrow.dtype == torch.float32
    torch.testing.assert_close(z_narrow, (x_TD.double() @ router.weight.double().T).float(), rtol=1e-5, atol=1e-6)


def test_gshard_weights_and_gradients() -> None:
    config = RouterConfig(kind="gshard", input_jitter=0.2)
    router = make_router(config, d_model=10).double()
    router.weight.data *= 30
    x_TD = torch.randn(50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(14), requires_grad=True)
    dweight_TK = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(15))
    z_TE, routing = router(x_TD, draws(50))
    assert routing.backward_weight_TK is None
    routing.weight_TK.backward(dweight_TK)

    words_TD = rng.routing_words(3, 0, 5, torch.arange(50), 3)[:, :10]
    noise_TD = 1 + 0.2 * (2 * (((words_TD >> 9).double() + 0.5) / 2**23) - 1)
    assert noise_TD.min() > 0.8
    assert noise_TD.max() < 1.2
    jittered_TD = x_TD.detach() * noise_TD
    p_TE = torch.softmax(jittered_TD @ router.weight.detach().T, -1)
    torch.testing.assert_close(z_TE, jittered_TD @ router.weight.T, rtol=1e-6, atol=1e-6)  # noise is rounded to fp32
    assert torch.equal(routing.expert_TK, p_TE.topk(2).indices)
    torch.testing.assert_close(routing.weight_TK, p_TE.topk(2).values, rtol=1e-6, atol=1e-7)
    dz_TE = torch.zeros_like(p_TE)
    for t in range(50):
        for k, expert in enumerate(routing.expert_TK[t].tolist()):
            hot_E = torch.nn.functional.one_hot(torch.tensor(expert), 8)
            dz_TE[t] += dweight_TK[t, k] * p_TE[t, expert] * (hot_E - p_TE[t])
    torch.testing.assert_close(router.weight.grad, dz_TE.T @ jittered_TD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x_TD.grad, dz_TE @ router.weight.detach() * noise_TD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "gshard"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_forced_balance_is_exact(kind: str, top_k: int) -> None:
    router = make_router(RouterConfig(kind=kind, forced_balance=True), top_k)
    router.weight.data[0] += 100  # however skewed the logits
    x_TD = torch.randn(64, 32, generator=torch.Generator().manual_seed(16))
    z_TE, routing = router(x_TD, draws(64))
    assert torch.equal(torch.bincount(routing.expert_TK.flatten(), minlength=8), torch.full((8,), 64 * top_k // 8))
    assert (routing.expert_TK.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(routing.weight_TK, torch.softmax(z_TE, -1).gather(1, routing.expert_TK))
    assert routing.weight_TK.requires_grad


def test_violations_name_field_value_and_rule() -> None:
    assert RouterConfig().violations() == []
    assert RouterConfig(mask_eps=0.0, input_jitter=1.0).violations() == [
        "router.mask_eps: 0.0 must lie in (0, 1)",
        "router.input_jitter: 1.0 must lie in [0, 1)",
    ]
