"""Ragged per-expert matrix products: the rows of x are sorted by expert, each block of rows meets its own matrix.

Three products make a layer: forward and dgrad group the rows (M-grouped), wgrad groups the contraction (K-grouped). This file
holds the PyTorch reference, which is the CPU path; a Triton implementation takes the same three signatures.

Empty experts are normal: they produce no rows and a zero weight gradient.

Shape suffixes: R routed rows, E experts, N output features, K input features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _check(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> None:
    if x_RK.dim() != 2 or w_ENK.dim() != 3 or x_RK.shape[1] != w_ENK.shape[2]:
        raise ValueError(
            f"grouped_gemm: x {tuple(x_RK.shape)} and w {tuple(w_ENK.shape)} must be (R, K) and (E, N, K) with one K"
        )
    if counts_E.shape != (w_ENK.shape[0],) or counts_E.dtype != torch.int64:
        raise ValueError(
            f"grouped_gemm: counts {tuple(counts_E.shape)} {counts_E.dtype} must be int64 of shape ({w_ENK.shape[0]},)"
        )
    if x_RK.dtype != w_ENK.dtype or x_RK.device != w_ENK.device:
        raise ValueError(
            f"grouped_gemm: x is {x_RK.dtype} on {x_RK.device}, w is {w_ENK.dtype} on {w_ENK.device}; they must agree"
        )


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


def _use_grouped_mm(x: Tensor) -> bool:
    # CUDA without a Triton kernel: torch's grouped kernel takes bf16 and keeps the offsets on the device.
    # On CPU the loop wins: benchmarks/results has the measured ratio.
    return x.is_cuda and x.dtype == torch.bfloat16


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


def m_grouped(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """y[r] = w[e(r)] · x[r]: (R, K) × (E, N, K) -> (R, N). The forward product; not differentiable."""
    if _use_grouped_mm(x_RK):
        return torch._grouped_mm(x_RK, w_ENK.transpose(-2, -1), offs=_offsets(counts_E))
    return _loop(x_RK, w_ENK.transpose(1, 2), counts_E)


def m_grouped_dgrad(dy_RN: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """dx[r] = w[e(r)]ᵀ · dy[r]: (R, N) × (E, N, K) -> (R, K). Not differentiable."""
    if _use_grouped_mm(dy_RN):
        return torch._grouped_mm(dy_RN, w_ENK, offs=_offsets(counts_E))
    return _loop(dy_RN, w_ENK, counts_E)


def _loop(x_RK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    rows = x_RK.shape[0]
    y_RN = x_RK.new_empty(rows, w_EKN.shape[2])
    for expert, start, end in _blocks(counts_E, rows):
        # Rows past the block meet the wrong matrix and are overwritten when their own block's turn comes.
        stop = _rounded_end(start, end, rows, x_RK)
        torch.mm(x_RK[start:stop], w_EKN[expert], out=y_RN[start:stop])
    return y_RN


def k_grouped_wgrad(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor) -> Tensor:
    """dw[e] = Σ_{r of e} dy[r] ⊗ x[r]: (R, N) × (R, K) -> (E, N, K); zero for an expert without rows. Not differentiable."""
    if _use_grouped_mm(dy_RN):
        return torch._grouped_mm(dy_RN.t(), x_RK, offs=_offsets(counts_E))
    rows = dy_RN.shape[0]
    dw_ENK = dy_RN.new_empty(counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    filled = set()
    for expert, start, end in _blocks(counts_E, rows):
        stop = _rounded_end(start, end, rows, dy_RN)
        dy_block = dy_RN[start:end] if stop == end else torch.nn.functional.pad(dy_RN[start:end], (0, 0, 0, stop - end))
        torch.mm(dy_block.t(), x_RK[start:stop], out=dw_ENK[expert])
        filled.add(expert)
    for expert in set(range(counts_E.shape[0])) - filled:
        dw_ENK[expert].zero_()
    return dw_ENK


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RK, w_ENK, counts_E)
        return m_grouped(x_RK, w_ENK, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RK, w_ENK, counts_E = ctx.saved_tensors
        dy_RN = dy_RN.contiguous()
        return m_grouped_dgrad(dy_RN, w_ENK, counts_E), k_grouped_wgrad(dy_RN, x_RK, counts_E), None


def grouped_gemm(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each block of rows with its expert's matrix, differentiably.

    Args:
        x_RK: (R, K) float32, float64 or bfloat16, rows sorted by expert.
        w_ENK: (E, N, K), same dtype and device.
        counts_E: int64 (E,), rows per expert, summing to R; zeros allowed.

    Returns:
        (R, N).

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
    """
    _check(x_RK, w_ENK, counts_E)
    return _GroupedGemm.apply(x_RK, w_ENK, counts_E)
