"""The mixture-of-experts layer.

Shape suffixes: B sequences, S positions, T = B·S tokens, E experts, D model width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagrin.moe.balance import BalanceConfig, GlobalCounts, attach, load_fraction, z_term
from megagrin.moe.dispatch import Dispatch, LocalDispatch
from megagrin.moe.experts import Experts
from megagrin.moe.router import Draws, Router, RouterConfig


@dataclass(frozen=True)
class TrainRouting:
    """What a training forward pass needs beyond the tokens. One object serves all layers of a micro-batch.

    Attributes:
        draws: identity of the random numbers.
        tokens: tokens of the global batch, the divisor of balance loss and z-loss.
        previous_f_LE: load fractions of the previous optimizer step per layer, for scope `batch`.
        group: the data-parallel group, for scope `global`.
    """

    draws: Draws
    tokens: int
    previous_f_LE: Tensor
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class RouterStats:
    """Sums over this micro-batch's tokens; add them over micro-batches and ranks, then divide by the tokens.

    Attributes:
        counts_E: int64, rows per expert.
        prob_sum_E: Σ softmax(z).
        z_sum: Σ logsumexp(z)².
    """

    counts_E: Tensor
    prob_sum_E: Tensor
    z_sum: Tensor


class MoELayer(torch.nn.Module):
    """Mixture of experts.

    Forward:
        1. router: logits and routing in fp32
        2. dispatch: rows to their experts
        3. experts: grouped SwiGLU with the router's weight inside
        4. combine: rows back, summed per token
        5. balance loss and z-loss attached to the output
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        top_k: int,
        layer: int,
        router: RouterConfig,
        balance: BalanceConfig,
    ) -> None:
        super().__init__()
        self.router = Router(d_model, n_experts, top_k, layer, router)
        self.experts = Experts(n_experts, d_model, d_ff)
        self.layer, self.balance = layer, balance
        self.token_dispatch: Dispatch = LocalDispatch(n_experts)

    def forward(self, x_BSD: Tensor, train: TrainRouting | None) -> tuple[Tensor, RouterStats]:
        """Run the layer.

        Args:
            x_BSD: normalised hidden states.
            train: None for inference: largest logits, no losses.

        Returns:
            (B, S, D) without the residual, and the router's statistics (detached).
        """
        x_TD = x_BSD.flatten(0, 1)
        z_TE, routing = self.router(x_TD, None if train is None else train.draws)
        y_TD, counts_E = self.token_dispatch.run(x_TD, routing, self.experts)
        prob_sum_E, z_sum = routing.sums or (torch.softmax(z_TE, dim=-1).sum(0), z_term(z_TE))
        if train is not None:
            y_TD = attach(y_TD, prob_sum_E, z_sum, self._load(counts_E, train, z_TE.dtype), self.balance, train.tokens)
        return y_TD.view_as(x_BSD), RouterStats(counts_E, prob_sum_E.detach(), z_sum.detach())

    def _load(self, counts_E: Tensor, train: TrainRouting, dtype: torch.dtype) -> Tensor | GlobalCounts:
        if self.balance.scope == "batch":
            return train.previous_f_LE[self.layer]
        if self.balance.scope == "global" and train.group is not None:
            return GlobalCounts(counts_E, train.group)
        return load_fraction(counts_E, dtype)
