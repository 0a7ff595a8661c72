"""Triton kernels of the router's product: fp32 weights meet bf16 tokens on the tensor cores, and no token is widened in memory.

An fp32 number is the sum of three bf16 numbers (`_parts`). Products of bf16 numbers are exact in fp32, so three products on the
tensor cores replace one in fp32. These sum in fp32 but truncate each addition; what comes out of one step of the contraction is
therefore added to the running sum by the ordinary, rounding units.

Callers hold: x is bf16, rows are multiples of 16 bytes, tensors are contiguous and not empty.

Shape suffixes: T tokens, E experts, D model width, S blocks of tokens of the weight gradient. In kernels: BM tokens, BE experts
and BD columns of a tile, BK the length of a step.
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megagrin.kernels import backend
from megagrin.kernels.grouped_gemm_triton import dense, dot, narrow
from megagrin.kernels.launch import Launch

_Op = Literal["logits", "dgrad", "wgrad"]


@triton.jit
def _parts(x):
    """bf16 (high, middle, low) whose sum is fp32 x: each difference is exact, and 3 × 8 bits hold the 24 of x.

    Not below 2^-109, where the low part would be under the least bf16 number; an infinite x comes out as NaN.
    """
    high = narrow(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = narrow(rest, tl.bfloat16)
    return high, middle, narrow(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def router_logits_kernel(
    x_desc, w_desc, z_ptr, tokens, D,
    E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z = x·wᵀ; programs of the same tokens lie side by side, so that further blocks of experts find x in L2."""
    n_e: tl.constexpr = (E + BE - 1) // BE
    m = tl.program_id(0) // n_e
    first = (tl.program_id(0) % n_e) * BE
    total = tl.zeros((BM, BE), tl.float32)
    steps = tl.cdiv(D, BK)
    tl.assume(steps > 0)
    for step in range(steps):
        x = x_desc.load([m * BM, step * BK])
        high, middle, low = _parts(w_desc.load([first, step * BK]))
        # Small ones first: their truncated sums are far below the last bit of the whole.
        part = dot(x, low.T, tl.zeros((BM, BE), tl.float32))
        part = dot(x, middle.T, part)
        total += dot(x, high.T, part)
    row = m * BM + tl.arange(0, BM)
    expert = first + tl.arange(0, BE)
    place = row.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(z_ptr + place, total, mask=(row < tokens)[:, None] & (expert < E)[None, :])


