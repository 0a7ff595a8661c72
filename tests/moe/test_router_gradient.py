"""The router's gradient: each draw in closed form, and the mean of draws against the expectation over all outcomes.

Shape suffixes: T tokens, E experts, K experts per token, D model width, F expert width, N outcomes.
"""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from router_models import moe_layer
from torch import Tensor

from megagrin import rng
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig, sparsemixer

torch.set_num_threads(1)

KINDS = ("sparsemixer_v2", "sparsemixer_v2_star")
# Algorithm 1 and 2: temperature of the softmax, probability of B = 1, factor on the gradient.
ALGORITHM = {"sparsemixer_v2": (1.0, 1 / 4, 1.0), "sparsemixer_v2_star": (2.0, 5 / 8, 2.0)}


def bernoulli_of(words_TW: Tensor, kind: str, top_k: int) -> list[list[bool]]:
    """B of each token and round, from the words themselves: word / 2^32 < probability."""
    return [[word / 2**32 < ALGORITHM[kind][1] for word in row[1 : 2 * top_k : 2]] for row in words_TW.tolist()]


def kept_experts(z: list[float], drawn: set[int], mask_rule: str, eps: float) -> list[int]:
    left = [i for i in range(len(z)) if i not in drawn]
    best = max(z[i] for i in left)
    if mask_rule == "paper":
        return [i for i in left if best - z[i] <= eps * (abs(z[i]) + abs(best))]
    return [i for i in left if best - z[i] <= 2 * eps * max(abs(z[i]), best)]


def masked_softmax(z: list[float], kept: list[int], temperature: float) -> list[float]:
    top = max(z[i] for i in kept)
    mass = {i: math.exp((z[i] - top) / temperature) for i in kept}
    return [mass.get(i, 0.0) / sum(mass.values()) for i in range(len(z))]


def replay(z: list[float], experts: list[int], bits: list[bool], config: RouterConfig) -> list[tuple[list[float], float]]:
    """(p, ω) of each round of Algorithm 3, for given draws."""
    temperature = ALGORITHM[config.kind][0]
    drawn: set[int] = set()
    rounds = []
    for expert, bit in zip(experts, bits, strict=True):
        kept = kept_experts(z, drawn, config.mask_rule, config.mask_eps)
        assert expert in kept
        best = max((i for i in range(len(z)) if i not in drawn), key=lambda i: z[i])
        rounds.append((masked_softmax(z, kept, temperature), max(float(expert == best), (1 + 2 * bit) / 3)))
        drawn.add(expert)
    return rounds


def d_log_p(p: list[float], expert: int, temperature: float) -> Tensor:
    """∂ log p_expert / ∂z, zero outside the mask."""
    return torch.tensor([((i == expert) - p_i) / temperature for i, p_i in enumerate(p)], dtype=torch.float64)


