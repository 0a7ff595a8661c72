"""Token exchange: bring each token to its experts and the results back. No token is ever dropped.

Two verbs. `dispatch` returns the rows for the experts of this rank, sorted by expert, with their weights and what `combine` needs
to bring the results home. Both implementations give rows of one expert in global token order, so that weight gradients sum in
the same order under every expert-parallel degree. Where the tokens are on this rank already, they are handed on unsorted with the
plan of the sort: the experts gather them, and no sorted copy lives until the backward pass.

Shape suffixes: T tokens of this rank, K experts per token, R rows that this rank's experts receive, D model width,
E experts of the model, L experts of this rank, P ranks of the expert-parallel group.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagrin.kernels.permute import SortPlan, permute, sort_by_expert, unpermute
from megagrin.moe.router import Routing
from megagrin.parallel.comm import all_to_all_rows, exchange_counts


@dataclass(frozen=True)
class _Exchange:
    """How rows travelled between ranks; the way back swaps the two lists."""

    sent: list[int]
    received: list[int]
    by_expert: SortPlan


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts.

    Attributes:
        x: (R, D) rows sorted by expert, or (T, D) tokens where there is a plan.
        plan: how the tokens of x are sorted into rows, or None.
        weight_R: forward weight of each row.
        backward_weight_R: backward weight, or None where it equals weight_R.
        counts_L: int64, rows per expert of this rank, zeros allowed.
        counts_E: int64, rows per expert that this rank's tokens chose.
    """

    x: Tensor
    plan: SortPlan | None
    weight_R: Tensor
    backward_weight_R: Tensor | None
    counts_L: Tensor
    counts_E: Tensor
    _home: SortPlan
    _exchange: _Exchange | None


class Dispatch(Protocol):
    """The token exchange of a MoE layer."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Bring tokens to their experts."""
        ...

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Bring weighted expert outputs back and sum them: (R, D) -> (T, D)."""
        ...


def _sorted_weights(routing: Routing, plan: SortPlan) -> Tensor:
    """Forward weight, and backward weight where there is one, in row order: (T·K, 1 or 2)."""
    columns = [routing.weight_TK]
    if routing.backward_weight_TK is not None:
        columns.append(routing.backward_weight_TK)
    flat = torch.stack([column.reshape(-1) for column in columns], dim=1)
    return permute(flat, plan.of_choices())


def _split_weights(weight_R2: Tensor) -> tuple[Tensor, Tensor | None]:
    backward = weight_R2[:, 1].detach() if weight_R2.shape[1] == 2 else None
    return weight_R2[:, 0], backward


class LocalDispatch:
    """Every expert is on this rank: a sort, no communication, and no copy of a size to the host."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        plan = sort_by_expert(routing.expert_TK, self.n_experts)
        weight_R, backward_R = _split_weights(_sorted_weights(routing, plan))
        return Dispatched(x_TD, plan, weight_R, backward_R, plan.counts_E, plan.counts_E, plan, None)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        return unpermute(y_RD, sent._home)


class AllToAllDispatch:
    """Experts are split over a group in equal, consecutive blocks; rows travel by all-to-all with exact sizes.

    The sizes are data, so the host must learn them: one device-to-host copy a layer, the only synchronisation.
    """

    def __init__(self, n_experts: int, group: dist.ProcessGroup) -> None:
        self.n_experts, self.group = n_experts, group
        self.n_ranks = dist.get_world_size(group)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        home = sort_by_expert(routing.expert_TK, self.n_experts)
        send_PL = home.counts_E.view(self.n_ranks, -1)
        receive_PL = exchange_counts(send_PL, self.group)
        sent, received = torch.stack([send_PL.sum(1), receive_PL.sum(1)]).tolist()
        x_RD = all_to_all_rows(permute(x_TD, home), received, sent, self.group)
        weight_R2 = all_to_all_rows(_sorted_weights(routing, home), received, sent, self.group)
        # Rows arrive by source rank, then by expert; the experts want them by expert, then by source rank.
        n_local = receive_PL.shape[1]
        expert_P_L = torch.arange(n_local, device=x_TD.device).repeat(self.n_ranks)
        expert_R = torch.repeat_interleave(expert_P_L, receive_PL.reshape(-1), output_size=sum(received))
        by_expert = sort_by_expert(expert_R.unsqueeze(1), n_local)
        weight_R, backward_R = _split_weights(permute(weight_R2, by_expert))
        exchange = _Exchange(sent, received, by_expert)
        x_RD = permute(x_RD, by_expert)
        return Dispatched(x_RD, None, weight_R, backward_R, by_expert.counts_E, home.counts_E, home, exchange)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        exchange = sent._exchange
        assert exchange is not None
        y_RD = all_to_all_rows(unpermute(y_RD, exchange.by_expert), exchange.sent, exchange.received, self.group)
        return unpermute(y_RD, sent._home)
