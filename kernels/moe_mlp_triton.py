"""Triton kernels of the expert MLP: the up product with SwiGLU in its epilogue, and the down product's dgrad with SwiGLU's own.

Gate and up rows of the weight are interleaved (g0, u0, g1, u1, …), so both numbers of a pair lie in one thread's registers and no
data moves for the activation. The epilogue goes in column slices: a whole 128 × 128 tile of gate, up and their gradients spills
417 registers' worth of stores, four slices of it spill none.

Limits that callers hold: as in grouped_gemm_triton.

Shape suffixes: R routed rows, T tokens, D model width, F expert width, E experts, N column tiles. In kernels: BM, BN, BK tile
sizes; C columns of a slice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrin.kernels import backend
from megagrin.kernels.grouped_gemm_triton import (
    INTERPRET,
    Schedule,
    build_schedule,
    dense,
    dot,
    halves,
    load_rows,
    narrow,
    ragged_desc,
    rows_desc,
    run_m_grouped,
    run_wgrad,
    schedule_launch,
    store_rows,
    tile_args,
    tile_position,
    weight_desc,
)
from megagrin.kernels.launch import Launch
from megagrin.kernels.permute_triton import run_gather_rows, run_gather_sum
from megagrin.kernels.tuning import BlockConfig, Op, config

# −log2(e)·x, 2^that, 1 + that, its reciprocal. tl.sigmoid takes the same two functions and guards numbers below 2^-126 at each of
# them, with six to eight more instructions in all. tanh.approx would save one: it is wrong for negative gates (docs/kernels.md).
# 0xBFB8AA3B is −log2(e), 0x3F800000 is 1.
_SIGMOID = tl.constexpr("""{
    .reg .f32 t;
    mul.ftz.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.ftz.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 $0, t;
}""")


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) of fp32 x within tl.sigmoid's error (tests/kernels/test_sigmoid.py); 0 below 2^-126, NaN for NaN."""
    if INTERPRET:  # noqa: SIM108 (two lines of code, one of them long)
        y = tl.sigmoid(x)
    else:  # in assembly, which the interpreter lacks
        y = tl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _swiglu_slices(
    h_desc, act_desc, begin, size, row, col, h, v, BM: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr, SAVE_H: tl.constexpr
):
    """Store the pre-activation h and v·silu(gate)·up of an accumulator of C interleaved columns."""
    if SLICES == 1:
        # From the rounded h, as stored: the backward pass must differentiate what the forward pass computed.
        stored = narrow(h, act_desc.dtype)
        gate, up = tl.split(stored.to(tl.float32).reshape(BM, C // 2, 2))
        store_rows(act_desc, begin, size, row, col // 2, gate * _sigmoid(gate) * up * v[:, None], BM, C // 2)
        if SAVE_H:  # after the activation: in the other order Triton 3.9 spills 2 registers of the gather on sm_90
            store_rows(h_desc, begin, size, row, col, h, BM, C)
    else:
        left, right = halves(h, BM, C)
        _swiglu_slices(h_desc, act_desc, begin, size, row, col, left, v, BM, C // 2, SLICES // 2, SAVE_H)
        _swiglu_slices(h_desc, act_desc, begin, size, row, col + C // 2, right, v, BM, C // 2, SLICES // 2, SAVE_H)


@triton.jit
def up_swiglu_kernel(
    x_desc, x_ptr, source_ptr, w_desc, v_ptr, h_desc, act_desc, offsets_ptr, expert_ptr, row_ptr, tiles_ptr, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr,
    SLICES: tl.constexpr, GATHER: tl.constexpr, SAVE_H: tl.constexpr,
):  # fmt: skip
    """h = w[e]·x, act = v·silu(gate)·up with (gate, up) = h's pairs; N = 2F. GATHER: row r of x is token source[r]."""
    n_m = tl.load(tiles_ptr)
    n_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    tl.assume(steps > 0)  # as in m_grouped_kernel
    for tile in tl.range(tl.program_id(0), n_m * n_n, PROGRAMS, flatten=True):
        m, n = tile_position(tile, n_m, n_n, GROUP_M)
        expert = tl.load(expert_ptr + m)
        row = tl.load(row_ptr + m)
        begin = tl.load(offsets_ptr + expert)
        size = tl.load(offsets_ptr + expert + 1) - begin
        rows = row + tl.arange(0, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        if GATHER:
            # Rows past the end read token 0 instead of masking every step; they are never stored.
            token = tl.load(source_ptr + rows, mask=rows < begin + size, other=0).to(tl.int64)
            cols = tl.arange(0, BK)
            x_ptrs = x_ptr + token[:, None] * K + cols[None, :]
        for step in range(steps):
            if GATHER:
                x = tl.load(x_ptrs + step * BK, mask=(step * BK + cols < K)[None, :], other=0.0)
            else:
                x = x_desc.load([row, step * BK])
            acc = dot(x, w_desc.load([expert, n * BN, step * BK]).reshape(BN, BK).T, acc)
        v = tl.load(v_ptr + rows, mask=rows < begin + size, other=0.0)
        _swiglu_slices(h_desc, act_desc, begin, size, row - begin, n * BN, acc, v, BM, BN, SLICES, SAVE_H)


@triton.jit
def _like(x, y):
    """fp32 x in the layout of y. Two users of x in two layouts would else make the compiler compute all of x twice."""
    if not INTERPRET:  # which has no inline assembly, and no layouts
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def _dswiglu_slices(
    h_desc, dh_desc, act_desc, begin, size, row, col, dact, b, BM: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr
):
    """Store dh and b·act of C columns of dact (before any weight); return Σ dact·act per row."""
    if SLICES == 1:
        h = load_rows(h_desc, begin, size, row, 2 * col, BM, 2 * C)
        gate, up = tl.split(h.to(tl.float32).reshape(BM, C, 2))
        s = _sigmoid(gate)
        silu = gate * s
        act = silu * up
        dv = tl.sum(dact * act, 1)
        weighted = _like(act * b[:, None], dact)
        dact = dact * b[:, None]
        # silu'(g) = s·(1 + g·(1 − s)) = s + silu·(1 − s)
        dgate = dact * up * (s + silu * (1 - s))
        store_rows(dh_desc, begin, size, row, 2 * col, tl.join(dgate, dact * silu).reshape(BM, 2 * C), BM, 2 * C)
        # After dh: in the other order Triton 3.9 spills 12 registers at 128 × 256 on sm_90.
        store_rows(act_desc, begin, size, row, col, weighted, BM, C)
    else:
        left, right = halves(dact, BM, C)
        dv = _dswiglu_slices(h_desc, dh_desc, act_desc, begin, size, row, col, left, b, BM, C // 2, SLICES // 2)
        dv += _dswiglu_slices(h_desc, dh_desc, act_desc, begin, size, row, col + C // 2, right, b, BM, C // 2, SLICES // 2)
    # One return for both: Triton goes on compiling after a return inside a constexpr condition.
    return dv


@triton.jit
def down_dgrad_kernel(
    dy_desc, w_desc, h_desc, b_ptr, dh_desc, act_desc, dv_ptr, offsets_ptr, expert_ptr, row_ptr, tiles_ptr, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """dact = w[e]ᵀ·dy; dh from b·dact, b·act for the down weight's gradient, and Σ dact·act of each column tile; N = F."""
    n_m = tl.load(tiles_ptr)
    n_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    tl.assume(steps > 0)  # as in m_grouped_kernel
    for tile in tl.range(tl.program_id(0), n_m * n_n, PROGRAMS, flatten=True):
        m, n = tile_position(tile, n_m, n_n, GROUP_M)
        expert = tl.load(expert_ptr + m)
        row = tl.load(row_ptr + m)
        begin = tl.load(offsets_ptr + expert)
        size = tl.load(offsets_ptr + expert + 1) - begin
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            acc = dot(dy_desc.load([row, step * BK]), w_desc.load([expert, step * BK, n * BN]).reshape(BK, BN), acc)
        rows = row + tl.arange(0, BM)
        mask = rows < begin + size
        b = tl.load(b_ptr + rows, mask=mask, other=0.0)
        dv = _dswiglu_slices(h_desc, dh_desc, act_desc, begin, size, row - begin, n * BN, acc, b, BM, BN, SLICES)
        # One number per row and column tile, summed later in a fixed order: atomics would make the router's gradient vary.
        tl.store(dv_ptr + rows.to(tl.int64) * n_n + n, dv, mask=mask)


def up_swiglu_launch(
    x: Tensor,
    source_R: Tensor | None,
    w_E2FD: Tensor,
    v_R: Tensor,
    h_R2F: Tensor | None,
    act_RF: Tensor,
    schedule: Schedule,
    blocks: BlockConfig,
) -> Launch:
    """act, and h unless it is None. x holds rows, or tokens where source_R is given."""
    block_m, block_n, block_k = blocks.block_m, blocks.block_n, blocks.block_k
    gather = source_R is not None
    slice_n = block_n // blocks.slices
    args = {
        "x_desc": None if gather else rows_desc(x, [block_m, block_k]),
        "x_ptr": x if gather else None,
        "source_ptr": source_R,
        "w_desc": weight_desc(w_E2FD, [block_n, block_k]),
        "v_ptr": v_R,
        "h_desc": None if h_R2F is None else ragged_desc(h_R2F, [block_m, slice_n]),
        "act_desc": ragged_desc(act_RF, [block_m, slice_n // 2]),
        **schedule.args(),
        "N": w_E2FD.shape[1],
        "K": w_E2FD.shape[2],
        **tile_args(blocks, x.device),
        "GATHER": gather,
        "SAVE_H": h_R2F is not None,
    }
    return Launch(up_swiglu_kernel, (backend.programs(x.device),), args, blocks.num_warps, blocks.num_stages)


def down_dgrad_launch(
    dy_RD: Tensor,
    w_EDF: Tensor,
    h_R2F: Tensor,
    b_R: Tensor,
    dh_R2F: Tensor,
    act_RF: Tensor,
    dv_RN: Tensor,
    schedule: Schedule,
    blocks: BlockConfig,
) -> Launch:
    """dh, b·act and the parts of dv, (R, ⌈F/block_n⌉)."""
    block_m, block_n, block_k = blocks.block_m, blocks.block_n, blocks.block_k
    slice_n = block_n // blocks.slices
    args = {
        "dy_desc": rows_desc(dy_RD, [block_m, block_k]),
        "w_desc": weight_desc(w_EDF, [block_k, block_n]),
        "h_desc": ragged_desc(h_R2F, [block_m, 2 * slice_n]),
        "b_ptr": b_R,
        "dh_desc": ragged_desc(dh_R2F, [block_m, 2 * slice_n]),
        "act_desc": ragged_desc(act_RF, [block_m, slice_n]),
        "dv_ptr": dv_RN,
        **schedule.args(),
        "N": w_EDF.shape[2],
        "K": w_EDF.shape[1],
        **tile_args(blocks, dy_RD.device),
    }
    return Launch(down_dgrad_kernel, (backend.programs(dy_RD.device),), args, blocks.num_warps, blocks.num_stages)


def run_forward(
    x: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    v_R: Tensor,
    counts_E: Tensor,
    source_R: Tensor | None,
    place_TK: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    """y and h (empty unless save_h); arguments as in `megagrin.kernels.moe_mlp`, weights in x's dtype."""
    rows, (n_experts, d_model, d_ff) = v_R.shape[0], down_EDF.shape
    h_R2F = x.new_empty(rows if save_h else 0, 2 * d_ff)
    if rows == 0:
        return x.new_empty(0, d_model), h_R2F
    gate_up_E2FD, v_R = dense(gate_up_E2FD), v_R.float().contiguous()
    blocks = config("up_swiglu", x.dtype, 2 * d_ff, d_model, rows // n_experts, x.device)
    gather = blocks.gather and source_R is not None
    if place_TK is not None and not gather:
        x = run_gather_rows(x, place_TK)
    schedule = build_schedule(counts_E, rows, blocks.block_m)
    act_RF = x.new_empty(rows, d_ff)
    source = source_R if gather else None
    h = h_R2F if save_h else None
    up_swiglu_launch(dense(x), source, gate_up_E2FD, v_R, h, act_RF, schedule, blocks).run()
    return run_m_grouped(act_RF, down_EDF, counts_E, schedule=schedule), h_R2F


def _run_down_dgrad(
    dy_RD: Tensor, h_R2F: Tensor, down_EDF: Tensor, b_R: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Schedule]:
    """Gradient of h, the activation weighted by b, the gradient of v (fp32), and the schedule of the tiles; at least one row."""
    rows, (n_experts, d_model, d_ff) = dy_RD.shape[0], down_EDF.shape
    down_EDF, h_R2F, b_R = dense(down_EDF), dense(h_R2F), b_R.float().contiguous()
    blocks = config("down_dgrad", dy_RD.dtype, d_ff, d_model, rows // n_experts, dy_RD.device)
    schedule = build_schedule(counts_E, rows, blocks.block_m)
    dh_R2F, act_RF = torch.empty_like(h_R2F), dy_RD.new_empty(rows, d_ff)
    dv_RN = b_R.new_empty(rows, triton.cdiv(d_ff, blocks.block_n))
    down_dgrad_launch(dy_RD, down_EDF, h_R2F, b_R, dh_R2F, act_RF, dv_RN, schedule, blocks).run()
    return dh_R2F, act_RF, dv_RN.sum(1), schedule


def run_backward(
    dy_RD: Tensor,
    x: Tensor,
    h_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    b_R: Tensor,
    counts_E: Tensor,
    source_R: Tensor | None,
    place_TK: Tensor | None,
    weight_dtypes: tuple[torch.dtype, torch.dtype],
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of both weights in weight_dtypes (or added to those of `into`, fp32), and of v (fp32)."""
    if dy_RD.shape[0] == 0:
        d_gate_up, d_down = (
            torch.zeros_like(w, dtype=dtype) if total is None else total
            for w, dtype, total in zip((gate_up_E2FD, down_EDF), weight_dtypes, into, strict=True)
        )
        return torch.zeros_like(x), d_gate_up, d_down, b_R.new_empty(0)
    dy_RD = dense(dy_RD)
    dh_R2F, act_RF, dv_R, schedule = _run_down_dgrad(dy_RD, h_R2F, down_EDF, b_R, counts_E)
    d_down = run_wgrad(dy_RD, act_RF, counts_E, weight_dtypes[1], into[1], schedule.offsets)
    del act_RF, dy_RD  # before the next large buffers
    x_RD = x if place_TK is None else run_gather_rows(x, place_TK)
    d_gate_up = run_wgrad(dh_R2F, x_RD, counts_E, weight_dtypes[0], into[0], schedule.offsets)
    del x_RD
    dx = run_m_grouped(dh_R2F, gate_up_E2FD, counts_E, dgrad=True, schedule=schedule)
    return dx if place_TK is None else run_gather_sum(dx, place_TK), d_gate_up, d_down, dv_R


def run_dgrad(
    dy_RD: Tensor,
    x: Tensor,
    h_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    b_R: Tensor,
    counts_E: Tensor,
    place_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of v (fp32) and of h, and the activation weighted by b."""
    if dy_RD.shape[0] == 0:
        return torch.zeros_like(x), b_R.new_empty(0), torch.empty_like(h_R2F), dy_RD.new_empty(0, down_EDF.shape[2])
    dh_R2F, act_RF, dv_R, schedule = _run_down_dgrad(dense(dy_RD), h_R2F, down_EDF, b_R, counts_E)
    dx = run_m_grouped(dh_R2F, gate_up_E2FD, counts_E, dgrad=True, schedule=schedule)
    return dx if place_TK is None else run_gather_sum(dx, place_TK), dv_R, dh_R2F, act_RF


def compile_cases(dtype: torch.dtype, blocks: dict[Op, BlockConfig]) -> dict[str, Launch]:
    """Launches of every kernel of this file on CPU tensors of 256 features, for compiling without a GPU. Never run them."""
    x, h, v = torch.empty(512, 256, dtype=dtype), torch.empty(512, 512, dtype=dtype), torch.empty(512)
    up, down = torch.empty(2, 512, 256, dtype=dtype), torch.empty(2, 256, 256, dtype=dtype)
    source = torch.empty(512, dtype=torch.int64)
    _, schedule = schedule_launch(torch.empty(2, dtype=torch.int64), 512, blocks["up_swiglu"].block_m)
    parts = torch.empty(512, 2)
    cases = {
        "up_swiglu": up_swiglu_launch(x, None, up, v, h, x, schedule, blocks["up_swiglu"]),
        "up_swiglu_inference": up_swiglu_launch(x, None, up, v, None, x, schedule, blocks["up_swiglu"]),
        "down_dgrad": down_dgrad_launch(x, down, h, v, h, x, parts, schedule, blocks["down_dgrad"]),
    }
    if dtype.itemsize == 2:  # fp32 checks numbers and always copies first
        cases["up_swiglu_gather"] = up_swiglu_launch(x, source, up, v, h, x, schedule, blocks["up_swiglu"])
    return cases
