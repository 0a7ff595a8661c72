"""Routers: logits in, experts and weights out. SparseMixer-v2, SparseMixer-v2*, and the GShard control recipe.

SparseMixer-v2 (GRIN, arXiv 2409.12136, Appendix A) samples each expert instead of taking the largest logit, and estimates the
router's gradient with Heun's third-order method. For one draw D with masked softmax p, δ = [D = argmax z] and B ~ Bernoulli:

    v2  (Algorithm 1): p = MaskedSoftmax(z),   B ~ Bernoulli(1/4), y = h  + detach(max(δ, (1+2B)/3)·h − h),   h = p_D·Expert_D(x)
    v2* (Algorithm 2): p = MaskedSoftmax(z/2), B ~ Bernoulli(5/8), y = 2h + detach(max(δ, (1+2B)/3)·h − 2h)

so the forward value carries ω = max(δ, (1+2B)/3) ∈ {1, 1/3} and the gradient carries c = 1 (v2) or 2 (v2*). Top-k (Algorithm 3)
draws k times without replacement: the drawn logit becomes −∞ and mask and softmax are formed anew over what remains.

Every draw is a function of (seed, step, layer, token), see megagrin/rng.py. Sampling inverts the cumulative sum in 30-bit fixed
point: integer addition is associative, so the choice does not depend on the order in which a device sums. What it inverts is a
softmax that has the same bits on every device, see megagrin/kernels/sparsemixer.py, where the fused form of all this stands, too.

Shape suffixes: T tokens, E experts, K experts per token, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagrin import rng
from megagrin.kernels.backend import use_triton
from megagrin.kernels.router_logits import router_logits
from megagrin.kernels.sparsemixer import reproducible_softmax
from megagrin.kernels.sparsemixer import sparsemixer as fused_sparsemixer

_FIXED_POINT = 1 << 30


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose their experts.

    Attributes:
        kind: sparsemixer_v2 (GRIN), sparsemixer_v2_star (its Algorithm 2), or gshard (the paper's control recipe).
        mask_rule: which experts stay in the masked softmax. `code`: (z* − z_i) / max(|z_i|, z*) ≤ 2·mask_eps, the rule of the
            released weights; `paper`: z* − z_i ≤ mask_eps·(|z_i| + |z*|), eq. 2.
        mask_eps: relative distance r of the mask; `router_jitter_noise` of the released configuration.
        expert_gradient: what weighs the gradient that reaches the sampled expert in training. `paper`: c·p_D, as Algorithm 1
            reads; `code`: ω·p_D, as the released routine computes. The router's gradient is the same in both.
        input_jitter: gshard only, in training: the router's input is multiplied by U(1 − input_jitter, 1 + input_jitter).
        forced_balance: route round robin for benchmarks, whatever the logits say. Training refuses it unless
            train.allow_forced_balance is set.
    """

    kind: Literal["sparsemixer_v2", "sparsemixer_v2_star", "gshard"] = "sparsemixer_v2"
    mask_rule: Literal["code", "paper"] = "code"
    mask_eps: float = 0.01
    expert_gradient: Literal["paper", "code"] = "paper"
    input_jitter: float = 0.01
    forced_balance: bool = False

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = []
        if not 0 < self.mask_eps < 1:
            broken.append(f"router.mask_eps: {self.mask_eps} must lie in (0, 1)")
        if not 0 <= self.input_jitter < 1:
            broken.append(f"router.input_jitter: {self.input_jitter} must lie in [0, 1)")
        return broken


@dataclass(frozen=True)
class Draws:
    """What a token's random numbers depend on.

    Attributes:
        seed: run seed.
        step: optimizer step, counted from 0.
        token_T: int64, index of each token in the global batch of the step.
    """

    seed: int
    step: int
    token_T: Tensor


