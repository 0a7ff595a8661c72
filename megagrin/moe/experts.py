"""The experts' weights and their computation.

Shape suffixes: T tokens, R routed rows, D model width, F expert width, L experts of this rank.
"""

import torch
from torch import Tensor

from megagrin.distributed.comm import local_tensor
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import SortPlan


class Experts(torch.nn.Module):
    """SwiGLU experts without biases, stored as one tensor per matrix.

    Attributes:
        gate_up_proj: (E, 2F, D), gate and up rows interleaved: row 2i is the gate of feature i, row 2i + 1 its up.
        down_proj: (E, D, F).
    """

    def __init__(self, n_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down_proj = torch.nn.Parameter(torch.empty(n_experts, d_model, d_ff))

    def forward(
        self, x: Tensor, weight_R: Tensor, counts_L: Tensor, backward_weight_R: Tensor | None, plan: SortPlan | None = None
    ) -> Tensor:
        """Weighted outputs of this rank's experts, (R, D); arguments as in `megagrin.kernels.moe_mlp.expert_mlp`."""
        gate_up, down = local_tensor(self.gate_up_proj), local_tensor(self.down_proj)
        return expert_mlp(x, gate_up, down, weight_R, counts_L, backward_weight_R, plan)
