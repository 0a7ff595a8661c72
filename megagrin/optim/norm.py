"""One true gradient norm over all placements, and clipping by it."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megagrin.distributed.comm import local_tensor

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def _replicas(gradient: Tensor, ranks: int) -> int:
    """How many of the ranks hold each element."""
    if not isinstance(gradient, DTensor):
        return ranks
    mesh = gradient.device_mesh
    # Not is_shard(): it denies a dimension that two axes cut (_StridedShard).
    sharded = [mesh.size(axis) for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return ranks // math.prod(sharded)


def gradient_norm(parameters: list[nn.Parameter], stages: int = 1) -> Tensor:
    """Euclidean norm over every element of every gradient, each counted once, whatever its mesh and placement.

    Args:
        parameters: this rank's.
        stages: pipeline stages; a parameter lives in one of them, on world size / stages ranks.

    Returns:
        fp64 scalar, equal on all ranks. A parameter without gradient counts as zero.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    locals_ = [local_tensor(gradient) for gradient in gradients]
    total = torch.zeros((), dtype=torch.float64, device=locals_[0].device if locals_ else None)
    if locals_:
        # Squares are summed in fp64: in fp32 the sum of 10^10 small squares would stop growing.
        norms = torch.stack(torch._foreach_norm(locals_, 2)).double()
        replicas = [_replicas(gradient, world_size // stages) for gradient in gradients]
        total = (norms.square() / torch.tensor(replicas, dtype=torch.float64, device=norms.device)).sum()
    if world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by min(1, max_norm / (norm + CLIP_EPS))."""
    gradients = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    factor = (max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
