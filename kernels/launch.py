"""One kernel launch as a value, and the way from a call to the launch.

A registered operator is what torch.compile, fake tensors and dispatch modes (counting of FLOPs, selective checkpointing) need to
see. In plain eager mode they are not there, and its way through torch's Python dispatcher costs more host time than many a
kernel takes: `eager` goes around it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library


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


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd watches a call with these arguments."""
    # Asked first: a constant for torch.compile, which then traces nothing of the rest.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    # The batched kind is that of torch.autograd.grad(is_grads_batched=True), which is no interpreter of functorch.
    return all(type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def eager(
    op: library.CustomOpDef,
    implementation: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """A function that calls the implementation directly where nothing needs to see the operator, and the operator elsewhere.

    Args:
        op: the registered operator.
        implementation: what it was registered with.
        backward: what `op.register_autograd` was given, likewise; wrapped by `once_differentiable` where it calls kernels, whose
            results a second backward pass would take for constants.
        setup_context: likewise; the names of its arguments are inputs and output.
    """
    if backward is None or setup_context is None:
        return lambda *args: implementation(*args) if _plain(args) else op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        setup_context(ctx, inputs=args, output=output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"_Eager_{op._name}", (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if not _plain(args):
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        return implementation(*args)

    return call
