"""The experts' weights and their computation.

Shape suffixes: T tokens, R routed rows, D model width, F expert width, L experts of this rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megagrin.distributed.comm import local_tensor
from megagrin.kernels.moe_mlp import MainGrad, expert_mlp
from megagrin.kernels.permute import SortPlan

MATRICES = ("gate_up_proj", "down_proj")


class WeightCopy:
    """A parameter in the products' dtype, kept from step to step and filled anew, in place, when the parameter has changed.

    A change is seen by the parameter's place and version, which most operations in place count up. What writes past it
    (`parameter.data`, fused optimizers of torch and apex) has to be followed by `refresh` or `expire`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._seen: tuple[int, int] | None = None
        self._copy: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The copy of a local fp32 tensor."""
        if self._seen != (weight.data_ptr(), weight._version):
            self.refresh(weight)
        assert self._copy is not None
        return self._copy

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Fill the copy from the weight, whether or not a change was seen."""
        with torch.inference_mode(False):  # training, too, will use what is made in an evaluation
            if self._copy is None or (self._copy.shape, self._copy.device) != (weight.shape, weight.device):
                self._copy = torch.empty_like(weight, dtype=self._dtype)
            self._copy.copy_(weight)
        self._seen = weight.data_ptr(), weight._version

    def expire(self) -> None:
        """Have the copy filled anew before its next use."""
        self._seen = None


class Experts(torch.nn.Module):
    """SwiGLU experts without biases, stored as one tensor per matrix.

    Attributes:
        gate_up_proj: (E, 2F, D), gate and up rows interleaved: row 2i is the gate of feature i, row 2i + 1 its up.
        down_proj: (E, D, F).
        copies: of both matrices in the products' dtype, in the place of a cast in every pass; None casts.
        main_grads: give where the gradients of both are added up in place; None leaves them to autograd.
    """

    def __init__(self, n_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down_proj = torch.nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.copies: tuple[WeightCopy, WeightCopy] | None = None
        self.main_grads: tuple[Callable[[Tensor], MainGrad], Callable[[Tensor], MainGrad]] | None = None

    def forward(
        self, x: Tensor, weight_R: Tensor, counts_L: Tensor, backward_weight_R: Tensor | None, plan: SortPlan | None = None
    ) -> Tensor:
        """Weighted outputs of this rank's experts, (R, D); arguments as in `megagrin.kernels.moe_mlp.expert_mlp`."""
        gate_up, down = (local_tensor(getattr(self, name)) for name in MATRICES)
        copies = None
        if self.copies is not None:
            copies = self.copies[0].of(gate_up), self.copies[1].of(down)
        return expert_mlp(x, gate_up, down, weight_R, counts_L, backward_weight_R, plan, copies, self._sums())

    def _sums(self) -> tuple[MainGrad, MainGrad] | None:
        """None where one matrix is frozen, or is not a leaf: then there is nowhere to keep a sum."""
        parameters = self.gate_up_proj, self.down_proj
        if self.main_grads is None or not all(p.requires_grad and p.is_leaf for p in parameters):
            return None
        return self.main_grads[0](parameters[0]), self.main_grads[1](parameters[1])

    def refresh_copies(self) -> None:
        """Once a step: in one place, and whether or not a change of the weights was seen."""
        for name, copy in zip(MATRICES, self.copies or (), strict=False):
            copy.refresh(local_tensor(getattr(self, name)))

    def expire_copies(self) -> None:
        """After writes to the weights that their versions do not tell of."""
        for copy in self.copies or ():
            copy.expire()
