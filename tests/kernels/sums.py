"""A main gradient as the kernels see it: see `megagrin.kernels.moe_mlp.MainGrad`."""

from torch import Tensor


class Sum:
    """The sum for one weight; `begun` counts how often it was begun."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self.begun = weight, 0
        self._total: Tensor | None = None

    def parameter(self) -> Tensor:
        return self._weight

    def total(self) -> Tensor | None:
        return self._total

    def begin(self, gradient: Tensor) -> None:
        self.begun += 1
        self._total = gradient