@dataclass(frozen=True)
class Routing:
    """Each token's experts.

    Attributes:
        expert_TK: int64.
        weight_TK: fp32 (fp64 for fp64 logits), the weight in the forward pass; carries the router's gradient.
        backward_weight_TK: detached, weighs the gradient that reaches the expert; None where it equals weight_TK.
        sums: Σ_t softmax(z_t) and Σ_t logsumexp(z_t)² with their graph, where the fused router made them along the way.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    backward_weight_TK: Tensor | None
    sums: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Estimator:
    temperature: float
    bernoulli: float  # probability of B = 1
    gradient: float  # c


_ESTIMATORS = {
    "sparsemixer_v2": _Estimator(temperature=1.0, bernoulli=1 / 4, gradient=1.0),
    "sparsemixer_v2_star": _Estimator(temperature=2.0, bernoulli=5 / 8, gradient=2.0),
}


def dropped_by_code(z_TE: Tensor, eps: float) -> Tensor:
    """Experts that the released code's rule removes: (z* − z_i) / max(|z_i|, z*) > 2·eps. Drawn experts hold −∞.

    Divided, not multiplied out: rounding then agrees bit for bit with the released routine (they part on subnormal logits).
    0/0 compares false and keeps a tie at zero.
    """
    best_T1 = z_TE.amax(dim=-1, keepdim=True)
    return (best_T1 - z_TE) / torch.maximum(z_TE.abs(), best_T1) > 2 * eps


def dropped_by_paper(z_TE: Tensor, eps: float) -> Tensor:
    """Experts that eq. 2 removes: z* − z_i > eps·(|z_i| + |z*|). Drawn experts hold −∞."""
    best_T1 = z_TE.amax(dim=-1, keepdim=True)
    return (best_T1 - z_TE) > eps * (z_TE.abs() + best_T1.abs())


_MASK_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"code": dropped_by_code, "paper": dropped_by_paper}


def sample(p_TE: Tensor, word_T: Tensor) -> Tensor:
    """Draw one expert per token by inverting the cumulative distribution.

    Args:
        p_TE: probabilities; those below 2^-31 are never drawn. The draw is a function of their bits.
        word_T: int64 random words, [0, 2^32).

    Returns:
        int64 (T,), in [0, E) even where p is NaN: the NaN then surfaces in the loss, not as an index out of range.
    """
    cumulative_TE = (p_TE.double() * _FIXED_POINT).round_().to(torch.int64).cumsum(dim=-1)
    target_T1 = (cumulative_TE[:, -1] * word_T >> 32).unsqueeze(1)
    return (cumulative_TE <= target_T1).sum(dim=-1).clamp_max_(p_TE.shape[-1] - 1)


class _HeunWeight(torch.autograd.Function):
    """Forward ω·p, gradient c: the estimator's y = c·h + detach(ω·h − c·h) with h linear in p."""

    @staticmethod
    def forward(ctx: Any, p_T: Tensor, omega_T: Tensor, c: float) -> Tensor:
        ctx.c = c
        return p_T * omega_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        return grad_T * ctx.c, None, None


def _draw(masked_TE: Tensor, word_T: Tensor) -> Tensor:
    """Sample from the softmax as every device computes it. The weights' own softmax may differ from it in the last bits, which is
    no bias that matters: fixed point rounds as much away."""
    gap_TE = masked_TE - masked_TE.amax(dim=-1, keepdim=True)
    return sample(reproducible_softmax(gap_TE.float()), word_T)


def _remove_drawn(z_TE: Tensor, drawn_TE: Tensor) -> Tensor:
    return z_TE.masked_fill(drawn_TE, -torch.inf)


def sparsemixer(z_TE: Tensor, top_k: int, config: RouterConfig, words_TW: Tensor | None) -> Routing:
    """SparseMixer-v2 or v2* (Algorithms 1 to 3); the largest logit in place of a draw when there are no random words.

    Args:
        z_TE: fp32 or fp64 router logits.
        top_k: experts per token, at most E.
        config: estimator and mask rule.
        words_TW: int64 random words, two for each of the K rounds (expert, Bernoulli); None outside training.
    """
    estimator = _ESTIMATORS[config.kind]
    dropped = _MASK_RULES[config.mask_rule]
    experts, weights, backward_weights = [], [], []
    drawn_TE = torch.zeros_like(z_TE, dtype=torch.bool)
    for round_ in range(top_k):
        with torch.no_grad():
            remaining_TE = _remove_drawn(z_TE, drawn_TE)
            # `| drawn`: −∞ against −∞ compares false, and a drawn expert must stay out.
            removed_TE = dropped(remaining_TE, config.mask_eps) | drawn_TE
        masked_TE = (z_TE / estimator.temperature).masked_fill(removed_TE, -torch.inf)
        p_TE = torch.softmax(masked_TE, dim=-1)
        best_T = remaining_TE.argmax(dim=-1)
        expert_T = best_T if words_TW is None else _draw(masked_TE.detach(), words_TW[:, 2 * round_])
        p_T = p_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1)
        if words_TW is not None:
            b_T = words_TW[:, 2 * round_ + 1] < int(estimator.bernoulli * 2**32)
            omega_T = torch.full_like(p_T, 1 / 3).masked_fill_((expert_T == best_T) | b_T, 1.0)
            backward_weights.append(estimator.gradient * p_T.detach())
            p_T = _HeunWeight.apply(p_T, omega_T, estimator.gradient)
        experts.append(expert_T)
        weights.append(p_T)
        drawn_TE = drawn_TE.scatter(1, expert_T.unsqueeze(1), True)
    paper = bool(backward_weights) and config.expert_gradient == "paper"
    return Routing(torch.stack(experts, 1), torch.stack(weights, 1), torch.stack(backward_weights, 1) if paper else None)


