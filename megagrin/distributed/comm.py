"""Differentiable collectives. The group is always an argument; every rank joins every call, with or without rows.

Sums over the sequence are formed in the tensor's own dtype. For bf16 partial sums of n ranks that adds a relative error of about
2⁻⁹·√n to a sublayer's output, the price of half the traffic. Gradients of parameters are reduced in fp32, see data.py.

Shape suffixes: R rows, B sequences, S positions (s of one rank), D features, P ranks.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# The names of torch 2.13; it warns of the older ones once a rank and call.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: parameters are stored as DTensors and computed with as local tensors."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def exchange_counts(send_counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all of equal blocks: rank r receives block r of every rank. Not differentiable.

    Args:
        send_counts: (ranks, …), any dtype; block i goes to rank i.
    """
    send = send_counts.contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received


class Exchange:
    """One all-to-all of rows with exact sizes, zeros allowed: start it, do something else, finish it.

    The gradient travels the same way back and is in flight between the same two points: `finish` starts it in backward and
    `start` waits for it. What `start` returns is a handle for autograd, not data.
    """

    def __init__(self, receive: list[int], send: list[int], group: dist.ProcessGroup) -> None:
        self.receive, self.send, self.group = receive, send, group
        self._work: dist.Work | None = None
        self._rows: tuple[Tensor, Tensor] | None = None

    def start(self, x_RD: Tensor) -> Tensor:
        """Send `send[i]` consecutive rows to rank i of the group."""
        return _StartExchange.apply(x_RD, self)

    def finish(self, handle_RD: Tensor) -> Tensor:
        """Rows from all ranks: by source rank, then as sent."""
        return _FinishExchange.apply(handle_RD, self)

    def launch(self, x_RD: Tensor, receive: list[int], send: list[int]) -> Tensor:
        """Start moving plain rows; the tensor returned is filled when `arrived` returns it."""
        assert self._work is None
        out = x_RD.new_empty(sum(receive), *x_RD.shape[1:])
        self._rows = (out, x_RD.contiguous())  # both must outlive the exchange
        self._work = dist.all_to_all_single(out, self._rows[1], receive, send, group=self.group, async_op=True)
        return out

    def arrived(self) -> Tensor:
        """Wait (on CUDA the current stream does) and return the rows."""
        assert self._work is not None
        assert self._rows is not None
        self._work.wait()
        out = self._rows[0]
        self._work = self._rows = None
        return out


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(x_RD, exchange.receive, exchange.send)
        return x_RD.view_as(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.arrived(), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle_RD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.arrived()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        return exchange.launch(grad_RD, exchange.send, exchange.receive), None


def all_to_all_rows(x_RD: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `send[i]` consecutive rows to rank i and receive `receive[i]` rows from it; zeros allowed.

    The gradient travels the same way back. Row order: by source rank, then as sent.
    """
    exchange = Exchange(receive, send, group)
    return exchange.finish(exchange.start(x_RD))


def all_gather_rows(x_RD: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
    """Join every rank's rows in rank order, `rows[i]` of rank i, zeros allowed. Backward sums over ranks.

    An all-to-all in which every rank gets the same: NCCL and gloo have it for unequal sizes, and in backward the sum over ranks
    is formed here, in fixed order and with one rounding.
    """
    ranks = len(rows)
    return all_to_all_rows(x_RD.repeat(ranks, 1), rows, [x_RD.shape[0]] * ranks, group)


def reduce_scatter_rows(x_RD: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks and keep this rank's rows, `rows[i]` for rank i, zeros allowed; the counterpart of `all_gather_rows`."""
    ranks, own = len(rows), rows[dist.get_rank(group)]
    return all_to_all_rows(x_RD, [own] * ranks, rows, group).unflatten(0, (ranks, own)).sum(0)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostCopy:
    """Integers on their way to the host. On CUDA by a side stream: waiting for them does not wait for later kernels."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._ready = values, None
        if values.is_cuda:
            side = _side_stream(values.device)
            side.wait_stream(torch.cuda.current_stream(values.device))
            with torch.cuda.stream(side):
                self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                self._host.copy_(values, non_blocking=True)
            values.record_stream(side)
            self._ready = side.record_event()

    def tolist(self) -> Any:
        """The values, once they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.tolist()


def _stacked(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    joined = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(joined, x.contiguous(), group=group)
    return joined.unflatten(0, (ranks, x.shape[0]))


class _GatherStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _stacked(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.new_empty(grad.shape[1:])
        _reduce_scatter(summed, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return summed, None


def gather_stacked(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, equal in shape, stacked by rank: (ranks, …). Backward sums each rank's gradients and hands them back."""
    return _GatherStacked.apply(x, group)


class _SwapBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange_counts(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return exchange_counts(grad, ctx.group), None


def swap_blocks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all of equal blocks: (ranks, …), block i goes to rank i; block r of the result is from rank r.

    Not an `Exchange`, which starts and waits apart: torch.compile knows no asynchronous collective and would break its graph.
    """
    return _SwapBlocks.apply(x, group)


def _joined_sequence(stacked_PBsD: Tensor) -> Tensor:
    return stacked_PBsD.transpose(0, 1).flatten(1, 2)


def all_gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join the sequence slices of a group in rank order: (B, s, D) -> (B, S, D). Backward sums over ranks and scatters."""
    return _joined_sequence(gather_stacked(x_BsD, group))


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, bias_D: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.has_bias = group, bias_D is not None
        ranks = dist.get_world_size(group)
        by_rank = x_BSD.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        out = x_BSD.new_empty(x_BSD.shape[0], x_BSD.shape[1] // ranks, x_BSD.shape[2])
        _reduce_scatter(out, by_rank.contiguous(), group=group)
        return out if bias_D is None else out.add_(bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_BSD = _joined_sequence(_stacked(grad_BsD, ctx.group))
        return grad_BSD, grad_BSD.sum((0, 1)) if ctx.has_bias else None, None


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
    return torch.cat(_stacked(x.detach(), group).unbind(), dim=-1)


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
