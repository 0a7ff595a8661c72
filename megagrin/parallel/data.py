"""Data parallelism by FSDP2: parameters, gradients and optimizer state sharded, dense ones over dp, experts over edp.

Every gradient ends as the plain *sum* over ranks. The loss is divided by the tokens of the global batch before backward, so no
rank count enters anywhere, and expert gradients, which reach an expert from all ranks of its ep group by all-to-all and from the
others by this reduction, need no factor of their own.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from megagrin.parallel.expert import moe_layers
from megagrin.parallel.mesh import ParallelMesh


def _expert_placement(edp: int):  # type: ignore[no-untyped-def]  # FSDP2's own callback type
    def placement(parameter: nn.Parameter) -> Shard:
        # Inside each expert where that divides: dimension 0 holds few experts, and is already split by ep.
        return Shard(1) if parameter.shape[1] % edp == 0 else Shard(0)

    return placement


def shard_data_parallel(model: nn.Module, mesh: ParallelMesh, compute_dtype: torch.dtype, reshard: bool) -> None:
    """Apply `fully_shard` to every layer's experts (where edp > 1), the routers, every block, and the model.

    Args:
        model: on the meta device, after expert parallelism.
        mesh: where to shard.
        compute_dtype: bf16 keeps fp32 master weights, computes in bf16 and reduces gradients in fp32; fp32 and fp64 just are.
        reshard: free gathered parameters after forward and gather again in backward (ZeRO-3); otherwise keep them (ZeRO-2).
    """
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype == torch.bfloat16:
        mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)

    experts = [layer.experts for layer in moe_layers(model)]
    alone: set[nn.Parameter] = set()
    if mesh.edp.size() == 1:
        # Nobody to share experts with: FSDP would only copy them. The module casts them to the compute dtype itself.
        alone = {parameter for module in experts for parameter in module.parameters()}

    def shard(module: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy, reshard_after: bool) -> None:
        fully_shard(module, mesh=mesh.dp, mp_policy=policy, reshard_after_forward=reshard_after, ignored_params=alone)

    if not alone:
        placement = _expert_placement(mesh.edp.size())
        for shared in experts:
            fully_shard(shared, mesh=mesh.edp, mp_policy=mixed, reshard_after_forward=reshard, shard_placement_fn=placement)
    if compute_dtype == torch.bfloat16 and experts:
        # Routers compute with their fp32 weights; small as they are, one group for all layers costs one collective, not one each.
        shard([layer.router for layer in moe_layers(model)], wide, False)
    for block in model.get_submodule("layers").children():
        shard(block, mixed, reshard)
    shard(model, mixed, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; a plain sum is what is wanted on NCCL, too.
            module.set_force_sum_reduction_for_comms(True)