def gshard(z_TE: Tensor, top_k: int) -> Routing:
    """Top-k of the softmax; the gate is the softmax value, whose gradient stands in for the router's."""
    weight_TK, expert_TK = torch.softmax(z_TE, dim=-1).topk(top_k, dim=-1)
    return Routing(expert_TK, weight_TK, None)


def round_robin(z_TE: Tensor, top_k: int) -> Routing:
    """Perfectly balanced experts for benchmarks: token t takes t·k, t·k + 1, … modulo E, weighted by the softmax."""
    n_tokens, n_experts = z_TE.shape
    expert_TK = torch.arange(n_tokens * top_k, device=z_TE.device).view(n_tokens, top_k) % n_experts
    return Routing(expert_TK, torch.softmax(z_TE, dim=-1).gather(1, expert_TK), None)


class Router(torch.nn.Module):
    """Linear router without bias, in fp32 whatever the dtype of its input.

    Attributes:
        weight: (E, D).
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, layer: int, config: RouterConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(n_experts, d_model))
        self.top_k, self.layer, self.config = top_k, layer, config

    def forward(self, x_TD: Tensor, draws: Draws | None) -> tuple[Tensor, Routing]:
        """Route tokens.

        Args:
            x_TD: (T, D), any float dtype.
            draws: identity of the random numbers; None takes the largest logits (inference).

        Returns:
            Logits (T, E) in fp32 (fp64 under an fp64 router) and the routing.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if x_TD.dtype.itemsize > 2:
            x_TD = x_TD.to(dtype)
        if draws is not None and self.config.kind == "gshard" and self.config.input_jitter > 0:
            x_TD = x_TD.to(dtype) * self._jitter(x_TD.shape[1], draws)
        z_TE = router_logits(x_TD, self.weight.to(dtype))
        if self.config.forced_balance:
            return z_TE, round_robin(z_TE, self.top_k)
        if self.config.kind == "gshard":
            return z_TE, gshard(z_TE, self.top_k)
        if use_triton(z_TE, "sparsemixer"):
            return z_TE, self._fused(z_TE, draws)
        words_TW = None
        if draws is not None:
            words_TW = rng.routing_words(draws.seed, draws.step, self.layer, draws.token_T, (self.top_k + 1) // 2)
        return z_TE, sparsemixer(z_TE, self.top_k, self.config, words_TW)

    def _fused(self, z_TE: Tensor, draws: Draws | None) -> Routing:
        config, estimator = self.config, _ESTIMATORS[self.config.kind]
        routed = fused_sparsemixer(
            z_TE,
            None if draws is None else draws.token_T,
            top_k=self.top_k,
            seed=0 if draws is None else draws.seed,
            step=0 if draws is None else draws.step,
            layer=self.layer,
            mask_rule=config.mask_rule,
            mask_eps=config.mask_eps,
            temperature=estimator.temperature,
            bernoulli=estimator.bernoulli,
            gradient=estimator.gradient,
        )
        paper = draws is not None and config.expert_gradient == "paper"
        backward_TK = routed.backward_weight_TK if paper else None
        return Routing(routed.expert_TK, routed.weight_TK, backward_TK, (routed.prob_sum_E, routed.z_sum))

    def _jitter(self, d_model: int, draws: Draws) -> Tensor:
        words_TD = rng.routing_words(draws.seed, draws.step, self.layer, draws.token_T, (d_model + 3) // 4)
        return 1 + self.config.input_jitter * (2 * rng.uniform(words_TD[:, :d_model]) - 1)
