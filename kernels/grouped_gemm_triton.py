"""Triton kernels of the grouped matrix products, and the device functions that the fused MLP shares with them.

Persistent: one program per multiprocessor walks over output tiles. Which tiles exist depends on how many rows each expert got;
a small kernel writes that list on the device, so that the host never waits. No expert is padded: row tiles end inside tensor
descriptors that know their expert's end ("ragged": loads beyond it give zeros, stores beyond it are dropped).

Limits that callers hold: counts sum to R < 2^30; tensors are contiguous, rows are multiples of 16 bytes.

Shape suffixes: R routed rows, E experts, N output features, K input features, M row tiles (an upper bound). In kernels: BM, BN,
BK tile sizes; C columns of a slice.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from megagrin.kernels import backend
from megagrin.kernels.launch import Launch
from megagrin.kernels.tuning import BlockConfig, Op, config

INTERPRET: tl.constexpr = tl.constexpr(backend.interpreted())


@triton.jit
def dot(a, b, acc):
    """acc + a·b in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRET:
        # The interpreter keeps bf16 as uint16 and multiplies the bit patterns (Triton 3.6 to 3.9).
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded to dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter's own cast truncates. NaN keeps its bits: the carry could turn it into a number.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def tile_position(tile, n_m, n_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): rows run fastest inside groups of GROUP_M, so that concurrent programs share weights in L2."""
    in_group = GROUP_M * n_n
    group = tile // in_group
    rows = tl.minimum(n_m - group * GROUP_M, GROUP_M)
    rest = tile - group * in_group
    return group * GROUP_M + rest % rows, rest // rows


