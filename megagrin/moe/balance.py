"""Load-balance loss and z-loss: pure functions of router logits and counts.

    L = α · n · Σ_i f_i · P_i        (GRIN section 3.3)

P_i is the mean of the unmasked softmax, f_i the fraction of routed rows that expert i received (the *sampled* experts), so that
Σ f_i = 1; perfectly balanced routing gives L = α for every n and k. f carries no gradient; its scope is a choice:

    local   f of this rank's micro-batch (the paper's control recipe)
    global  f of this micro-batch, summed over the data-parallel ranks (GRIN)
    batch   f of the previous optimizer step, all ranks and micro-batches: it does not depend on how a batch is cut into ranks and
            micro-batches, and costs no communication inside the layer. The first step counts as balanced.

Every scope uses global-scale gradients: a token contributes α·n·f_i / T of the *global* batch, so summing gradients over
micro-batches and ranks gives the gradient of the mean, whatever the layout.

The loss reaches autograd by riding on the layer's output (`attach`), with no plumbing through the layers above.

Shape suffixes: T tokens of this micro-batch, E experts, D model width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BalanceConfig:
    """How experts are kept balanced.

    Attributes:
        scope: over which tokens the load is counted: local, global (GRIN) or batch; see docs/model.md.
        coef: α, weight of the balance loss; 0 switches it off.
        z_coef: weight of the router z-loss, the mean of logsumexp(z)²; 0 switches it off.
    """

    scope: Literal["local", "global", "batch"] = "batch"
    coef: float = 0.01
    z_coef: float = 0.0

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        return [
            f"balance.{name}: {value} must not be negative"
            for name, value in (("coef", self.coef), ("z_coef", self.z_coef))
            if value < 0
        ]


def load_fraction(counts_E: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """f: rows per expert over all rows. No rows at all counts as balanced. Broadcasts over leading dimensions (layers)."""
    total = counts_E.sum(-1, keepdim=True)
    balanced = torch.full(counts_E.shape, 1 / counts_E.shape[-1], dtype=dtype, device=counts_E.device)
    return torch.where(total > 0, counts_E.to(dtype) / total.clamp_min(1), balanced)


def balance_loss(f_E: Tensor, mean_prob_E: Tensor) -> Tensor:
    """n · Σ_i f_i · P_i, without α: 1 when balanced. Broadcasts over leading dimensions (layers)."""
    return f_E.shape[-1] * (f_E * mean_prob_E).sum(-1)


def z_term(z_TE: Tensor) -> Tensor:
    """Σ_t logsumexp(z_t)²: the z-loss before its division by the number of tokens (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return torch.logsumexp(z_TE, dim=-1).square().sum()


class GlobalCounts:
    """Expert counts being summed over a group while the layer goes on; waited for where f is first needed, in backward."""

    def __init__(self, counts_E: Tensor, group: dist.ProcessGroup) -> None:
        self._counts_E = counts_E.clone()
        self._work = dist.all_reduce(self._counts_E, group=group, async_op=True)

    def fraction(self, dtype: torch.dtype) -> Tensor:
        """f over the group, (E,)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return load_fraction(self._counts_E, dtype)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_TD: Tensor,
        prob_sum_E: Tensor,
        z_sum: Tensor,
        f: Tensor | GlobalCounts,
        scale: float,
        z_scale: float,
    ) -> Tensor:
        ctx.f, ctx.scale, ctx.z_scale = f, scale, z_scale
        ctx.dtype = prob_sum_E.dtype
        return y_TD.view_as(y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        f, dtype = ctx.f, ctx.dtype
        f_E = f.fraction(dtype) if isinstance(f, GlobalCounts) else f.to(dtype)
        z_grad = torch.full((), ctx.z_scale, dtype=dtype, device=dy_TD.device)
        return dy_TD, ctx.scale * f_E, z_grad, None, None, None


def attach(
    y_TD: Tensor, prob_sum_E: Tensor, z_sum: Tensor, f: Tensor | GlobalCounts, config: BalanceConfig, tokens: int
) -> Tensor:
    """Pass y through and let α·n·Σ f_i·prob_sum_i/tokens + z_coef·z_sum/tokens join the backward pass.

    Args:
        y_TD: the layer's output.
        prob_sum_E: Σ_t softmax(z_t), with its graph.
        z_sum: `z_term`, with its graph.
        f: load fractions, or counts still being summed.
        config: α and z_coef.
        tokens: tokens of the global batch (all ranks and micro-batches of the step).
    """
    return _Attach.apply(y_TD, prob_sum_E, z_sum, f, config.coef * prob_sum_E.shape[0] / tokens, config.z_coef / tokens)
