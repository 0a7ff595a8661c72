"""Sorting tokens by expert and back: the permutation around the grouped GEMM.

Row order is fixed: by expert, then by token, then by rank of the choice. No float atomics anywhere: combining is a gather and a
sum over the K rows of a token, in the order of its choices, so results repeat bit for bit.

Shape suffixes: T tokens, K experts per token, R = T·K routed rows, D model width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class SortPlan:
    """A stable counting sort of routed rows by group.

    Attributes:
        source_R: int64, for each sorted row the token it is a copy of.
        place_TK: int64, for each (token, choice) its sorted row.
        counts_E: int64, rows per group, on the device; may contain zeros.
    """

    source_R: Tensor
    place_TK: Tensor
    counts_E: Tensor


def sort_by_expert(expert_TK: Tensor, n_experts: int) -> SortPlan:
    """Plan the sort of T·K rows by expert id.

    Args:
        expert_TK: int64 (T, K), values in [0, n_experts).
        n_experts: number of groups E.
    """
    flat_R = expert_TK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # Not bincount: on CUDA that copies the maximum to the host.
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat_R.device)
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return SortPlan(order_R // expert_TK.shape[1], place_R.view(expert_TK.shape), counts_E)


def _gather_sum(x_RD: Tensor, place_TK: Tensor) -> Tensor:
    if place_TK.shape[1] == 1:
        return x_RD.index_select(0, place_TK.view(-1))
    # One gather and add per choice: the (T, K, D) copy is never formed.
    out_TD = x_RD.index_select(0, place_TK[:, 0])
    for choice in range(1, place_TK.shape[1]):
        out_TD += x_RD.index_select(0, place_TK[:, choice])
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _gather_sum(grad_RD, place_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(source_R)
        return _gather_sum(y_RD, place_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (source_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, source_R), None, None


def permute(x_TD: Tensor, plan: SortPlan) -> Tensor:
    """Copy tokens into their sorted rows: (T, D) -> (R, D). The gradient of a token is the sum over its rows."""
    return _Permute.apply(x_TD, plan.source_R, plan.place_TK)


def unpermute(y_RD: Tensor, plan: SortPlan) -> Tensor:
    """Sum the K rows of each token: (R, D) -> (T, D), the inverse movement of `permute`."""
    return _Unpermute.apply(y_RD, plan.source_R, plan.place_TK)
