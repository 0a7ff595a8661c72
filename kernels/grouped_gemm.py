"""Ragged per-expert matrix products: the rows of x are sorted by expert, each block of rows meets its own matrix.

Three products make a layer: forward and dgrad group the rows (M-grouped), wgrad groups the contraction (K-grouped). This file
holds the PyTorch reference, which is the CPU path, and the ops; grouped_gemm_triton.py holds the kernels.

Empty experts are normal: they produce no rows and a zero weight gradient.

Shape suffixes: R routed rows, E experts, N output features, K input features.
"""

from typing import Any

import torch
from torch import Tensor, library

from megagrin.kernels.backend import tma_rows, use_triton

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_float(where: str, x: Tensor) -> None:
    """Raise ValueError unless x is of a dtype that the kernels or their references take; `where` names op and argument."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{where} is {x.dtype}; it must be float32, float64, bfloat16 or float16")


def check_same(where: str, x: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless x and the other tensor agree in dtype and device."""
    if (x.dtype, x.device) != (other.dtype, other.device):
        raise ValueError(f"{where} is {x.dtype} on {x.device}, {name} is {other.dtype} on {other.device}; they must agree")


def _check_counts(counts_E: Tensor, n_experts: int | None, rows: tuple[str, Tensor]) -> None:
    shape = "(E,)" if n_experts is None else f"({n_experts},)"
    fits = counts_E.dim() == 1 and n_experts in (None, counts_E.shape[0])
    if not fits or counts_E.dtype != torch.int64:
        raise ValueError(f"grouped_gemm: counts {tuple(counts_E.shape)} {counts_E.dtype} must be int64 of shape {shape}")
    if counts_E.device != rows[1].device:
        raise ValueError(f"grouped_gemm: counts are on {counts_E.device}, {rows[0]} on {rows[1].device}; they must agree")


def check_grouped(x: Tensor, w_ENK: Tensor, counts_E: Tensor, wide_weights: bool = False, dgrad: bool = False) -> None:
    """Raise ValueError unless rows, weights and counts fit each other.

    Args:
        x: (R, K), or for dgrad (R, N).
        w_ENK: (E, N, K).
        counts_E: int64 (E,).
        wide_weights: float32 weights may meet narrower rows.
        dgrad: rows are contracted with N.
    """
    name, sizes, one = ("dy", "(R, N)", "N") if dgrad else ("x", "(R, K)", "K")
    if x.dim() != 2 or w_ENK.dim() != 3 or x.shape[1] != w_ENK.shape[1 if dgrad else 2]:
        raise ValueError(
            f"grouped_gemm: {name} {tuple(x.shape)} and w {tuple(w_ENK.shape)} must be {sizes} and (E, N, K) with one {one}"
        )
    _check_counts(counts_E, w_ENK.shape[0], (name, x))
    check_float(f"grouped_gemm: {name}", x)
    if not (wide_weights and w_ENK.dtype == torch.float32 and x.dtype.itemsize == 2 and w_ENK.device == x.device):
        check_same(f"grouped_gemm: {name}", x, "w", w_ENK)


