"""Differentiable collectives. The group is always an argument; every rank joins every call, with or without rows.

Sums over the sequence are formed in the tensor's own dtype. For bf16 partial sums of n ranks that adds a relative error of about
2⁻⁹·√n to a sublayer's output, the price of half the traffic. Gradients of parameters are reduced in fp32, see data.py.

Shape suffixes: R rows, B sequences, S positions (s of one rank), D features.
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


def _gather_dim1(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    out = x_BsD.new_empty(ranks * x_BsD.shape[0], *x_BsD.shape[1:])
    dist.all_gather_into_tensor(out, x_BsD.contiguous(), group=group)
    return out.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)


def _reduce_scatter_dim1(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    by_rank = x_BSD.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
    out = x_BSD.new_empty(x_BSD.shape[0], x_BSD.shape[1] // ranks, *x_BSD.shape[2:])
    dist.reduce_scatter_tensor(out, by_rank.contiguous(), group=group)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_dim1(x_BsD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_dim1(grad_BSD, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, bias_D: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.has_bias = group, bias_D is not None
        out = _reduce_scatter_dim1(x_BSD, group)
        return out if bias_D is None else out.add_(bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_BSD = _gather_dim1(grad_BsD, ctx.group)
        return grad_BSD, grad_BSD.sum((0, 1)) if ctx.has_bias else None, None


def all_gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join the sequence slices of a group in rank order: (B, s, D) -> (B, S, D). Backward sums over ranks and scatters."""
    return _GatherSequence.apply(x_BsD, group)


def reduce_scatter_sequence(x_BSD: Tensor, group: dist.ProcessGroup, bias_D: Tensor | None = None) -> Tensor:
    """Sum over the ranks of a group and keep this rank's slice of the sequence: (B, S, D) -> (B, s, D).

    Args:
        x_BSD: this rank's partial sum; S must be a multiple of the group's size.
        group: the ranks.
        bias_D: equal on all ranks, added once to the sum. Its gradient comes from the whole sequence, which backward gathers
            anyway, so that every rank has all of it.
    """
    return _ScatterSequence.apply(x_BSD, bias_D, group)


def all_gather_last_dim(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join equal blocks of the last dimension in rank order. Not differentiable."""
    ranks = dist.get_world_size(group)
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous(), group=group)
    return torch.cat(out.chunk(ranks), dim=-1)


class _SliceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, start: int, rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.shape, ctx.start, ctx.group = x_RD.shape, start, group
        return x_RD.narrow(0, start, rows).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grad_RD.new_zeros(ctx.shape)
        whole.narrow(0, ctx.start, grad_RD.shape[0]).copy_(grad_RD)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


def slice_replicated(x_RD: Tensor, start: int, rows: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of a tensor that every rank of the group holds whole; the gradient is whole on every rank, too."""
    return _SliceRows.apply(x_RD, start, rows, group)
