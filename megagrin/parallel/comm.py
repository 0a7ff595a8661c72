"""Differentiable collectives. The group is always an argument; every rank joins every call, with or without rows.

Shape suffixes: R rows, D features.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: parameters are stored as DTensors and computed with as local tensors."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def exchange_counts(send_counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all of equal blocks of integers: rank r receives block r of every rank. Not differentiable.

    Args:
        send_counts: int64 (ranks, …); block i goes to rank i.
    """
    received = torch.empty_like(send_counts)
    dist.all_to_all_single(received, send_counts.contiguous(), group=group)
    return received


def _all_to_all(x_RD: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x_RD.new_empty(sum(receive), *x_RD.shape[1:])
    dist.all_to_all_single(out, x_RD.contiguous(), receive, send, group=group)
    return out


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _all_to_all(x_RD, receive, send, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.send, ctx.receive, ctx.group), None, None, None


def all_to_all_rows(x_RD: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `send[i]` consecutive rows to rank i and receive `receive[i]` rows from it; zeros allowed.

    The gradient travels the same way back. Row order: by source rank, then as sent.
    """
    return _AllToAllRows.apply(x_RD, receive, send, group)


class _GatherStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        joined = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(joined, x.contiguous(), group=group)
        return joined.unflatten(0, (ranks, x.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(summed, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return summed, None


def gather_stacked(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, equal in shape, stacked by rank: (ranks, …). Backward sums each rank's gradients and hands them back."""
    return _GatherStacked.apply(x, group)
