"""The fused router against the reference in fp64: draws bit for bit, weights, sums, gradients, the algorithm's closed forms.

Shape suffixes: T tokens, E experts, K experts per token, D model width.
"""

import dataclasses
import math

import pytest
import torch
from interpreted import poisoned_memory
from test_router import awkward_logits
from test_router_gradient import (
    MASK_EPS,
    CubicLoss,
    Z,
    bernoulli_of,
    d_log_p,
    enumerate_gradient,
    expert_table,
    replay,
)
from torch import Tensor, library

from megagrin import rng
from megagrin.kernels import sparsemixer_triton
from megagrin.kernels.sparsemixer import Routed
from megagrin.kernels.sparsemixer import sparsemixer as fused
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import _ESTIMATORS, Draws, Router, RouterConfig, Routing, sparsemixer

torch.set_num_threads(1)
# The interpreter computes with numpy, which warns of what broken and −∞ logits are meant to do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KINDS = ("sparsemixer_v2", "sparsemixer_v2_star")
# Everything that a counter holds is beyond 31 bits.
SEED, STEP, LAYER, FIRST = (1 << 64) - 3, (1 << 32) - 2, 0x80000001, (1 << 47) - 5


def big_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays per program, not per element."""
    monkeypatch.setattr(sparsemixer_triton, "_TILE", 1 << 17)


def logits(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))


def tokens(n_tokens: int) -> Tensor:
    return torch.arange(FIRST, FIRST + n_tokens)


def run_fused(z_TE: Tensor, top_k: int, config: RouterConfig, token_T: Tensor | None) -> Routed:
    rules = {"mask_rule": config.mask_rule, "mask_eps": config.mask_eps, **dataclasses.asdict(_ESTIMATORS[config.kind])}
    with poisoned_memory():
        return fused(z_TE, token_T, top_k=top_k, seed=SEED, step=STEP, layer=LAYER, **rules)


def run_reference(z_TE: Tensor, top_k: int, config: RouterConfig, token_T: Tensor | None) -> Routing:
    words_TW = None if token_T is None else rng.routing_words(SEED, STEP, LAYER, token_T, (top_k + 1) // 2)
    return sparsemixer(z_TE, top_k, config, words_TW)


@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_experts", "top_k"), [(16, 2), (5, 5), (128, 8)])
def test_draws_equal_the_reference_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, kind: str, mask_rule: str, n_experts: int, top_k: int
) -> None:
    big_tiles(monkeypatch)
    n, config = 60_000 // n_experts, RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.3)
    z_TE = logits(n, n_experts)
    ours, reference = run_fused(z_TE, top_k, config, tokens(n)), run_reference(z_TE, top_k, config, tokens(n))
    assert torch.equal(ours.expert_TK, reference.expert_TK)
    assert (ours.expert_TK[:, 0] != z_TE.argmax(-1)).float().mean() > 0.1  # it does sample
    torch.testing.assert_close(ours.weight_TK, reference.weight_TK, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.backward_weight_TK, reference.backward_weight_TK, rtol=1e-6, atol=1e-9)


def gradients_of(outputs: tuple[Tensor, Tensor, Tensor], z_TE: Tensor, upstream: list[Tensor]) -> Tensor:
    torch.autograd.backward(list(outputs), [t.to(out.dtype) for t, out in zip(upstream, outputs, strict=True)])
    assert z_TE.grad is not None
    return z_TE.grad


@pytest.mark.parametrize("draw", [True, False])
@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"), [(0, 4, 2), (1, 1, 1), (63, 16, 1), (65, 16, 2), (130, 5, 3), (9, 67, 7), (9, 128, 8)]
)
def test_values_and_gradients(
    n_tokens: int, n_experts: int, top_k: int, kind: str, mask_rule: str, draw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsemixer_triton, "_SUM_ROWS", 2)  # as if there were hundreds of blocks
    config = RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.3)
    token_T = tokens(n_tokens) if draw else None
    z_TE = logits(n_tokens, n_experts, seed=1).requires_grad_()
    exact_TE = z_TE.detach().double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(shape, generator=generator) for shape in ((n_tokens, top_k), (n_experts,), ())]
    routed = run_fused(z_TE, top_k, config, token_T)
    with poisoned_memory():
        dz_TE = gradients_of((routed.weight_TK, routed.prob_sum_E, routed.z_sum), z_TE, upstream)
    exact = run_reference(exact_TE, top_k, config, token_T)
    sums = torch.softmax(exact_TE, -1).sum(0), torch.logsumexp(exact_TE, -1).square().sum()
    exact_dz_TE = gradients_of((exact.weight_TK, *sums), exact_TE, upstream)

    assert torch.equal(routed.expert_TK, exact.expert_TK)
    assert torch.equal(routed.counts_E, torch.bincount(exact.expert_TK.flatten(), minlength=n_experts))
    c = _ESTIMATORS[kind].gradient if draw else 1.0
    expected_backward_TK = exact.weight_TK * c if exact.backward_weight_TK is None else exact.backward_weight_TK
    if draw or kind == "sparsemixer_v2":
        torch.testing.assert_close(routed.backward_weight_TK.double(), expected_backward_TK.detach(), rtol=1e-6, atol=1e-9)
    assert not routed.backward_weight_TK.requires_grad
    for got, expected in zip((routed.weight_TK, routed.prob_sum_E, routed.z_sum), (exact.weight_TK, *sums), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(dz_TE.double(), exact_dz_TE, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_logits(monkeypatch: pytest.MonkeyPatch, kind: str, mask_rule: str) -> None:
    """Ties, zeros, huge and subnormal numbers, and logits at the very edge of the mask: still the reference's experts."""
    big_tiles(monkeypatch)
    z_TE = awkward_logits()[::61]
    for mask_eps in (0.01, 0.3):
        config = RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=mask_eps)
        for token_T in (tokens(z_TE.shape[0]), None):
            ours, reference = run_fused(z_TE, 3, config, token_T), run_reference(z_TE, 3, config, token_T)
            assert torch.equal(ours.expert_TK, reference.expert_TK)
            torch.testing.assert_close(ours.weight_TK, reference.weight_TK, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_break_the_weights_not_the_indices(bad: float) -> None:
    z_TE = logits(64, 16)
    z_TE[::2, 3] = bad
    z_TE[::4] = bad
    for kind in KINDS:
        for token_T in (tokens(64), None):
            routed = run_fused(z_TE, 2, RouterConfig(kind=kind), token_T)
            assert routed.expert_TK.min() >= 0
            assert routed.expert_TK.max() < 16
            assert routed.counts_E.sum() == 128
            assert torch.isnan(routed.weight_TK[::4]).all()
            assert torch.isfinite(routed.weight_TK[1::2]).all()
            if math.isnan(bad):
                assert torch.isnan(routed.weight_TK[::2]).all()
            assert not torch.isfinite(routed.z_sum)


@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_has_the_gradient_of_the_algorithm(kind: str, mask_rule: str) -> None:
    n, n_experts, top_k = 48, 5, 3
    config = RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.4)
    z_TE, dweight_TK = logits(n, n_experts, seed=3).requires_grad_(), torch.randn(n, top_k)
    routed = run_fused(z_TE, top_k, config, tokens(n))
    routed.weight_TK.backward(dweight_TK)
    bits = bernoulli_of(rng.routing_words(SEED, STEP, LAYER, tokens(n), 2), kind, top_k)
    temperature, c = _ESTIMATORS[kind].temperature, _ESTIMATORS[kind].gradient
    weight_TK, dz_TE = torch.zeros(n, top_k, dtype=torch.float64), torch.zeros(n, n_experts, dtype=torch.float64)
    for t, chosen in enumerate(routed.expert_TK.tolist()):
        for k, (p, omega) in enumerate(replay(z_TE[t].tolist(), chosen, bits[t], config)):
            weight_TK[t, k] = omega * p[chosen[k]]
            dz_TE[t] += c * dweight_TK[t, k].double() * p[chosen[k]] * d_log_p(p, chosen[k], temperature)
    torch.testing.assert_close(routed.weight_TK.double(), weight_TK, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(z_TE.grad.double(), dz_TE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_draws_converges_to_the_expectation(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    big_tiles(monkeypatch)
    config, loss, n = RouterConfig(kind=kind, mask_eps=MASK_EPS), CubicLoss(4), 50_000
    mean_E, covariance_EE = enumerate_gradient(config, 2, loss)
    z_TE = torch.tensor([Z]).repeat(n, 1).requires_grad_()
    routed = run_fused(z_TE, 2, config, tokens(n))
    y_TD = torch.einsum("tk,tkd->td", routed.weight_TK.double(), expert_table()[routed.expert_TK])
    loss(y_TD).sum().backward()
    sigma_E = covariance_EE.diagonal().sqrt() / math.sqrt(n)
    assert ((z_TE.grad.double().mean(0) - mean_E).abs() <= 4 * sigma_E + 1e-6).all()
    assert mean_E.abs().max() > 20 * sigma_E.max()


def layer_results(x_BSD: Tensor, draw: bool) -> list[Tensor]:
    layer = MoELayer(8, 6, 5, 2, 3, RouterConfig(mask_eps=0.3), BalanceConfig(coef=0.5, z_coef=0.3))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x_BSD = x_BSD.clone().requires_grad_()
    n_tokens = x_BSD.shape[0] * x_BSD.shape[1]
    train = TrainRouting(Draws(7, 1, torch.arange(n_tokens)), n_tokens, torch.rand(4, 5)) if draw else None
    torch.manual_seed(0)
    y_BSD, stats = layer(x_BSD, train)
    y_BSD.square().sum().backward()
    return [y_BSD.detach(), stats.counts_E, stats.prob_sum_E, stats.z_sum, x_BSD.grad, layer.router.weight.grad]


@pytest.mark.parametrize("draw", [True, False])
def test_layer_takes_the_fused_router(monkeypatch: pytest.MonkeyPatch, draw: bool) -> None:
    """Forward, gradients, balance loss and z-loss of a layer: the same with and without kernels."""
    x_BSD = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    _, routing = Router(8, 5, 2, 3, RouterConfig())(x_BSD[0], None)
    assert routing.sums is not None
    torch.manual_seed(5)
    with_kernels = layer_results(x_BSD, draw)
    monkeypatch.setenv("MEGAGRIN_KERNELS", "torch")
    torch.manual_seed(5)
    without = layer_results(x_BSD, draw)
    for a, b in zip(with_kernels, without, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_op_is_registered_as_torch_wants_it() -> None:
    """Schema, autograd registration and the fake tensors, by torch's own checker."""
    for token in (torch.arange(9), None):
        rest = (token, 2, 3, 4, 5, 0.6, False, 1.0, 1 << 30, 1.0)
        library.opcheck(torch.ops.megagrin.sparsemixer.default, (logits(9, 5), *rest))
        # Its gradient check adds all outputs up, and stumbles over an integer one before a float one: the next test stands in.
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        library.opcheck(torch.ops.megagrin.sparsemixer.default, (logits(9, 5).requires_grad_(), *rest), test_utils=utilities)
    arguments = (logits(9, 5), torch.zeros(9, 2, dtype=torch.int64), logits(9, 2), logits(1, 5)[0], torch.ones(()))
    library.opcheck(torch.ops.megagrin.sparsemixer_backward.default, (*arguments, 0.6, False, 1.0, 1.0))


def test_compiled_router_equals_eager() -> None:
    """One graph, forward and backward, for a step that changes and for another number of tokens."""
    router = Router(6, 5, 2, 3, RouterConfig(mask_eps=0.3))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for n_tokens, step in ((9, 0), (9, 1), (17, 2), (31, 3)):
        x_TD, results = logits(n_tokens, 6), []
        for run in (router, compiled):
            router.weight.grad = None
            _, routing = run(x_TD, Draws(1, step, torch.arange(n_tokens)))
            (routing.weight_TK.square().sum() + routing.sums[0].square().sum() + routing.sums[1]).backward()
            results.append((routing.expert_TK, routing.weight_TK, router.weight.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_a_second_derivative_is_refused() -> None:
    z_TE = logits(5, 4).requires_grad_()
    weight_TK = run_fused(z_TE, 2, RouterConfig(), tokens(5)).weight_TK
    (dz_TE,) = torch.autograd.grad(weight_TK.square().sum(), z_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz_TE.sum().backward()


def test_errors_name_the_rule() -> None:
    z_TE, token_T, config = logits(4, 3), torch.arange(4), RouterConfig()
    for z, k in ((z_TE.double(), 1), (z_TE[0], 1), (z_TE, 4), (z_TE, 0), (torch.zeros(1, 2000), 1)):
        with pytest.raises(ValueError, match=r"must be \(T, E\) float32 and 1 ≤ top_k ≤ E ≤ 1024"):
            run_fused(z, k, config, None)
    for token in (token_T[:3], token_T.int()):
        with pytest.raises(ValueError, match=r"token .* must be \(4,\) int64"):
            run_fused(z_TE, 1, config, token)
    with pytest.raises(ValueError, match="mask_rule 'neither' must be code or paper"):
        run_fused(z_TE, 1, dataclasses.replace(config, mask_rule="neither"), token_T)
    rules = {"mask_rule": "code", "mask_eps": 0.1, "temperature": 1.0, "bernoulli": 0.25, "gradient": 1.0}
    for name, value in (("seed", 1 << 64), ("step", -1), ("layer", 1 << 32)):
        with pytest.raises(ValueError, match=f"{name} {value}.* must lie in"):
            fused(z_TE, token_T, top_k=1, **{"seed": 0, "step": 0, "layer": 0, **rules, name: value})
