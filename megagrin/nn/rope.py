"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split layout as in the released GRIN weights.

Shape suffixes: B sequences, S positions, H heads, C head_dim, F = C/2 frequencies.
"""

import torch
from torch import Tensor


def rope_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(−2i/C).

    Args:
        positions_BS: int64 (B or 1, S).
        head_dim: even.
        theta: base of the frequencies.
        dtype: fp32, or fp64 for an fp64 model.

    Returns:
        cos and sin, each (B or 1, 1, S, F), broadcasting over heads.
    """
    exponent_F = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    angle_BSF = positions_BS.unsqueeze(-1).to(dtype) * (1.0 / theta**exponent_F).to(dtype)
    return angle_BSF.cos().unsqueeze(1), angle_BSF.sin().unsqueeze(1)


def rotate(x_BHSC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+C/2}) by its angle; computed in the table's dtype, returned in x's."""
    low, high = x_BHSC.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BHSC.dtype)
