"""Token exchange: bring each token to its experts and the results back. No token is ever dropped.

Two verbs. `dispatch` returns the rows for the experts of this rank with their weights, and what `combine` needs to bring the
results home; `run` is both around the experts. Rows of one expert come by source rank, then in the order of that rank's tokens,
so that results repeat bit for bit. They are handed over unsorted, with the plan of the sort: the experts gather them, and no
sorted copy lives until the backward pass.

Shape suffixes: T tokens of this rank, K experts per token, R rows that this rank's experts receive, D model width,
E experts of the model, L experts of this rank, P ranks of the expert-parallel group, Q ranks of the expert-tensor-parallel group,
C chunks of this rank's tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrin.distributed.comm import (
    Exchange,
    HostCopy,
    all_gather_rows,
    exchange_counts,
    gather_stacked,
    reduce_scatter_rows,
    reduce_scatter_sequence,
)
from megagrin.kernels.permute import SortPlan, permute, sort_by_expert, sort_weights, unpermute
from megagrin.moe.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts.

    Attributes:
        x: what `plan` sorts into rows: (T, D) tokens of this rank, or (R, D) rows as they arrived.
        plan: the sort by expert.
        weight_R: forward weight of each row.
        backward_weight_R: backward weight, or None where it equals weight_R.
        counts_L: int64, rows per expert of this rank, zeros allowed.
        counts_E: int64, rows per expert that this rank's tokens chose.
    """

    x: Tensor
    plan: SortPlan
    weight_R: Tensor
    backward_weight_R: Tensor | None
    counts_L: Tensor
    counts_E: Tensor
    _home: SortPlan
    _part: "_Part | None"


