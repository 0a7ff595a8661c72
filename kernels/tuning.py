"""Block sizes of the grouped matrix products.

The fallback holds for every shape: chosen by compiling for each architecture and keeping what has no register spills and fits
the shared memory (docs/kernels.md has the figures). Measured choices per GPU come from tables beside this file.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megagrin.kernels import backend

# wgrad writes the operands' dtype, wgrad_fp32 writes or adds to fp32.
Op = Literal["m_grouped", "m_grouped_dgrad", "up_swiglu", "down_dgrad", "wgrad", "wgrad_fp32"]


@dataclass(frozen=True)
class BlockConfig:
    """How a grouped product is cut.

    Attributes:
        block_m: rows of an output tile (for wgrad: rows of the weight matrix, N).
        block_n: columns of an output tile (for wgrad: columns of the weight matrix, K).
        block_k: length of a step of the contraction (for wgrad: routed rows).
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
        group_m: row tiles that share weight columns in L2 before the next column tile is begun.
        slices: column slices of the epilogue, 1, 2 or 4: fewer registers and less shared memory for more of them.
        gather: up_swiglu on tokens only: gather rows in the product's own loads instead of copying them first.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    slices: int = 2
    gather: bool = False


# Two-byte dtypes. Keys: capability major.
_SIXTEEN_BIT: dict[int, dict[str, BlockConfig]] = {
    8: {
        "m_grouped": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "m_grouped_dgrad": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "up_swiglu": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "down_dgrad": BlockConfig(128, 64, 64, 8, 3, slices=4),
        "wgrad": BlockConfig(128, 64, 64, 8, 3, slices=4),
        "wgrad_fp32": BlockConfig(128, 64, 64, 8, 3, slices=4),
    },
    9: {
        "m_grouped": BlockConfig(128, 256, 64, 8, 4),
        "m_grouped_dgrad": BlockConfig(128, 256, 64, 8, 4),
        "up_swiglu": BlockConfig(128, 256, 64, 8, 4, slices=4),
        "down_dgrad": BlockConfig(128, 128, 64, 8, 4, slices=4),
        "wgrad": BlockConfig(128, 256, 64, 8, 4),
        "wgrad_fp32": BlockConfig(128, 256, 64, 8, 3),
    },
    10: {
        "m_grouped": BlockConfig(128, 256, 64, 8, 4),
        "m_grouped_dgrad": BlockConfig(128, 256, 64, 8, 4),
        "up_swiglu": BlockConfig(128, 256, 64, 8, 4, slices=4),
        "down_dgrad": BlockConfig(128, 128, 64, 8, 4, slices=4),
        "wgrad": BlockConfig(128, 256, 64, 8, 4),
        "wgrad_fp32": BlockConfig(128, 256, 64, 8, 3),
    },
}
# fp32 operands are multiplied exactly, without tensor cores: for checking numbers, not for speed.
_FP32 = BlockConfig(64, 64, 16, 8, 2, slices=4)
# Small enough that a test of 65 rows and 72 features has several tiles with ragged ends.
_INTERPRETED = BlockConfig(32, 64, 32, 4, 2, group_m=2, slices=4)


def fallback(op: Op, dtype: torch.dtype, major: int) -> BlockConfig:
    """The statically checked blocks for a dtype and the major number of a compute capability (12 and beyond: as 10)."""
    if dtype.itemsize == 4:
        return _FP32
    return _SIXTEEN_BIT[min(major, 10)][op]


def config(op: Op, dtype: torch.dtype, n: int, k: int, rows_per_expert: int, device: torch.device) -> BlockConfig:
    """Blocks for one launch.

    Args:
        op: which product.
        dtype: of the operands.
        n: output features of the product (wgrad: rows N of the weight).
        k: contracted features (wgrad: columns K of the weight).
        rows_per_expert: routed rows over experts, rounded down.
        device: where it runs; the CPU stands for the interpreter.
    """
    if device.type != "cuda":
        return _INTERPRETED
    return fallback(op, dtype, backend.capability(device)[0])
