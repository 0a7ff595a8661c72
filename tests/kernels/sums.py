"""A main gradient as the kernels see it: see `megagrin.kernels.moe_mlp.MainGrad`."""

from torch import Tensor


class Sum:
    """The sum for one weight; `begun` counts how often it was begun."""

    def __init__(self, weight: Tensor) -> None:
        self.parameter, self.begun = weight, 0
        self._total: Tensor | None = None

    def total(self) -> Tensor | None:
        return self._total

    def keep(self, total: Tensor) -> None:
        self.begun += self._total is None
        self._total = total

    def for_autograd(self, gradient: Tensor) -> Tensor:
        return gradient