@triton.jit
def router_dgrad_kernel(
    dz_ptr, w_desc, dx_desc, tokens, D,
    E: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx = dz·w, rounded once. Of the parts' products the three largest: what is left out is below 3·2^-16 of |dz|·|w|."""
    n_d = tl.cdiv(D, BD)
    row = (tl.program_id(0) // n_d) * BM
    col = (tl.program_id(0) % n_d) * BD
    token = row + tl.arange(0, BM)
    total = tl.zeros((BM, BD), tl.float32)
    for first in range(0, E, BE):
        expert = first + tl.arange(0, BE)
        exists = (token < tokens)[:, None] & (expert < E)[None, :]
        dz = tl.load(dz_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], mask=exists, other=0.0)
        dz_high, dz_middle, _ = _parts(dz)
        high, middle, _ = _parts(w_desc.load([first, col]))
        total = dot(dz_middle, high, total)
        total = dot(dz_high, middle, total)
        total = dot(dz_high, high, total)
    dx_desc.store([row, col], narrow(total, dx_desc.dtype))


@triton.jit
def router_wgrad_kernel(
    dz_ptr, x_desc, part_ptr, tokens, D,
    E: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """part[s] = dzᵀ·x over the s-th block of ROWS tokens; transposed inside, for E may be less than a tensor core's rows."""
    n_e: tl.constexpr = (E + BE - 1) // BE
    n_d = tl.cdiv(D, BD)
    block = tl.program_id(0) // (n_e * n_d)
    tile = tl.program_id(0) % (n_e * n_d)
    col = (tile // n_e) * BD
    expert = (tile % n_e) * BE + tl.arange(0, BE)
    total = tl.zeros((BD, BE), tl.float32)
    steps = tl.cdiv(tl.minimum(tokens - block * ROWS, ROWS), BK)
    tl.assume(steps > 0)
    for step in range(steps):
        row = block * ROWS + step * BK
        token = row + tl.arange(0, BK)
        exists = (token < tokens)[:, None] & (expert < E)[None, :]
        dz = tl.load(dz_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], mask=exists, other=0.0)
        high, middle, low = _parts(dz)
        x = x_desc.load([row, col]).T
        part = dot(x, low, tl.zeros((BD, BE), tl.float32))
        part = dot(x, middle, part)
        total += dot(x, high, part)
    column = col + tl.arange(0, BD)
    place = (block.to(tl.int64) * E + expert)[None, :] * D + column[:, None]
    tl.store(part_ptr + place, total, mask=(column < D)[:, None] & (expert < E)[None, :])


class _Tile(NamedTuple):
    """How a product is cut: tokens (of a step for the weight gradient), experts at most, columns (of a step for the logits)."""

    tokens: int
    experts: int
    columns: int
    num_warps: int
    num_stages: int


# Descriptors become pointers there, which take registers.
_AMPERE: dict[_Op, _Tile] = {
    "logits": _Tile(64, 32, 64, 4, 3),
    "dgrad": _Tile(64, 32, 64, 4, 2),
    "wgrad": _Tile(32, 32, 64, 4, 3),
}


def _tiles(op: _Op, n_experts: int, major: int) -> _Tile:
    """Compiled without spills for each architecture; timed on none."""
    if major == 8:
        return _AMPERE[op]
    few = n_experts <= 32
    if op == "logits":
        # Every program reads all weights of its experts: the more there are, the more tokens share them.
        return _Tile(64, 32, 128, 4, 4) if few else _Tile(128, 128, 64, 8, 3)
    return _Tile(128, 64, 128, 8, 2) if op == "dgrad" else _Tile(64, 128, 128, 4 if few else 8, 4)


def _tile(op: _Op, n_experts: int, x: Tensor, major: int | None) -> _Tile:
    tile = _tiles(op, n_experts, major or (backend.capability(x.device)[0] if x.is_cuda else 9))
    # A tensor core's least width is 16.
    return tile._replace(experts=min(tile.experts, max(16, triton.next_power_of_2(n_experts))))


def _desc(x: Tensor, *block: int) -> Any:
    return TensorDescriptor.from_tensor(x, list(block))


def _logits_launch(x_TD: Tensor, w_ED: Tensor, z_TE: Tensor, major: int | None = None) -> Launch:
    (n_tokens, width), n_experts = x_TD.shape, w_ED.shape[0]
    tile = _tile("logits", n_experts, x_TD, major)
    args = {
        "x_desc": _desc(x_TD, tile.tokens, tile.columns),
        "w_desc": _desc(w_ED, tile.experts, tile.columns),
        "z_ptr": z_TE,
        "tokens": n_tokens,
        "D": width,
        "E": n_experts,
        "BM": tile.tokens,
        "BE": tile.experts,
        "BK": tile.columns,
    }
    grid = (triton.cdiv(n_tokens, tile.tokens) * triton.cdiv(n_experts, tile.experts),)
    return Launch(router_logits_kernel, grid, args, tile.num_warps, tile.num_stages)


def _dgrad_launch(dz_TE: Tensor, w_ED: Tensor, dx_TD: Tensor, major: int | None = None) -> Launch:
    (n_tokens, width), n_experts = dx_TD.shape, w_ED.shape[0]
    tile = _tile("dgrad", n_experts, dx_TD, major)
    args = {
        "dz_ptr": dz_TE,
        "w_desc": _desc(w_ED, tile.experts, tile.columns),
        "dx_desc": _desc(dx_TD, tile.tokens, tile.columns),
        "tokens": n_tokens,
        "D": width,
        "E": n_experts,
        "BM": tile.tokens,
        "BD": tile.columns,
        "BE": tile.experts,
    }
    grid = (triton.cdiv(n_tokens, tile.tokens) * triton.cdiv(width, tile.columns),)
    return Launch(router_dgrad_kernel, grid, args, tile.num_warps, tile.num_stages)


def _split_tokens(n_experts: int) -> int:
    # A block of tokens leaves 4 bytes for each expert and column where it read 2 for each token and column.
    return max(512, 16 * triton.next_power_of_2(n_experts))


def _wgrad_launch(dz_TE: Tensor, x_TD: Tensor, part_SED: Tensor, major: int | None = None) -> Launch:
    (n_tokens, width), (n_blocks, n_experts, _) = x_TD.shape, part_SED.shape
    tile = _tile("wgrad", n_experts, x_TD, major)
    args = {
        "dz_ptr": dz_TE,
        "x_desc": _desc(x_TD, tile.tokens, tile.columns),
        "part_ptr": part_SED,
        "tokens": n_tokens,
        "D": width,
        "E": n_experts,
        "ROWS": _split_tokens(n_experts),
        "BD": tile.columns,
        "BE": tile.experts,
        "BK": tile.tokens,
    }
    grid = (n_blocks * triton.cdiv(width, tile.columns) * triton.cdiv(n_experts, tile.experts),)
    return Launch(router_wgrad_kernel, grid, args, tile.num_warps, tile.num_stages)


def run_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """fp32 (T, E)."""
    z_TE = w_ED.new_empty(x_TD.shape[0], w_ED.shape[0])
    if z_TE.numel():
        _logits_launch(dense(x_TD), dense(w_ED), z_TE).run()
    return z_TE


def run_dgrad(dz_TE: Tensor, w_ED: Tensor) -> Tensor:
    """bf16 (T, D)."""
    dx_TD = dz_TE.new_empty(dz_TE.shape[0], w_ED.shape[1], dtype=torch.bfloat16)
    if dx_TD.numel():
        _dgrad_launch(dz_TE.contiguous(), dense(w_ED), dx_TD).run()
    return dx_TD


def run_wgrad(dz_TE: Tensor, x_TD: Tensor) -> Tensor:
    """fp32 (E, D): a sum for each block of tokens, then the sum over the blocks, each in a fixed order."""
    (n_tokens, n_experts), width = dz_TE.shape, x_TD.shape[1]
    if n_tokens == 0:
        return dz_TE.new_zeros(n_experts, width)
    part_SED = dz_TE.new_empty(triton.cdiv(n_tokens, _split_tokens(n_experts)), n_experts, width)
    _wgrad_launch(dz_TE.contiguous(), dense(x_TD), part_SED).run()
    return part_SED.sum(0) if part_SED.shape[0] > 1 else part_SED[0]


def compile_cases(dtype: torch.dtype, major: int) -> dict[str, Launch]:
    """Launches of every kernel of this file on CPU tensors, for compiling for a capability without a GPU. Never run them."""
    if dtype != torch.bfloat16:
        return {}
    cases = {}
    for n_experts, width in ((16, 4096), (128, 2048), (3, 72), (64, 2048), (1024, 4096)):
        x_TD, w_ED, z_TE = torch.empty(512, width, dtype=dtype), torch.empty(n_experts, width), torch.empty(512, n_experts)
        cases[f"router_logits_{n_experts}"] = _logits_launch(x_TD, w_ED, z_TE, major)
        cases[f"router_dgrad_{n_experts}"] = _dgrad_launch(z_TE, w_ED, x_TD, major)
        cases[f"router_wgrad_{n_experts}"] = _wgrad_launch(z_TE, x_TD, torch.empty(1, n_experts, width), major)
    return cases