def expert_output(x_D: Tensor, gate_up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    gate_F, up_F = gate_up_2FD[0::2] @ x_D, gate_up_2FD[1::2] @ x_D
    return down_DF @ (gate_F * torch.sigmoid(gate_F) * up_F)


def closed_form(layer: MoELayer, x_TD: Tensor, dy_TD: Tensor, experts: Tensor, bits: list[list[bool]]) -> list[Tensor]:
    """y, dz, dx, d router, d gate_up, d down of Algorithm 1 to 3, for given draws, token by token."""
    config, (temperature, _, c) = layer.router.config, ALGORITHM[layer.router.config.kind]
    router_ED = layer.router.weight.detach()
    gate_up, down = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    y_TD, dx_TD = torch.zeros_like(x_TD), torch.zeros_like(x_TD)
    dz_TE = x_TD.new_zeros(x_TD.shape[0], router_ED.shape[0])
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for t, x_D in enumerate(x_TD):
        chosen = experts[t].tolist()
        for expert, (p, omega) in zip(chosen, replay((router_ED @ x_D).tolist(), chosen, bits[t], config), strict=True):
            out_D, vjp = torch.func.vjp(expert_output, x_D, gate_up[expert], down[expert])
            y_TD[t] += omega * p[expert] * out_D
            dz_TE[t] += c * (dy_TD[t] @ out_D) * p[expert] * d_log_p(p, expert, temperature)
            weight = c * p[expert] if config.expert_gradient == "paper" else omega * p[expert]
            to_x, to_gate_up, to_down = vjp(weight * dy_TD[t])
            dx_TD[t] += to_x
            d_gate_up[expert] += to_gate_up
            d_down[expert] += to_down
        dx_TD[t] += dz_TE[t] @ router_ED
    return [y_TD, dz_TE, dx_TD, dz_TE.T @ x_TD, d_gate_up, d_down]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("expert_gradient", ["paper", "code"])
@pytest.mark.parametrize("mask_rule", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_has_the_gradient_of_the_algorithm(kind: str, mask_rule: str, expert_gradient: str, top_k: int) -> None:
    config = RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.4, expert_gradient=expert_gradient)
    n_tokens, n_experts = 96, 5
    layer = moe_layer(n_experts, 6, 4, top_k, config)
    generator = torch.Generator().manual_seed(1)
    x_TD, dy_TD = (torch.randn(n_tokens, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    x_TD.requires_grad_()
    train = TrainRouting(Draws(3, 0, torch.arange(n_tokens)), n_tokens, torch.full((1, n_experts), 1 / n_experts))

    captured: dict[str, Tensor] = {}

    def keep(_module: torch.nn.Module, _inputs: tuple, output: tuple) -> None:
        output[0].retain_grad()
        captured["z"], captured["experts"] = output[0], output[1].expert_TK

    layer.router.register_forward_hook(keep)
    y_BSD, _ = layer(x_TD.view(4, n_tokens // 4, 6), train)
    y_BSD.backward(dy_TD.view_as(y_BSD))

    bits = bernoulli_of(rng.routing_words(3, 0, 0, train.draws.token_T, 2), kind, top_k)
    expected = closed_form(layer, x_TD.detach(), dy_TD, captured["experts"], bits)
    experts = layer.experts
    got = [
        y_BSD.detach().view(-1, 6),
        captured["z"].grad,
        x_TD.grad,
        layer.router.weight.grad,
        experts.gate_up_proj.grad,
        experts.down_proj.grad,
    ]
    for name, a, b in zip(("y", "dz", "dx", "d router", "d gate_up", "d down"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    # The cases that tell the algorithm's branches apart all occur: ω = 1 by δ, by B, and ω = 1/3.
    best = captured["z"].argmax(-1)
    first_is_best, first_bit = captured["experts"][:, 0] == best, torch.tensor(bits)[:, 0]
    assert first_is_best.any()
    assert (~first_is_best & first_bit).any()
    assert (~first_is_best & ~first_bit).any()


Z = [1.3, 1.1, 0.7, 1.25, -0.2]  # with mask_eps 0.3: some experts masked in round one, and more than one left in every round
MASK_EPS = 0.3


class CubicLoss:
    """L(y) = a·y + (b·y)²/2 + (c·y)³/6. Heun's third-order method integrates the slope of a cubic exactly."""

    def __init__(self, d_model: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.a, self.b, self.c = torch.randn(3, d_model, dtype=torch.float64, generator=generator)

    def __call__(self, y: Tensor) -> Tensor:
        return y @ self.a + (y @ self.b) ** 2 / 2 + (y @ self.c) ** 3 / 6

    def gradient(self, y: Tensor) -> Tensor:
        return self.a + (y @ self.b) * self.b + (y @ self.c) ** 2 / 2 * self.c


def expert_table() -> Tensor:
    return 2 * torch.randn(len(Z), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def outcomes(config: RouterConfig, top_k: int) -> Iterator[tuple[float, list[int], list[tuple[list[float], float]]]]:
    """(probability, experts, (p, ω) of each round) of every outcome of Algorithm 3."""
    chance = ALGORITHM[config.kind][1]
    for experts in itertools.permutations(range(len(Z)), top_k):
        for bits in itertools.product((False, True), repeat=top_k):
            probability, drawn = 1.0, set()
            for expert, bit in zip(experts, bits, strict=True):
                kept = kept_experts(Z, drawn, config.mask_rule, config.mask_eps)
                p = masked_softmax(Z, kept, ALGORITHM[config.kind][0])
                probability *= p[expert] * (chance if bit else 1 - chance)
                drawn.add(expert)
            if probability > 0:
                yield probability, list(experts), replay(Z, list(experts), list(bits), config)


def enumerate_gradient(config: RouterConfig, top_k: int, loss: CubicLoss) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the estimator c·Σ_rounds <L'(y), h>·∂log p/∂z, with y = Σ ω·h and h = p_D·Expert_D."""
    table, (temperature, _, c) = expert_table(), ALGORITHM[config.kind]
    weights, gradients = [], []
    for probability, experts, rounds in outcomes(config, top_k):
        h = [p[expert] * table[expert] for expert, (p, _) in zip(experts, rounds, strict=True)]
        y = sum(omega * h_r for h_r, (_, omega) in zip(h, rounds, strict=True))
        terms = zip(experts, rounds, h, strict=True)
        gradients.append(sum(c * (loss.gradient(y) @ h_r) * d_log_p(p, expert, temperature) for expert, (p, _), h_r in terms))
        weights.append(probability)
    weight_N, gradient_NE = torch.tensor(weights, dtype=torch.float64), torch.stack(gradients)
    mean_E = weight_N @ gradient_NE
    return mean_E, (gradient_NE - mean_E).T @ (weight_N[:, None] * (gradient_NE - mean_E))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_expectation_is_the_exact_gradient_of_the_choice(kind: str, top_k: int) -> None:
    """What the constants 1/3, 1/4 and 5/8 are for, stated with values of a cubic L instead of its slopes.

    With o the other rounds' output, Heun's method turns E_B of the slope at ω·h into L(o + h) − L(o): REINFORCE with baseline
    L(o) for the choice (eq. 8). v2* adds the gate's own gradient, the slope at h (eq. 6). The largest logit keeps ω = 1: the
    slope at h, once in v2 and twice in v2*.
    """
    config, loss, table = RouterConfig(kind=kind, mask_eps=MASK_EPS), CubicLoss(4), expert_table()
    temperature, star = ALGORITHM[kind][0], kind == "sparsemixer_v2_star"
    expected_E = torch.zeros(len(Z), dtype=torch.float64)
    for probability, experts, rounds in outcomes(config, top_k):
        left = set(range(len(Z)))
        h = [p[expert] * table[expert] for expert, (p, _) in zip(experts, rounds, strict=True)]
        for r, (p, _) in enumerate(rounds):
            others = sum((rounds[s][1] * h[s] for s in range(top_k) if s != r), start=torch.zeros(4, dtype=torch.float64))
            slope = loss.gradient(others + h[r]) @ h[r]
            is_best = Z[experts[r]] == max(Z[i] for i in left)
            routing = slope if is_best else loss(others + h[r]) - loss(others)
            expected_E += probability * (routing + star * slope) * d_log_p(p, experts[r], temperature)
            left.remove(experts[r])
    mean_E, _ = enumerate_gradient(config, top_k, loss)
    torch.testing.assert_close(mean_E, expected_E, rtol=1e-12, atol=1e-12)
    assert mean_E.abs().max() > 0.1


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_draws_converges_to_the_expectation(kind: str, top_k: int) -> None:
    config, loss, n = RouterConfig(kind=kind, mask_eps=MASK_EPS), CubicLoss(4), 400_000
    mean_E, covariance_EE = enumerate_gradient(config, top_k, loss)
    z_TE = torch.tensor([Z], dtype=torch.float64).repeat(n, 1).requires_grad_()
    words_TW = rng.routing_words(17, 4, 2, torch.arange(n), (top_k + 1) // 2)
    routing = sparsemixer(z_TE, top_k, config, words_TW)
    y_TD = torch.einsum("tk,tkd->td", routing.weight_TK, expert_table()[routing.expert_TK])
    loss(y_TD).sum().backward()
    assert z_TE.grad is not None
    error_TE = z_TE.grad - mean_E
    # Every component within 4 standard errors, from the exact covariance.
    sigma_E = covariance_EE.diagonal().sqrt() / math.sqrt(n)
    assert (error_TE.mean(0).abs() <= 4 * sigma_E + 1e-15).all(), (error_TE.mean(0) / sigma_E).tolist()
    # The error over n draws shrinks as 1/√n, with the constant that the covariance predicts.
    rms = {}
    for size, slack in ((1000, 0.12), (10_000, 0.35), (100_000, 0.7)):
        rms[size] = error_TE.view(-1, size, len(Z)).mean(1).square().sum(-1).mean().sqrt().item()
        assert abs(rms[size] * math.sqrt(size / covariance_EE.trace().item()) - 1) < slack, rms
    slope = math.log(rms[100_000] / rms[1000]) / math.log(100)
    assert -0.7 < slope < -0.35, slope


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected)[p > 0].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_follow_sampling_without_replacement(kind: str) -> None:
    n, config = 200_000, RouterConfig(kind=kind, mask_eps=MASK_EPS)
    expected = torch.zeros(len(Z), len(Z), dtype=torch.float64)
    for probability, (first, second), _ in outcomes(config, 2):
        expected[first, second] += probability
    z_TE = torch.tensor([Z]).expand(n, -1)
    routing = sparsemixer(z_TE, 2, config, rng.routing_words(5, 0, 0, torch.arange(n), 1))
    pair_T = routing.expert_TK[:, 0] * len(Z) + routing.expert_TK[:, 1]
    counts = torch.bincount(pair_T, minlength=len(Z) ** 2).double().view_as(expected)
    assert counts[expected == 0].sum() == 0
    assert abs(expected.sum() - 1) < 1e-12
    assert chi_square(counts, expected) < 49.6  # at most 19 degrees: 1e-4
    # The bound can fail: the same counts against the other kind's distribution.
    other = torch.zeros_like(expected)
    for probability, (first, second), _ in outcomes(RouterConfig(kind=KINDS[1 - KINDS.index(kind)], mask_eps=MASK_EPS), 2):
        other[first, second] += probability
    assert chi_square(counts, other) > 100


def test_bernoulli_frequency() -> None:
    n = 200_000
    for kind, (_, chance, _) in ALGORITHM.items():
        z_TE = torch.zeros(n, 4, dtype=torch.float64)
        routing = sparsemixer(z_TE, 2, RouterConfig(kind=kind), rng.routing_words(6, 0, 0, torch.arange(n), 1))
        best_TK = torch.stack([torch.zeros(n), (routing.expert_TK[:, 0] == 0).float()], dim=1)  # of equal logits the first
        for round_, left in ((0, 4), (1, 3)):
            free_T = routing.expert_TK[:, round_] != best_TK[:, round_]
            omega_T = routing.weight_TK[free_T, round_] * left
            full_T, third_T = (omega_T - 1).abs() < 1e-12, (omega_T - 1 / 3).abs() < 1e-12
            assert (full_T | third_T).all()
            assert abs(full_T.double().mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / full_T.numel())
            assert ((routing.weight_TK[~free_T, round_] * left - 1).abs() < 1e-12).all()
