"""Backward passes in two halves, as a zero-bubble pipeline takes them: gradients of inputs first, those of weights later.

autograd tells its own operations which gradients a pass is for; `ctx.needs_input_grad` of ours is that of the forward pass. So
the pipeline says it here. A flag of the process and not of the thread: on CUDA autograd calls our code from a thread of its own,
while the one that asked for gradients waits.
"""

import contextlib
from collections.abc import Iterator

_weights_later = False


@contextlib.contextmanager
def inputs_only() -> Iterator[None]:
    """In a backward pass inside the with block, gradients of weights may be left to a second pass over the same graph."""
    global _weights_later
    _weights_later = True
    try:
        yield
    finally:
        _weights_later = False


def weights_later() -> bool:
    """Whether this backward pass is for inputs only."""
    return _weights_later
