"""Sorting tokens by expert and back: the permutation around the grouped GEMM.

Row order is fixed: by expert, then by token, then by rank of the choice. No float atomics anywhere: combining is a gather and a
sum over the K rows of a token, in the order of its choices, so results repeat bit for bit.

Shape suffixes: T tokens, K experts per token, R = T·K routed rows, D model width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from megagrin.kernels.backend import use_triton
from megagrin.kernels.launch import eager

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Narrower rows (the router's weights) are left to torch: a program for each token would move a few bytes.
_MIN_WIDTH = 32


@dataclass(frozen=True)
class SortPlan:
    """A stable counting sort of routed rows by group.

    Attributes:
        source_R: int64, for each sorted row the token it is a copy of.
        place_TK: int64, for each (token, choice) its sorted row.
        counts_E: int64, rows per group, on the device; may contain zeros.
        order_R: int64, for each sorted row its number t·K + choice; the inverse of place_TK.
    """

    source_R: Tensor
    place_TK: Tensor
    counts_E: Tensor
    order_R: Tensor

    def of_choices(self) -> "SortPlan":
        """The same sort for tensors with one row for each (token, choice)."""
        return SortPlan(self.order_R, self.place_TK.reshape(-1, 1), self.counts_E, self.order_R)

    def of_rows(self) -> "SortPlan":
        """The same sort without `order_R`, which only numbers of choices are sorted by: what keeps it need not keep that."""
        return SortPlan(self.source_R, self.place_TK, self.counts_E, self.order_R.new_empty(0))


def _sort_rows(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_triton(expert_TK, "permute"):
        from megagrin.kernels.permute_triton import run_sort

        return run_sort(expert_TK, n_experts)
    flat_R = expert_TK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # Not bincount: on CUDA that copies the maximum to the host.
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat_R.device)
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return order_R // expert_TK.shape[1], place_R.view(expert_TK.shape), counts_E, order_R


_sort_op = library.custom_op("megagrin::sort_by_expert", _sort_rows, mutates_args=())
_sort = eager(_sort_op, _sort_rows)


@_sort_op.register_fake
def _(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = expert_TK.shape[0] * expert_TK.shape[1]
    place_TK, counts_E = expert_TK.new_empty(expert_TK.shape), expert_TK.new_empty(n_experts)
    return expert_TK.new_empty(rows), place_TK, counts_E, expert_TK.new_empty(rows)


def sort_by_expert(expert_TK: Tensor, n_experts: int) -> SortPlan:
    """Plan the sort of T·K rows by expert id.

    Args:
        expert_TK: int64 (T, K), values in [0, n_experts): not checked on CUDA, where that would wait for the device.
        n_experts: number of groups E.

    Raises:
        ValueError: expert_TK is not an int64 matrix, or n_experts is below 1.
    """
    if expert_TK.dim() != 2 or expert_TK.dtype != torch.int64:
        raise ValueError(f"sort_by_expert: experts {tuple(expert_TK.shape)} {expert_TK.dtype} must be int64 (T, K)")
    if n_experts < 1:
        raise ValueError(f"sort_by_expert: n_experts {n_experts} must be at least 1")
    return SortPlan(*_sort(expert_TK, n_experts))


def _use_kernels(x: Tensor) -> bool:
    return use_triton(x, "permute") and x.dtype in _KERNEL_DTYPES and x.shape[1] >= _MIN_WIDTH


def _gather_rows(x_TD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
    """x[source]: (T, D) -> (R, D), the op behind `permute`."""
    if _use_kernels(x_TD):
        from megagrin.kernels.permute_triton import run_gather_rows

        return run_gather_rows(x_TD, place_TK)
    return x_TD.index_select(0, source_R)


_gather_rows_op = library.custom_op("megagrin::gather_rows", _gather_rows, mutates_args=())


@_gather_rows_op.register_fake
def _(x_TD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
    return x_TD.new_empty(source_R.shape[0], x_TD.shape[1])


def _gather_sum(y_RD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
    """Σ_k y[place[t, k]]: (R, D) -> (T, D), the op behind `unpermute`. Sums in fp32 at least, rounds once."""
    if _use_kernels(y_RD):
        from megagrin.kernels.permute_triton import run_gather_sum

        return run_gather_sum(y_RD, place_TK)
    # One gather and add per choice: the (T, K, D) copy is never formed.
    out_TD = y_RD.index_select(0, place_TK[:, 0])
    if place_TK.shape[1] > 2:  # two numbers are rounded once in any dtype
        out_TD = out_TD.to(torch.promote_types(y_RD.dtype, torch.float32))
    for choice in range(1, place_TK.shape[1]):
        out_TD += y_RD.index_select(0, place_TK[:, choice])
    return out_TD.to(y_RD.dtype)


_gather_sum_op = library.custom_op("megagrin::gather_sum", _gather_sum, mutates_args=())


@_gather_sum_op.register_fake
def _(y_RD: Tensor, source_R: Tensor, place_TK: Tensor) -> Tensor:
    return y_RD.new_empty(place_TK.shape[0], y_RD.shape[1])


def _save_plan(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_rows_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
    return gather_sum(grad_RD, *ctx.saved_tensors), None, None


def _gather_sum_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
    return gather_rows(grad_TD, *ctx.saved_tensors), None, None


_gather_rows_op.register_autograd(_gather_rows_backward, setup_context=_save_plan)
_gather_sum_op.register_autograd(_gather_sum_backward, setup_context=_save_plan)
# In plain eager mode, see `megagrin.kernels.launch`.
gather_rows = eager(_gather_rows_op, _gather_rows, _gather_rows_backward, _save_plan)
gather_sum = eager(_gather_sum_op, _gather_sum, _gather_sum_backward, _save_plan)


def _sort_weights(weight_TK: Tensor, backward_TK: Tensor | None, order_R: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
    if use_triton(weight_TK, "permute") and weight_TK.dtype == torch.float32:
        from megagrin.kernels.permute_triton import run_gather_numbers

        return run_gather_numbers(weight_TK, backward_TK, order_R)
    weight_R = weight_TK.reshape(-1).index_select(0, order_R)
    return weight_R, weight_R.new_empty(0) if backward_TK is None else backward_TK.reshape(-1).index_select(0, order_R)


_sort_weights_op = library.custom_op("megagrin::sort_weights", _sort_weights, mutates_args=())


@_sort_weights_op.register_fake
def _(weight_TK: Tensor, backward_TK: Tensor | None, order_R: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
    return weight_TK.new_empty(order_R.shape), weight_TK.new_empty(order_R.shape if backward_TK is not None else 0)


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[3])
    ctx.set_materialize_grads(False)


def _sort_weights_backward(ctx: Any, grad_R: Tensor | None, _grad_backward_R: None) -> tuple[Tensor | None, None, None, None]:
    if grad_R is None:
        return None, None, None, None
    place_TK = ctx.saved_tensors[0]
    return _sort_weights_direct(grad_R, None, place_TK.reshape(-1), place_TK)[0].view(place_TK.shape), None, None, None


_sort_weights_op.register_autograd(_sort_weights_backward, setup_context=_save_place)
_sort_weights_direct = eager(_sort_weights_op, _sort_weights, _sort_weights_backward, _save_place)


def _check_rows(op: str, name: str, x: Tensor, rows: int, what: str, plan: SortPlan) -> None:
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(f"{op}: {name} {tuple(x.shape)} must be ({rows}, D), one row a {what} of the plan")
    if x.device != plan.place_TK.device:
        raise ValueError(f"{op}: {name} is on {x.device}, the plan on {plan.place_TK.device}; they must agree")


def permute(x_TD: Tensor, plan: SortPlan) -> Tensor:
    """Copy tokens into their sorted rows: (T, D) -> (R, D). The gradient of a token is the sum over its rows.

    Raises:
        ValueError: x has another number of rows than the plan has tokens, or lies on another device.
    """
    _check_rows("permute", "x", x_TD, plan.place_TK.shape[0], "token", plan)
    return gather_rows(x_TD, plan.source_R, plan.place_TK)


def unpermute(y_RD: Tensor, plan: SortPlan) -> Tensor:
    """Sum the K rows of each token: (R, D) -> (T, D), the inverse movement of `permute`.

    Raises:
        ValueError: y has another number of rows than the plan, or lies on another device.
    """
    _check_rows("unpermute", "y", y_RD, plan.source_R.shape[0], "choice", plan)
    return gather_sum(y_RD, plan.source_R, plan.place_TK)


def sort_weights(weight_TK: Tensor, backward_TK: Tensor | None, plan: SortPlan) -> tuple[Tensor, Tensor | None]:
    """Bring one or two numbers of each (token, choice) into row order: (T, K) -> (R,).

    Args:
        weight_TK: float; its gradient goes the same way back.
        backward_TK: of weight's dtype, or None; carries no gradient.
        plan: the sort.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    for name, x in (("weight", weight_TK), ("backward_weight", backward_TK)):
        if x is not None and (x.shape, x.device) != (plan.place_TK.shape, plan.place_TK.device):
            raise ValueError(
                f"sort_weights: {name} {tuple(x.shape)} on {x.device} must be {tuple(plan.place_TK.shape)} on "
                f"{plan.place_TK.device}, one number a choice of the plan"
            )
    if backward_TK is not None and backward_TK.dtype != weight_TK.dtype:
        raise ValueError(f"sort_weights: backward_weight is {backward_TK.dtype}, weight is {weight_TK.dtype}; they must agree")
    weight_R, backward_R = _sort_weights_direct(weight_TK, backward_TK, plan.order_R, plan.place_TK)
    return weight_R, None if backward_TK is None else backward_R.detach()