class Dispatch(ABC):
    """The token exchange of a MoE layer."""

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Bring tokens to their experts."""

    @abstractmethod
    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Bring weighted expert outputs back and sum them: (R, D) -> (T, D)."""

    def run(self, x_TD: Tensor, routing: Routing, experts: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Dispatch, compute, combine.

        Args:
            x_TD: this rank's tokens.
            routing: their experts and weights.
            experts: `megagrin.moe.experts.Experts`.

        Returns:
            (T, D), the sum of each token's weighted expert outputs, and int64 (E,), rows per expert that these tokens chose.
        """
        sent = self.dispatch(x_TD, routing)
        y_RD = experts(sent.x, sent.weight_R, sent.counts_L, sent.backward_weight_R, sent.plan)
        return self.combine(y_RD, sent), sent.counts_E


def _sorted_weights(routing: Routing, plan: SortPlan) -> Tensor:
    """Forward weight, and backward weight where there is one, in row order: (T·K, 1 or 2)."""
    columns = [routing.weight_TK]
    if routing.backward_weight_TK is not None:
        columns.append(routing.backward_weight_TK)
    flat = torch.stack([column.reshape(-1) for column in columns], dim=1)
    return permute(flat, plan.of_choices())


def _chunks(routing: Routing, chunks: int) -> list[Routing]:
    backward_TK = routing.backward_weight_TK
    columns = zip(
        routing.expert_TK.tensor_split(chunks),
        routing.weight_TK.tensor_split(chunks),
        [None] * chunks if backward_TK is None else backward_TK.tensor_split(chunks),
        strict=True,
    )
    return [
        replace(routing, expert_TK=expert_TK, weight_TK=weight_TK, backward_weight_TK=backward)
        for expert_TK, weight_TK, backward in columns
    ]


def _split_weights(weight_R2: Tensor) -> tuple[Tensor, Tensor | None]:
    backward = weight_R2[:, 1].detach() if weight_R2.shape[1] == 2 else None
    return weight_R2[:, 0], backward


class LocalDispatch(Dispatch):
    """Every expert is on this rank: a sort, no communication, and no copy of a size to the host."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        plan = sort_by_expert(routing.expert_TK, self.n_experts)
        weight_R, backward_R = sort_weights(routing.weight_TK, routing.backward_weight_TK, plan)
        rows = plan.of_rows()
        return Dispatched(x_TD, rows, weight_R, backward_R, plan.counts_E, plan.counts_E, rows, None)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        return unpermute(y_RD, sent._home)


class GatheredDispatch(Dispatch):
    """Every rank of a group has a part of every expert's matrices: tokens are gathered, partial outputs summed and scattered.

    Tokens travel once, not once per expert, and in equal numbers: no size is copied to the host.
    """

    def __init__(self, n_experts: int, group: dist.ProcessGroup) -> None:
        self.n_experts, self.group, self._local = n_experts, group, LocalDispatch(n_experts)

    def _gather(self, x_TX: Tensor) -> Tensor:
        return gather_stacked(x_TX, self.group).flatten(0, 1)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        backward_TK = routing.backward_weight_TK
        everyones = replace(
            routing,
            expert_TK=self._gather(routing.expert_TK),
            weight_TK=self._gather(routing.weight_TK),
            backward_weight_TK=None if backward_TK is None else self._gather(backward_TK),
        )
        sent = self._local.dispatch(self._gather(x_TD), everyones)
        return replace(sent, counts_E=sort_by_expert(routing.expert_TK, self.n_experts).counts_E)

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        partial_TD = self._local.combine(y_RD, sent)
        return reduce_scatter_sequence(partial_TD.unsqueeze(0), self.group).squeeze(0)


@dataclass(frozen=True)
class _Part:
    """A chunk of this rank's tokens on its way to the experts.

    Attributes:
        home: how the chunk was sorted.
        x: exchange of its rows.
        weights: exchange of their weights.
        rows_Q: rows that each rank of the expert-tensor-parallel group receives.
        counts_QPL: rows by the rank that receives them, by source rank and by expert.
    """

    home: SortPlan
    x: Exchange
    weights: Exchange
    rows_Q: list[int]
    counts_QPL: Tensor


class AllToAllDispatch(Dispatch):
    """Experts are split over a group in equal, consecutive blocks; rows travel by all-to-all with exact sizes.

    The sizes are data, so the host must learn them: one device-to-host copy a layer, waited for when the rows to send are
    sorted, the only synchronisation. Where an expert's matrices are cut over a second group, its ranks share the rows they
    received and each keeps the sums of its own.
    """

    def __init__(self, n_experts: int, group: dist.ProcessGroup, cut_group: dist.ProcessGroup | None = None) -> None:
        """Set up.

        Args:
            n_experts: of the model.
            group: ranks that hold different experts.
            cut_group: ranks that hold parts of the same experts' matrices; None where they are whole.
        """
        self.n_experts, self.group, self.cut_group = n_experts, group, cut_group
        self.n_ranks = dist.get_world_size(group)

    def start(self, x_TD: Tensor, routing: Routing, chunks: int) -> list[tuple[tuple[Tensor, Tensor], _Part]]:
        """Send the tokens in chunks, all under way on return; each comes with the handles that `arrive` takes."""
        routings = _chunks(routing, chunks)
        homes = [sort_by_expert(part.expert_TK, self.n_experts) for part in routings]
        send_PCL = torch.stack([home.counts_E.view(self.n_ranks, -1) for home in homes], dim=1)
        receive_PCL = exchange_counts(send_PCL, self.group)
        counts_QPCL = receive_PCL.unsqueeze(0) if self.cut_group is None else gather_stacked(receive_PCL, self.cut_group)
        sizes = HostCopy(torch.cat([send_PCL.sum(2), receive_PCL.sum(2), counts_QPCL.sum((1, 3))]).t().contiguous())
        rows = [
            (permute(x_CD, home), _sorted_weights(part, home))
            for x_CD, part, home in zip(x_TD.tensor_split(chunks), routings, homes, strict=True)
        ]
        started = []
        for chunk, (home, (x_RD, weight_R2), numbers) in enumerate(zip(homes, rows, sizes.tolist(), strict=True)):
            sent, received, rows_Q = (
                numbers[: self.n_ranks],
                numbers[self.n_ranks : 2 * self.n_ranks],
                numbers[2 * self.n_ranks :],
            )
            x, weights = (Exchange(received, sent, self.group) for _ in range(2))
            part = _Part(home, x, weights, rows_Q, counts_QPCL[:, :, chunk])
            started.append(((x.start(x_RD), weights.start(weight_R2)), part))
        return started

    def arrive(self, handles: tuple[Tensor, Tensor], part: _Part) -> Dispatched:
        """The rows of a chunk, with the plan that sorts them by expert."""
        x_RD, weight_R2 = part.x.finish(handles[0]), part.weights.finish(handles[1])
        if self.cut_group is not None:
            x_RD, weight_R2 = (all_gather_rows(rows, part.rows_Q, self.cut_group) for rows in (x_RD, weight_R2))
        # Rows arrive by source rank, then by expert; the experts want them by expert, then by source rank.
        n_ranks, n_local = part.counts_QPL.shape[0] * part.counts_QPL.shape[1], part.counts_QPL.shape[2]
        expert_QPL = torch.arange(n_local, device=x_RD.device).repeat(n_ranks)
        expert_R = torch.repeat_interleave(expert_QPL, part.counts_QPL.reshape(-1), output_size=sum(part.rows_Q))
        by_expert = sort_by_expert(expert_R.unsqueeze(1), n_local)
        weight_R, backward_R = _split_weights(permute(weight_R2, by_expert))
        counts_L, counts_E = by_expert.counts_E, part.home.counts_E
        return Dispatched(x_RD, by_expert.of_rows(), weight_R, backward_R, counts_L, counts_E, part.home, part)

    def leave(self, y_RD: Tensor, sent: Dispatched) -> tuple[Tensor, Exchange]:
        """Start the way home of a chunk's outputs; `exchange.finish(handle)` ends it."""
        part = sent._part
        assert part is not None
        y_RD = unpermute(y_RD, sent.plan)
        if self.cut_group is not None:
            y_RD = reduce_scatter_rows(y_RD, part.rows_Q, self.cut_group)
        exchange = Exchange(part.x.send, part.x.receive, self.group)
        return exchange.start(y_RD), exchange

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        return self.arrive(*self.start(x_TD, routing, 1)[0])

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        handle, exchange = self.leave(y_RD, sent)
        return unpermute(exchange.finish(handle), sent._home)


class OverlappedDispatch(AllToAllDispatch):
    """The same in chunks: rows of one chunk travel while the experts work on another, in both directions and both passes.

    The experts are called once for all chunks (`PartedExperts`): FSDP2 would gather their weights once per call.
    """

    def __init__(self, n_experts: int, group: dist.ProcessGroup, cut_group: dist.ProcessGroup | None, chunks: int) -> None:
        super().__init__(n_experts, group, cut_group)
        self.chunks = chunks

    def run(self, x_TD: Tensor, routing: Routing, experts: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """As `Dispatch.run`, with `PartedExperts`."""
        started = self.start(x_TD, routing, self.chunks)
        parts = [part for _, part in started]
        exchanges: list[Exchange] = []

        def work(index: int, handles: tuple[Tensor, Tensor], compute: Callable[..., Tensor]) -> Tensor:
            sent = self.arrive(handles, parts[index])
            y_RD = compute(sent.x, sent.weight_R, sent.counts_L, sent.backward_weight_R, sent.plan)
            handle, exchange = self.leave(y_RD, sent)
            exchanges.append(exchange)
            return handle

        leaving = experts([handles for handles, _ in started], work)
        home = [
            unpermute(exchange.finish(handle), part.home)
            for handle, exchange, part in zip(leaving, exchanges, parts, strict=True)
        ]
        return torch.cat(home), torch.stack([part.home.counts_E for part in parts]).sum(0)