def _blocks(counts_E: Tensor, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    blocks, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            blocks.append((expert, start, start + count))
        start += count
    if start != rows:
        raise ValueError(f"grouped_gemm: counts sum to {start}, x has {rows} rows; they must be equal")
    return blocks


def _use_grouped_mm(x: Tensor, *widths: int) -> bool:
    # CUDA without Triton: torch's grouped kernel takes bf16 in rows of whole 16 bytes and keeps the offsets on the device.
    # On CPU the loop wins: benchmarks/results has the measured ratio.
    return x.is_cuda and x.dtype == torch.bfloat16 and x.numel() > 0 and tma_rows(x.dtype, *widths)


# oneDNN builds a primitive for every new shape, and rows per expert are new in every step: on one thread with avx512_bf16,
# products of 60 to 200 rows ran at 62 to 100 GF/s with ever new sizes, at 154 to 168 GF/s with sizes rounded up to multiples of
# 32. MKL's fp32 products do not care.
_ROW_MULTIPLE = 32


def _rounded_end(start: int, end: int, rows: int, x: Tensor) -> int:
    """Where to stop a product that should cover rows [start, end), so that few different sizes occur."""
    rounded = start + -(-(end - start) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return rounded if x.dtype == torch.bfloat16 and rounded <= rows else end


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _loop(x_RK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    rows = x_RK.shape[0]
    y_RN = x_RK.new_empty(rows, w_EKN.shape[2])
    for expert, start, end in _blocks(counts_E, rows):
        # Rows past the block meet the wrong matrix and are overwritten when their own block's turn comes.
        stop = _rounded_end(start, end, rows, x_RK)
        torch.mm(x_RK[start:stop], w_EKN[expert], out=y_RN[start:stop])
    return y_RN


def _wgrad_loop(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, dw_ENK: Tensor, accumulate: bool = False) -> None:
    rows = dy_RN.shape[0]
    filled = set()
    for expert, start, end in _blocks(counts_E, rows):
        stop = _rounded_end(start, end, rows, dy_RN)
        dy_block = dy_RN[start:end] if stop == end else torch.nn.functional.pad(dy_RN[start:end], (0, 0, 0, stop - end))
        # torch has no product of narrow operands with a wide result on the CPU: rounded once, then widened.
        if accumulate and dw_ENK.dtype == dy_RN.dtype:
            dw_ENK[expert].addmm_(dy_block.t(), x_RK[start:stop])
        elif accumulate:
            dw_ENK[expert] += dy_block.t() @ x_RK[start:stop]
        elif dw_ENK.dtype == dy_RN.dtype:
            torch.mm(dy_block.t(), x_RK[start:stop], out=dw_ENK[expert])
        else:
            dw_ENK[expert] = dy_block.t() @ x_RK[start:stop]
        filled.add(expert)
    for expert in set(range(0 if accumulate else counts_E.shape[0])) - filled:
        dw_ENK[expert].zero_()


@library.custom_op("megagrin::m_grouped", mutates_args=())
def _m_grouped(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor, dgrad: bool) -> Tensor:
    if use_triton(x_RK, "grouped_gemm") and tma_rows(x_RK.dtype, *w_ENK.shape[1:]):
        from megagrin.kernels.grouped_gemm_triton import run_m_grouped

        return run_m_grouped(x_RK, w_ENK, counts_E, dgrad)
    w_EKN = w_ENK if dgrad else w_ENK.transpose(1, 2)
    if _use_grouped_mm(x_RK, *w_ENK.shape[1:]):
        return torch._grouped_mm(x_RK, w_EKN, offs=_offsets(counts_E))
    return _loop(x_RK, w_EKN, counts_E)


@_m_grouped.register_fake
def _(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor, dgrad: bool) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], w_ENK.shape[2 if dgrad else 1])


@library.custom_op("megagrin::k_grouped_wgrad", mutates_args=())
def _k_grouped_wgrad(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, out_dtype: torch.dtype) -> Tensor:
    if use_triton(dy_RN, "grouped_gemm") and tma_rows(dy_RN.dtype, dy_RN.shape[1], x_RK.shape[1]):
        from megagrin.kernels.grouped_gemm_triton import run_wgrad

        return run_wgrad(dy_RN, x_RK, counts_E, out_dtype, None)
    if _use_grouped_mm(dy_RN, dy_RN.shape[1], x_RK.shape[1]):
        return torch._grouped_mm(dy_RN.t(), x_RK, offs=_offsets(counts_E)).to(out_dtype)
    dw_ENK = dy_RN.new_empty(counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1], dtype=out_dtype)
    _wgrad_loop(dy_RN, x_RK, counts_E, dw_ENK)
    return dw_ENK


@_k_grouped_wgrad.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, out_dtype: torch.dtype) -> Tensor:
    return dy_RN.new_empty(counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1], dtype=out_dtype)


@library.custom_op("megagrin::k_grouped_wgrad_", mutates_args={"into_ENK"})
def _k_grouped_wgrad_into(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, into_ENK: Tensor) -> None:
    if use_triton(dy_RN, "grouped_gemm") and tma_rows(dy_RN.dtype, dy_RN.shape[1], x_RK.shape[1]):
        from megagrin.kernels.grouped_gemm_triton import run_wgrad

        run_wgrad(dy_RN, x_RK, counts_E, torch.float32, into_ENK)
    elif _use_grouped_mm(dy_RN, dy_RN.shape[1], x_RK.shape[1]):
        into_ENK += torch._grouped_mm(dy_RN.t(), x_RK, offs=_offsets(counts_E))
    else:
        _wgrad_loop(dy_RN, x_RK, counts_E, into_ENK, accumulate=True)


