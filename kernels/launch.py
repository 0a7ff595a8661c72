"""One kernel launch as a value: what the launchers run and what the offline compile check reads its signature from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with everything it is started with.

    Attributes:
        kernel: a @triton.jit function.
        grid: number of programs, up to three dimensions.
        args: every argument by name: tensors, host tensor descriptors, ints, and constexprs.
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[self.grid](**self.args, num_warps=self.num_warps, num_stages=self.num_stages)
