"""Blocks that `megagrin kernels tune` tries beside the fallback, by major number of the compute capability.

Two-byte dtypes. tests/kernels/test_offline_compile.py compiles every one: no spills, within the architecture's shared memory.
Where nothing is listed, the fallback stands.
"""

from megagrin.kernels.tuning import BlockConfig, Op

_HOPPER_TILES = (
    BlockConfig(128, 256, 64, 8, 3, slices=1),
    BlockConfig(128, 256, 64, 8, 4, group_m=16),
    BlockConfig(128, 256, 64, 8, 4, group_m=4),
    BlockConfig(256, 128, 64, 8, 3, slices=1),
    BlockConfig(128, 128, 64, 8, 4, slices=1),
    BlockConfig(64, 256, 64, 4, 4, slices=1),
)
CANDIDATES: dict[int, dict[Op, tuple[BlockConfig, ...]]] = {
    9: {
        "m_grouped": _HOPPER_TILES,
        "m_grouped_dgrad": _HOPPER_TILES,
        "up_swiglu": (
            BlockConfig(128, 256, 64, 8, 4, group_m=16, slices=4),
            BlockConfig(128, 256, 64, 8, 3, slices=2),
            BlockConfig(128, 128, 64, 8, 4, slices=2),
        ),
        "down_dgrad": (
            BlockConfig(128, 128, 64, 8, 4, group_m=16, slices=4),
            BlockConfig(128, 128, 64, 8, 3, slices=4),
            BlockConfig(64, 128, 64, 4, 4, slices=4),
            BlockConfig(128, 128, 64, 8, 4, slices=4),
        ),
        "wgrad": (
            BlockConfig(128, 256, 64, 8, 3, slices=1),
            BlockConfig(128, 256, 64, 8, 4, group_m=16),
            BlockConfig(256, 128, 64, 8, 3, slices=1),
            BlockConfig(128, 128, 64, 8, 4, slices=1),
        ),
        "wgrad_fp32": (BlockConfig(128, 256, 64, 8, 3, group_m=16), BlockConfig(128, 128, 64, 8, 4)),
    },
}