# The device half of create_ragged_descriptor: its first two dimensions move the end of the valid rows to begin + size by 64-bit
# wrap-around of the address. Not ragged_tma's own functions: the interpreter of Triton 3.6 rejects their list arithmetic.
@triton.jit
def load_rows(desc, begin, size, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) from row `row` of the expert whose rows are [begin, begin + size); zeros beyond."""
    return desc.load([0x40000000, begin + size, 0x40000000 - size + row, col]).reshape(ROWS, COLS)


@triton.jit
def store_rows(desc, begin, size, row, col, x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store fp32 (ROWS, COLS) in the descriptor's dtype; rows and columns beyond the ends are dropped."""
    desc.store([0x40000000, begin + size, 0x40000000 - size + row, col], narrow(x, desc.dtype).reshape(1, 1, ROWS, COLS))


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) -> its left and its right half; moves no data between threads in the layout of an accumulator."""
    return tl.split(x.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1))


@triton.jit
def _store_slices(desc, begin, size, row, col, x, BM: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr):
    if SLICES == 1:
        store_rows(desc, begin, size, row, col, x, BM, C)
    else:
        left, right = halves(x, BM, C)
        _store_slices(desc, begin, size, row, col, left, BM, C // 2, SLICES // 2)
        _store_slices(desc, begin, size, row, col + C // 2, right, BM, C // 2, SLICES // 2)


@triton.jit
def schedule_kernel(
    counts_ptr, offsets_ptr, expert_ptr, row_ptr, tiles_ptr, E: tl.constexpr, E_POW2: tl.constexpr, BM: tl.constexpr
):
    """One program per expert: its first row, and (expert, first row) of each of its row tiles; the last one writes the totals."""
    expert = tl.program_id(0)
    index = tl.arange(0, E_POW2)
    count = tl.load(counts_ptr + index, mask=index < E, other=0).to(tl.int32)
    tiles = (count + BM - 1) // BM
    first_row = tl.sum(tl.where(index < expert, count, 0))
    first_tile = tl.sum(tl.where(index < expert, tiles, 0))
    own_rows = tl.sum(tl.where(index == expert, count, 0))
    own_tiles = tl.sum(tl.where(index == expert, tiles, 0))
    tl.store(offsets_ptr + expert, first_row)
    if expert == E - 1:
        tl.store(offsets_ptr + E, first_row + own_rows)
        tl.store(tiles_ptr, first_tile + own_tiles)
    for start in range(0, own_tiles, 64):
        tile = start + tl.arange(0, 64)
        tl.store(expert_ptr + first_tile + tile, expert + tl.zeros_like(tile), mask=tile < own_tiles)
        tl.store(row_ptr + first_tile + tile, first_row + tile * BM, mask=tile < own_tiles)


@triton.jit
def m_grouped_kernel(
    x_desc, w_desc, y_desc, offsets_ptr, expert_ptr, row_ptr, tiles_ptr, N, K,
    DGRAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """y[r] = w[e]·x[r], or w[e]ᵀ·x[r] for DGRAD; N features out, K contracted, w_desc (E, N, K) or (E, K, N)."""
    n_m = tl.load(tiles_ptr)
    n_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    tl.assume(steps > 0)  # else the compiler keeps a second epilogue for a contraction of length zero
    for tile in tl.range(tl.program_id(0), n_m * n_n, PROGRAMS, flatten=True):
        m, n = tile_position(tile, n_m, n_n, GROUP_M)
        expert = tl.load(expert_ptr + m)
        row = tl.load(row_ptr + m)
        begin = tl.load(offsets_ptr + expert)
        size = tl.load(offsets_ptr + expert + 1) - begin
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            # Rows past the expert's end are the next expert's: computed with the wrong weights, never stored.
            x = x_desc.load([row, step * BK])
            if DGRAD:
                w = w_desc.load([expert, step * BK, n * BN]).reshape(BK, BN)
            else:
                w = w_desc.load([expert, n * BN, step * BK]).reshape(BN, BK).T
            acc = dot(x, w, acc)
        _store_slices(y_desc, begin, size, row - begin, n * BN, acc, BM, BN, SLICES)


@triton.jit
def _write_slices(desc, expert, row, col, x, BM: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr, ACCUMULATE: tl.constexpr):
    if SLICES == 1:
        x = narrow(x, desc.dtype).reshape(1, BM, C)
        if ACCUMULATE:
            if INTERPRET:  # which has no reduction through descriptors
                desc.store([expert, row, col], x + desc.load([expert, row, col]))
            else:
                # Added in memory (TMA reduce). Each element belongs to one tile, so the order of programs does not matter.
                desc.atomic_add([expert, row, col], x)
        else:
            desc.store([expert, row, col], x)
    else:
        left, right = halves(x, BM, C)
        _write_slices(desc, expert, row, col, left, BM, C // 2, SLICES // 2, ACCUMULATE)
        _write_slices(desc, expert, row, col + C // 2, right, BM, C // 2, SLICES // 2, ACCUMULATE)


@triton.jit
def wgrad_kernel(
    dy_desc, x_desc, dw_desc, offsets_ptr, N, K,
    E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr, SLICES: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dw[e] = Σ_{r of e} dy[r] ⊗ x[r], or added to what is there; dw_desc (E, N, K), dy_desc and x_desc ragged."""
    n_m = tl.cdiv(N, BM)
    n_n = tl.cdiv(K, BN)
    per_expert = n_m * n_n
    for tile in tl.range(tl.program_id(0), E * per_expert, PROGRAMS, flatten=True):
        expert = tile // per_expert
        m, n = tile_position(tile % per_expert, n_m, n_n, GROUP_M)
        begin = tl.load(offsets_ptr + expert)
        size = tl.load(offsets_ptr + expert + 1) - begin
        acc = tl.zeros((BM, BN), tl.float32)
        # At least one step: an idle expert reads zeros and writes zeros, and the two loops can be flattened into one pipeline.
        steps = tl.maximum(tl.cdiv(size, BK), 1)
        tl.assume(steps > 0)
        for step in range(steps):
            # Both operands end with the expert: zeros on one side only would not silence a NaN of the neighbour.
            dy = load_rows(dy_desc, begin, size, step * BK, m * BM, BK, BM)
            x = load_rows(x_desc, begin, size, step * BK, n * BN, BK, BN)
            acc = dot(dy.T, x, acc)
        _write_slices(dw_desc, expert, m * BM, n * BN, acc, BM, BN, SLICES, ACCUMULATE)


