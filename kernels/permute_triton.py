"""Triton kernels of the permutation: a counting sort without atomics, a gather that reads each token once, and a gather-and-sum.

The sort takes two passes over blocks of rows: how many rows of each expert a block holds, and, after a running sum over the
blocks, where each row goes. Integers only and no atomics: the order is the stable one by construction.

Shape suffixes: T tokens, K experts per token, R = T·K routed rows, D model width, E experts, B blocks of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrin.kernels.grouped_gemm_triton import narrow
from megagrin.kernels.launch import Launch

# Rows per program of the sort: ranks inside a block come from all pairs, 16 k comparisons for 128 threads.
_SORT_ROWS = 128
_SORT_EXPERTS = 32
# Numbers per program of the gather of weights: 8 for each thread of 4 warps.
_NUMBERS = 1024
# Columns per program of the copies: 8 bf16 numbers for each thread of 4 warps.
_COPY_COLUMNS = 1024


@triton.jit
def count_kernel(expert_ptr, count_ptr, rows, n_blocks, E: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """count[e, block] = rows of expert e in this block."""
    block = tl.program_id(0)
    index = block * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_ptr + index, mask=index < rows, other=E)
    for first in range(0, E, EXPERTS):
        ids = first + tl.arange(0, EXPERTS)
        counts = tl.sum((expert[None, :] == ids[:, None]).to(tl.int32), 1)
        tl.store(count_ptr + ids.to(tl.int64) * n_blocks + block, counts, mask=ids < E)


@triton.jit
def place_kernel(
    expert_ptr, end_ptr, count_ptr, source_ptr, order_ptr, place_ptr, total_ptr, rows, n_blocks,
    TOP_K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Sorted place of each row: the rows of smaller experts and earlier blocks, then its rank in its block.

    Program 0 writes the rows of each expert, too: where its last cell ends, less where that of the expert before it does.
    """
    block = tl.program_id(0)
    index = block * ROWS + tl.arange(0, ROWS)
    mask = index < rows
    expert = tl.load(expert_ptr + index, mask=mask, other=0)
    cell = expert.to(tl.int64) * n_blocks + block
    before = tl.load(end_ptr + cell, mask=mask, other=0) - tl.load(count_ptr + cell, mask=mask, other=0)
    # Again as columns: the same rows on the other axis, so that all pairs can be compared. In 32 bits, which halves what the
    # comparison moves through shared memory.
    other_expert = tl.load(expert_ptr + index, mask=mask, other=-1).to(tl.int32)
    position = tl.arange(0, ROWS)
    earlier = (other_expert[None, :] == expert.to(tl.int32)[:, None]) & (position[None, :] < position[:, None])
    place = before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(place_ptr + index, place.to(tl.int64), mask=mask)
    tl.store(order_ptr + place, index.to(tl.int64), mask=mask)
    tl.store(source_ptr + place, (index // TOP_K).to(tl.int64), mask=mask)
    if block == 0:
        for first in range(0, E, EXPERTS):
            ids = first + tl.arange(0, EXPERTS)
            last = end_ptr + (ids.to(tl.int64) + 1) * n_blocks - 1
            end = tl.load(last, mask=ids < E, other=0)
            begin = tl.load(last - n_blocks, mask=(ids > 0) & (ids < E), other=0)
            tl.store(total_ptr + ids, (end - begin).to(tl.int64), mask=ids < E)


@triton.jit
def gather_numbers_kernel(
    x_ptr, other_ptr, order_ptr, y_ptr, other_y_ptr, rows, BOTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """y[r] = x[order[r]], of one or of two vectors."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = index < rows
    source = tl.load(order_ptr + index, mask=mask, other=0)
    tl.store(y_ptr + index, tl.load(x_ptr + source, mask=mask), mask=mask)
    if BOTH:
        tl.store(other_y_ptr + index, tl.load(other_ptr + source, mask=mask), mask=mask)


@triton.jit
def gather_rows_kernel(x_ptr, place_ptr, y_ptr, D, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """y[place[t, k]] = x[t] for every k."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = col < D
    x = tl.load(x_ptr + token * D + col, mask=mask)
    for k in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + k)
        tl.store(y_ptr + row * D + col, x, mask=mask)


@triton.jit
def gather_sum_kernel(y_ptr, place_ptr, x_ptr, D, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """x[t] = Σ_k y[place[t, k]] in fp32, in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = col < D
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + k)
        total += tl.load(y_ptr + row * D + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + token * D + col, narrow(total, x_ptr.dtype.element_ty), mask=mask)


def _count_launch(expert_R: Tensor, count_EB: Tensor) -> Launch:
    args = {
        "expert_ptr": expert_R,
        "count_ptr": count_EB,
        "rows": expert_R.shape[0],
        "n_blocks": count_EB.shape[1],
        "E": count_EB.shape[0],
        "ROWS": _SORT_ROWS,
        "EXPERTS": min(_SORT_EXPERTS, triton.next_power_of_2(count_EB.shape[0])),
    }
    return Launch(count_kernel, (count_EB.shape[1],), args)


def _place_launch(
    expert_R: Tensor,
    count_EB: Tensor,
    end_EB: Tensor,
    source_R: Tensor,
    order_R: Tensor,
    place_TK: Tensor,
    total_E: Tensor,
) -> Launch:
    args = {
        "expert_ptr": expert_R,
        "end_ptr": end_EB,
        "count_ptr": count_EB,
        "source_ptr": source_R,
        "order_ptr": order_R,
        "place_ptr": place_TK,
        "total_ptr": total_E,
        "rows": expert_R.shape[0],
        "n_blocks": count_EB.shape[1],
        "TOP_K": place_TK.shape[1],
        "E": count_EB.shape[0],
        "ROWS": _SORT_ROWS,
        "EXPERTS": min(_SORT_EXPERTS, triton.next_power_of_2(count_EB.shape[0])),
    }
    return Launch(place_kernel, (count_EB.shape[1],), args)


def run_sort(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source_R, place_TK, counts_E, order_R of `megagrin.kernels.permute.SortPlan`."""
    expert_R = expert_TK.reshape(-1).contiguous()
    rows, device = expert_R.shape[0], expert_R.device
    source_R, order_R = torch.empty_like(expert_R), torch.empty_like(expert_R)
    place_TK = torch.empty(expert_TK.shape, dtype=torch.int64, device=device)
    if rows == 0:
        return source_R, place_TK, torch.zeros(n_experts, dtype=torch.int64, device=device), order_R
    n_blocks = triton.cdiv(rows, _SORT_ROWS)
    count_EB = torch.empty(n_experts, n_blocks, dtype=torch.int32, device=device)
    counts_E = torch.empty(n_experts, dtype=torch.int64, device=device)
    _count_launch(expert_R, count_EB).run()
    # Experts outermost: the running sum over all cells is where each cell's rows end.
    end_EB = count_EB.view(-1).cumsum(0, dtype=torch.int32)
    _place_launch(expert_R, count_EB, end_EB, source_R, order_R, place_TK, counts_E).run()
    return source_R, place_TK, counts_E, order_R


def _numbers_launch(x_N: Tensor, other_N: Tensor | None, order_R: Tensor, y_R: Tensor, other_R: Tensor) -> Launch:
    rows = order_R.shape[0]
    args = {
        "x_ptr": x_N,
        "other_ptr": x_N if other_N is None else other_N,
        "order_ptr": order_R,
        "y_ptr": y_R,
        "other_y_ptr": y_R if other_N is None else other_R,
        "rows": rows,
        "BOTH": other_N is not None,
        "ROWS": _NUMBERS,
    }
    return Launch(gather_numbers_kernel, (triton.cdiv(rows, _NUMBERS),), args)


def run_gather_numbers(x: Tensor, other: Tensor | None, order_R: Tensor) -> tuple[Tensor, Tensor]:
    """Elements `order_R` of x and of `other` (no elements where it is None), both read as vectors of one dtype."""
    rows = order_R.shape[0]
    y_R, other_R = x.new_empty(rows), x.new_empty(rows if other is not None else 0)
    if rows:
        _numbers_launch(x.contiguous(), None if other is None else other.contiguous(), order_R, y_R, other_R).run()
    return y_R, other_R


def _copy_launch(kernel: triton.JITFunction, rows_side: Tensor, tokens_side: Tensor, place_TK: Tensor) -> Launch:
    n_tokens, width = tokens_side.shape
    columns = min(_COPY_COLUMNS, triton.next_power_of_2(width))
    args = {
        "x_ptr": tokens_side,
        "y_ptr": rows_side,
        "place_ptr": place_TK,
        "D": width,
        "TOP_K": place_TK.shape[1],
        "COLUMNS": columns,
    }
    return Launch(kernel, (n_tokens, triton.cdiv(width, columns)), args)


def run_gather_rows(x_TD: Tensor, place_TK: Tensor) -> Tensor:
    """(T, D) -> (T·K, D), each token at its K places."""
    x_TD = x_TD.contiguous()
    y_RD = x_TD.new_empty(place_TK.numel(), x_TD.shape[1])
    if y_RD.numel():
        _copy_launch(gather_rows_kernel, y_RD, x_TD, place_TK.contiguous()).run()
    return y_RD


def run_gather_sum(y_RD: Tensor, place_TK: Tensor) -> Tensor:
    """(T·K, D) -> (T, D), the sum of each token's K rows."""
    y_RD = y_RD.contiguous()
    x_TD = y_RD.new_empty(place_TK.shape[0], y_RD.shape[1])
    if x_TD.numel():
        _copy_launch(gather_sum_kernel, y_RD, x_TD, place_TK.contiguous()).run()
    return x_TD


def compile_cases(dtype: torch.dtype) -> dict[str, Launch]:
    """Launches of every kernel of this file on CPU tensors, for compiling without a GPU. Never run them."""
    x_TD, y_RD = torch.empty(64, 2048, dtype=dtype), torch.empty(512, 2048, dtype=dtype)
    index_R, place_TK = torch.empty(512, dtype=torch.int64), torch.empty(64, 8, dtype=torch.int64)
    count_EB, total_E = torch.empty(128, 4, dtype=torch.int32), torch.empty(128, dtype=torch.int64)
    number_R = torch.empty(512)
    return {
        "count": _count_launch(index_R, count_EB),
        "place": _place_launch(index_R, count_EB, count_EB, index_R, index_R, place_TK, total_E),
        "gather_number": _numbers_launch(number_R, None, index_R, number_R, number_R),
        "gather_numbers": _numbers_launch(number_R, number_R, index_R, number_R, number_R),
        "gather_rows": _copy_launch(gather_rows_kernel, y_RD, x_TD, place_TK),
        "gather_sum": _copy_launch(gather_sum_kernel, y_RD, x_TD, place_TK),
    }