@_k_grouped_wgrad_into.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, into_ENK: Tensor) -> None:
    return None


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    x_RK, w_ENK, counts_E, dgrad = inputs
    ctx.save_for_backward(x_RK, w_ENK, counts_E)
    ctx.dgrad = dgrad


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, w_ENK, counts_E = ctx.saved_tensors
    to_x, to_w = ctx.needs_input_grad[:2]
    rows = (x, dy) if ctx.dgrad else (dy, x)
    return (
        _m_grouped(dy, w_ENK, counts_E, not ctx.dgrad) if to_x else None,
        _k_grouped_wgrad(*rows, counts_E, w_ENK.dtype) if to_w else None,
        None,
        None,
    )


_m_grouped.register_autograd(_backward, setup_context=_save_inputs)


def m_grouped(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """y[r] = w[e(r)] · x[r]: (R, K) × (E, N, K) -> (R, N). The forward product; arguments and errors as in `grouped_gemm`."""
    check_grouped(x_RK, w_ENK, counts_E)
    return _m_grouped(x_RK, w_ENK, counts_E, False)


def m_grouped_dgrad(dy_RN: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """dx[r] = w[e(r)]ᵀ · dy[r]: (R, N) × (E, N, K) -> (R, K). Errors as in `grouped_gemm`."""
    check_grouped(dy_RN, w_ENK, counts_E, dgrad=True)
    return _m_grouped(dy_RN, w_ENK, counts_E, True)


def _check_wgrad(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, out_dtype: torch.dtype | None) -> None:
    if dy_RN.dim() != 2 or x_RK.dim() != 2 or dy_RN.shape[0] != x_RK.shape[0]:
        raise ValueError(
            f"k_grouped_wgrad: dy {tuple(dy_RN.shape)} and x {tuple(x_RK.shape)} must be (R, N) and (R, K) with one R"
        )
    check_float("k_grouped_wgrad: dy", dy_RN)
    check_same("k_grouped_wgrad: dy", dy_RN, "x", x_RK)
    _check_counts(counts_E, None, ("dy", dy_RN))
    if out_dtype not in (None, torch.float32, dy_RN.dtype):
        raise ValueError(f"k_grouped_wgrad: out_dtype {out_dtype} must be torch.float32 or that of dy, {dy_RN.dtype}")


def k_grouped_wgrad(
    dy_RN: Tensor,
    x_RK: Tensor,
    counts_E: Tensor,
    out_dtype: torch.dtype | None = None,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """dw[e] = Σ_{r of e} dy[r] ⊗ x[r]: (R, N) × (R, K) -> (E, N, K); zero for an expert without rows. Not differentiable.

    Args:
        dy_RN: (R, N), rows sorted by expert.
        x_RK: (R, K), same dtype.
        counts_E: int64 (E,), summing to R.
        out_dtype: the operands' dtype (default) or float32, which keeps the kernels' fp32 sums unrounded.
        accumulate_into: contiguous fp32 (E, N, K) that dw is added to and that is returned, as for main gradients. In the
            kernels no earlier value travels to the multiprocessor and back.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or accumulate_into is not contiguous.
    """
    _check_wgrad(dy_RN, x_RK, counts_E, out_dtype)
    if accumulate_into is None:
        return _k_grouped_wgrad(dy_RN, x_RK, counts_E, out_dtype or dy_RN.dtype)
    shape = (counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    # fp64 beside fp64 operands: what the reference is checked with.
    wide = torch.promote_types(dy_RN.dtype, torch.float32)
    fits = (accumulate_into.shape, accumulate_into.dtype, accumulate_into.device) == (shape, wide, dy_RN.device)
    if not fits or not accumulate_into.is_contiguous():
        raise ValueError(
            f"k_grouped_wgrad: accumulate_into {tuple(accumulate_into.shape)} {accumulate_into.dtype} on "
            f"{accumulate_into.device} must be contiguous {wide} of shape {shape} on {dy_RN.device}"
        )
    _k_grouped_wgrad_into(dy_RN, x_RK, counts_E, accumulate_into)
    return accumulate_into


def grouped_gemm(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each block of rows with its expert's matrix, differentiably.

    Args:
        x_RK: (R, K) float32, float64, bfloat16 or float16, rows sorted by expert.
        w_ENK: (E, N, K), same dtype and device.
        counts_E: int64 (E,), rows per expert, summing to R; zeros allowed. On CUDA the sum is not checked: that would wait for
            the device, and a wrong sum is undefined behaviour.

    Returns:
        (R, N).

    Raises:
        ValueError: shapes, dtypes, devices or (on the CPU) counts that do not fit.
    """
    check_grouped(x_RK, w_ENK, counts_E)
    return _m_grouped(x_RK, w_ENK, counts_E, False)