@dataclass(frozen=True)
class Schedule:
    """The row tiles of one launch, on the device.

    Attributes:
        offsets: int32 (E + 1,), first row of each expert, then R.
        expert_M: int32, expert of each tile.
        row_M: int32, first row of each tile.
        tiles: int32 (1,), how many of the M entries are in use.
        block_m: rows of a tile.
    """

    offsets: Tensor
    expert_M: Tensor
    row_M: Tensor
    tiles: Tensor
    block_m: int

    def args(self) -> dict[str, Tensor]:
        """As kernel arguments."""
        return {"offsets_ptr": self.offsets, "expert_ptr": self.expert_M, "row_ptr": self.row_M, "tiles_ptr": self.tiles}


def schedule_launch(counts_E: Tensor, rows: int, block_m: int) -> tuple[Launch, Schedule]:
    """The launch that fills a schedule of tiles of block_m rows, and the schedule."""
    n_experts = counts_E.shape[0]
    # Every expert wastes less than one tile, so the host knows a bound without knowing the counts.
    bound = -(-rows // block_m) + n_experts
    offsets, expert_M, row_M, tiles = (
        torch.empty(size, dtype=torch.int32, device=counts_E.device) for size in (n_experts + 1, bound, bound, 1)
    )
    schedule = Schedule(offsets, expert_M, row_M, tiles, block_m)
    args = {"counts_ptr": counts_E, **schedule.args(), "E": n_experts, "E_POW2": triton.next_power_of_2(n_experts), "BM": block_m}
    return Launch(schedule_kernel, (n_experts,), args), schedule


def build_schedule(counts_E: Tensor, rows: int, block_m: int) -> Schedule:
    """Schedule of tiles of block_m rows for counts (int64) that sum to `rows`."""
    launch, schedule = schedule_launch(counts_E.contiguous(), rows, block_m)
    launch.run()
    return schedule


def dense(x: Tensor) -> Tensor:
    """x itself, or a copy that a tensor descriptor can address: contiguous, on a 16-byte boundary."""
    x = x.contiguous()
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    # What has one row is contiguous whatever its pitch, which descriptors look at all the same.
    return x.view(-1).view(x.shape) if 1 in x.shape else x


def weight_desc(w_ENK: Tensor, block: list[int]) -> Any:
    """Descriptor over (E, N, K) for blocks of one expert: tiles end with the expert's matrix, whatever N and K."""
    return TensorDescriptor.from_tensor(w_ENK, [1, *block])


def rows_desc(x_RK: Tensor, block: list[int]) -> Any:
    """Descriptor over rows without ends of experts."""
    return TensorDescriptor.from_tensor(x_RK, block)


def ragged_desc(x_RK: Tensor, block: list[int]) -> Any:
    """Descriptor over rows for `load_rows` and `store_rows`."""
    return create_ragged_descriptor(x_RK, block)


def tile_args(blocks: BlockConfig, device: torch.device) -> dict[str, int]:
    """The constexprs that every product takes."""
    return {
        "BM": blocks.block_m,
        "BN": blocks.block_n,
        "BK": blocks.block_k,
        "GROUP_M": blocks.group_m,
        "PROGRAMS": backend.programs(device),
        "SLICES": blocks.slices,
    }


def m_grouped_launch(x_RK: Tensor, w_ENK: Tensor, y_RN: Tensor, schedule: Schedule, blocks: BlockConfig, dgrad: bool) -> Launch:
    """y = x·wᵀ per expert; for dgrad w is (E, K, N), contracted over its rows."""
    block_m, block_n, block_k = blocks.block_m, blocks.block_n, blocks.block_k
    args = {
        "x_desc": rows_desc(x_RK, [block_m, block_k]),
        "w_desc": weight_desc(w_ENK, [block_k, block_n] if dgrad else [block_n, block_k]),
        "y_desc": ragged_desc(y_RN, [block_m, block_n // blocks.slices]),
        **schedule.args(),
        "N": y_RN.shape[1],
        "K": x_RK.shape[1],
        "DGRAD": dgrad,
        **tile_args(blocks, x_RK.device),
    }
    return Launch(m_grouped_kernel, (backend.programs(x_RK.device),), args, blocks.num_warps, blocks.num_stages)


def wgrad_launch(dy_RN: Tensor, x_RK: Tensor, dw_ENK: Tensor, offsets: Tensor, blocks: BlockConfig, accumulate: bool) -> Launch:
    """dw = (+)= dyᵀ·x per expert."""
    block_m, block_n, block_k = blocks.block_m, blocks.block_n, blocks.block_k
    args = {
        "dy_desc": ragged_desc(dy_RN, [block_k, block_m]),
        "x_desc": ragged_desc(x_RK, [block_k, block_n]),
        "dw_desc": weight_desc(dw_ENK, [block_m, block_n // blocks.slices]),
        "offsets_ptr": offsets,
        "N": dw_ENK.shape[1],
        "K": dw_ENK.shape[2],
        "E": dw_ENK.shape[0],
        **tile_args(blocks, x_RK.device),
        "ACCUMULATE": accumulate,
    }
    return Launch(wgrad_kernel, (backend.programs(x_RK.device),), args, blocks.num_warps, blocks.num_stages)


def run_m_grouped(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor, dgrad: bool = False, schedule: Schedule | None = None) -> Tensor:
    """The M-grouped products; contracts x with w's rows for dgrad. A schedule of other tiles than its own is built anew."""
    n = w_ENK.shape[2 if dgrad else 1]
    y_RN = x_RK.new_empty(x_RK.shape[0], n)
    if x_RK.shape[0] == 0:  # a descriptor cannot be empty
        return y_RN
    x_RK, w_ENK = dense(x_RK), dense(w_ENK)
    blocks = config(
        "m_grouped_dgrad" if dgrad else "m_grouped",
        x_RK.dtype,
        n,
        x_RK.shape[1],
        x_RK.shape[0] // w_ENK.shape[0],
        x_RK.device,
    )
    if schedule is None or schedule.block_m != blocks.block_m:
        schedule = build_schedule(counts_E, x_RK.shape[0], blocks.block_m)
    m_grouped_launch(x_RK, w_ENK, y_RN, schedule, blocks, dgrad).run()
    return y_RN


def run_wgrad(
    dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor, out_dtype: torch.dtype, into_ENK: Tensor | None, offsets: Tensor | None = None
) -> Tensor:
    """The K-grouped product as a new tensor of out_dtype, or added to `into_ENK` (fp32, contiguous), which is returned."""
    n_experts, n, k = counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1]
    if x_RK.shape[0] == 0:
        return x_RK.new_zeros(n_experts, n, k, dtype=out_dtype) if into_ENK is None else into_ENK
    dy_RN, x_RK = dense(dy_RN), dense(x_RK)
    dw_ENK = x_RK.new_empty(n_experts, n, k, dtype=out_dtype) if into_ENK is None else into_ENK
    blocks = config(
        "wgrad_fp32" if dw_ENK.dtype == torch.float32 else "wgrad", x_RK.dtype, n, k, x_RK.shape[0] // n_experts, x_RK.device
    )
    if offsets is None:
        offsets = build_schedule(counts_E, x_RK.shape[0], blocks.block_k).offsets
    wgrad_launch(dy_RN, x_RK, dw_ENK, offsets, blocks, into_ENK is not None).run()
    return dw_ENK


def compile_cases(dtype: torch.dtype, blocks: dict[Op, BlockConfig]) -> dict[str, Launch]:
    """Launches of every kernel of this file on CPU tensors of 256 features, for compiling without a GPU. Never run them."""
    x, w = torch.empty(512, 256, dtype=dtype), torch.empty(2, 256, 256, dtype=dtype)
    w_fp32, counts = torch.empty(2, 256, 256), torch.empty(2, dtype=torch.int64)
    launch, schedule = schedule_launch(counts, 512, blocks["m_grouped"].block_m)
    return {
        "schedule": launch,
        "m_grouped": m_grouped_launch(x, w, x, schedule, blocks["m_grouped"], dgrad=False),
        "m_grouped_dgrad": m_grouped_launch(x, w, x, schedule, blocks["m_grouped_dgrad"], dgrad=True),
        "wgrad": wgrad_launch(x, x, w, schedule.offsets, blocks["wgrad"], accumulate=False),
        "wgrad_fp32": wgrad_launch(x, x, w_fp32, schedule.offsets, blocks["wgrad_fp32"], accumulate=False),
        "wgrad_accumulate": wgrad_launch(x, x, w_fp32, schedule.offsets, blocks["wgrad_fp32"], accumulate=True),
    }
