"""Initial weights as a function of (seed, parameter name, element index): the same model under every layout.

Each rank fills only the shard it holds; no full tensor is ever made.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megagrin import rng
from megagrin.models.transformer import ModelConfig

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj", "down_proj.weight")


def _shard(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a parameter that this rank holds, and where it starts in the full tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def fill_normal(parameter: Tensor, key: tuple[int, int], std: float) -> None:
    """Fill this rank's shard with std · normal(row-major index in the full tensor).

    The shard is walked in runs of consecutive indices: everything behind the last dimension in which it is narrower than the
    full tensor is one run.
    """
    shard, offset = _shard(parameter)
    full = tuple(parameter.shape)
    cut = max((dim for dim in range(len(full)) if shard.shape[dim] != full[dim]), default=0)
    inner = math.prod(full[cut + 1 :])
    run = shard.shape[cut] * inner
    for place in itertools.product(*(range(size) for size in shard.shape[:cut])):
        start = 0
        for dim in range(cut):
            start = (start + offset[dim] + place[dim]) * full[dim + 1]
        values = rng.normal_run((start + offset[cut]) * inner, run, key, shard.device)
        shard[place] = values.mul_(std).view(shard.shape[cut:])


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill a parameter, or this rank's shard of it, in place.

    Matrices are normal with std init_std; outputs into the residual stream (o_proj, down_proj) have init_std/sqrt(2·n_layers),
    GPT-2's scheme. LayerNorm weights are 1, biases 0.

    Args:
        name: in the whole model.
    """
    local, _ = _shard(parameter)
    if name.endswith("norm.weight"):
        local.fill_(1.0)
    elif name.endswith("bias"):
        local.zero_()
    elif local.numel():
        scale = 1 / math.sqrt(2 * config.n_layers) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
        fill_normal(parameter, rng.stream_key(seed, name), config.init_std * scale)


def init_parameters(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place, see `init_parameter`."""
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, config, seed)
