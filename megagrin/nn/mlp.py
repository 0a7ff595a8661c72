"""The dense SwiGLU MLP of the dense twins.

Shape suffixes: B sequences, S positions, D model width.
"""

from torch import Tensor, nn


class SwiGLU(nn.Module):
    """W_down · (silu(W_gate·x) ⊙ W_up·x), no biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))
