"""Shapes, routings, goals and the roofline of the MoE benchmark.

Counted are real routed rows only: R = tokens × top-k rows cost 6·R·D·F FLOPs forward (4 for gate and up, 2 for down) and twice
that backward. Rows that a tile pads are work of the implementation and count against it.

Shape suffixes: T tokens, K experts per token, R = T·K routed rows, E experts, D model width, F expert width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# 128×256 tiles, but 128×128 where the epilogue of the SwiGLU backward needs the registers.
TILE_ROWS, TILE_COLUMNS, DSWIGLU_COLUMNS, WGRAD_STEP = 128, 256, 128, 64


@dataclass(frozen=True)
class Goal:
    """What one row of the goals table asks for.

    Attributes:
        forward: share of the dense rate, 0 to 1, where `absolute` is false; TFLOP/s otherwise.
        second: the same for forward and backward together; for backward alone where `absolute` is true.
        absolute: the row is in TFLOP/s.
    """

    forward: float
    second: float
    absolute: bool = False


@dataclass(frozen=True)
class MoEShape:
    """One row of the benchmark."""

    name: str
    tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    goal: Goal | None = None

    @property
    def rows(self) -> int:
        """Routed rows R."""
        return self.tokens * self.top_k

    @property
    def forward_flops(self) -> float:
        """6·R·D·F."""
        return 6.0 * self.rows * self.d_model * self.d_ff

    @property
    def backward_flops(self) -> float:
        """12·R·D·F: dgrad and wgrad of each product."""
        return 2.0 * self.forward_flops


# The goals table of the issue that asked for these kernels, for one H200.
SHAPES = (
    MoEShape("grin-32k", 32768, 4096, 6400, 16, 2, Goal(0.88, 0.87)),
    MoEShape("grin-8k", 8192, 4096, 6400, 16, 2, Goal(0.82, 0.81)),
    MoEShape("fine-32k", 32768, 2048, 768, 128, 8, Goal(0.75, 0.74)),
    MoEShape("wide-32k", 32768, 4096, 2048, 64, 4, Goal(600.0, 600.0, absolute=True)),
)
# For --smoke: every code path in seconds on a CPU; an expert width that is no multiple of any tile.
SMOKE_SHAPES = (MoEShape("smoke-2", 96, 64, 48, 4, 2), MoEShape("smoke-1", 33, 32, 80, 8, 1))
ROUTINGS = ("learned", "balanced")
POPULARITY_SIGMA = 0.3


def route(shape: MoEShape, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Experts and weights of every token, drawn on the CPU.

    Args:
        kind: `learned`: each expert's popularity is lognormal with sigma 0.3 and tokens draw top-k without replacement (Gumbel
            top-k); `balanced`: every expert gets the same number of rows, tokens in random order.
        seed: of the draw.

    Returns:
        expert_TK int64 and weight_TK fp32; a token's weights sum to 1.

    Raises:
        ValueError: an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "learned":
        popularity_E = POPULARITY_SIGMA * torch.randn(shape.n_experts, generator=generator)
        uniform_TE = torch.rand(shape.tokens, shape.n_experts, generator=generator).clamp_(1e-7, 1 - 1e-7)
        expert_TK = (popularity_E - (-uniform_TE.log()).log()).topk(shape.top_k, dim=1).indices
    elif kind == "balanced":
        place_T1 = torch.randperm(shape.tokens, generator=generator).unsqueeze(1)
        expert_TK = (place_T1 * shape.top_k + torch.arange(shape.top_k)) % shape.n_experts
    else:
        raise ValueError(f"routing: {kind} is none of {', '.join(ROUTINGS)}")
    weight_TK = torch.rand(shape.tokens, shape.top_k, generator=generator) + 0.5
    return expert_TK, weight_TK / weight_TK.sum(1, keepdim=True)


def tiles(counts: list[int], step: int) -> int:
    """Tiles of `step` rows that cover every expert's rows without sharing a tile."""
    return sum(-(-count // step) for count in counts)


@dataclass(frozen=True)
class Bound:
    """Lower bound of one kernel's time.

    Attributes:
        gflop: useful FLOPs / 1e9.
        gigabytes: each operand once / 1e9.
        ideal_us: larger of the arithmetic and the memory time.
        quantised_us: the same with the arithmetic stretched to whole tiles and whole waves of multiprocessors.
    """

    gflop: float
    gigabytes: float
    ideal_us: float
    quantised_us: float


def _waves(n_tiles: float, ideal_tiles: float, sms: int) -> float:
    return -(-n_tiles // sms) * sms / ideal_tiles


def roofline(
    shape: MoEShape,
    m_tiles: int,
    k_steps: int,
    *,
    dense_tflops: float = 790.0,
    terabytes_per_second: float = 4.3,
    sms: int = 132,
    wgrad_bytes: int = 2,
) -> dict[str, Bound]:
    """The least time that the layer's eight kernels can take, by kernel: the arithmetic of an ideal device.

    Args:
        m_tiles: `tiles(counts, TILE_ROWS)`, row tiles of the M-grouped products.
        k_steps: `tiles(counts, WGRAD_STEP)`, steps of the K-grouped products.
        dense_tflops: matrix rate, bf16.
        terabytes_per_second: of device memory.
        sms: multiprocessors.
        wgrad_bytes: per element of a weight gradient: 2 for bf16; 8 where fp32 is read, added to and written.

    Returns:
        Kernel name to bound, in order of execution; forward kernels are `FORWARD_KERNELS`.
    """
    rows, d, f, e = shape.rows, shape.d_model, shape.d_ff, shape.n_experts
    x, h, act = 2 * rows * d, 4 * rows * f, 2 * rows * f
    w_up, w_down = 4 * e * d * f, 2 * e * d * f
    gather_sum = x + 2 * shape.tokens * d
    row_stretch = rows / TILE_ROWS

    def m_grouped(columns: int, tile: int = TILE_COLUMNS) -> float:
        return _waves(m_tiles * -(-columns // tile), row_stretch * columns / tile, sms)

    def k_grouped(out_rows: int, out_columns: int) -> float:
        n_tiles = e * -(-out_rows // TILE_ROWS) * -(-out_columns // TILE_COLUMNS)
        padding = k_steps * WGRAD_STEP / rows
        return padding * _waves(n_tiles, e * out_rows * out_columns / (TILE_ROWS * TILE_COLUMNS), sms)

    up, down = 4.0 * rows * d * f, 2.0 * rows * d * f
    kernels = {
        "up": (up, x + w_up + h + act, m_grouped(2 * f)),
        "down": (down, act + w_down + x, m_grouped(d)),
        "combine": (0.0, gather_sum, 1.0),
        "down dgrad": (down, x + w_down + 2 * h + act, m_grouped(f, DSWIGLU_COLUMNS)),
        "up dgrad": (up, h + w_up + x, m_grouped(d)),
        "combine dx": (0.0, gather_sum, 1.0),
        "down wgrad": (down, x + act + wgrad_bytes * e * d * f, k_grouped(d, f)),
        "up wgrad": (up, h + x + 2 * wgrad_bytes * e * d * f, k_grouped(2 * f, d)),
    }
    bounds = {}
    for name, (flops, moved, stretch) in kernels.items():
        arithmetic, memory = flops / dense_tflops / 1e6, moved / terabytes_per_second / 1e6
        bounds[name] = Bound(flops / 1e9, moved / 1e9, max(arithmetic, memory), max(arithmetic * stretch, memory))
    return bounds


FORWARD_KERNELS = ("up", "down", "combine")


def bound_tflops(shape: MoEShape, bounds: dict[str, Bound]) -> tuple[float, float]:
    """The roofline as TFLOP/s of the layer: forward, and forward with backward."""
    forward_us = sum(bounds[name].quantised_us for name in FORWARD_KERNELS)
    total_us = sum(bound.quantised_us for bound in bounds.values())
    return shape.forward_flops / forward_us / 1e6, (shape.forward_flops + shape.backward_flops) / total_us / 1e6
