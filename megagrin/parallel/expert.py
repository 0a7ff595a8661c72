"""Expert parallelism: experts split over the ep axis in consecutive blocks, tokens brought to them by all-to-all."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from megagrin.moe.dispatch import AllToAllDispatch
from megagrin.moe.layer import MoELayer
from megagrin.parallel.mesh import ParallelMesh


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def shard_experts(model: nn.Module, mesh: ParallelMesh) -> None:
    """Keep 1/ep of the experts on each rank, stored as DTensors on the ep axis; the model must be on the meta device."""
    for layer in moe_layers(model):
        n_experts = layer.experts.gate_up_proj.shape[0]
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.is_meta
            local = torch.empty(parameter.shape[0] // mesh.size("ep"), *parameter.shape[1:], dtype=parameter.dtype, device="meta")
            sharded = DTensor.from_local(local, mesh.expert["ep"], [Shard(0)], run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(sharded))
        layer.token_dispatch = AllToAllDispatch(n_experts, mesh.group("ep"))
