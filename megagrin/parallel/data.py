"""Data parallelism by FSDP2: parameters, gradients and optimizer state sharded, dense ones over dp, experts over edp.

Every gradient ends as the plain *sum* over ranks. The loss is divided by the tokens of the global batch before backward, so no
rank count enters anywhere, and expert gradients, which reach an expert from all ranks of its ep group by all-to-all and from the
others by this reduction, need no factor of their own.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
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
    """Apply `fully_shard` to every block's experts and router, every block, and the model.

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

    def shard(module: nn.Module, on: DeviceMesh, policy: MixedPrecisionPolicy, reshard_after: bool = reshard) -> None:
        fully_shard(module, mesh=on, mp_policy=policy, reshard_after_forward=reshard_after)

    for layer in moe_layers(model):
        fully_shard(
            layer.experts,
            mesh=mesh.edp,
            mp_policy=mixed,
            reshard_after_forward=reshard,
            shard_placement_fn=_expert_placement(mesh.edp.size()),
        )
        if compute_dtype == torch.bfloat16:
            shard(layer.router, mesh.dp, wide)  # the router computes with its fp32 weights
    for block in model.get_submodule("layers").children():
        shard(block, mesh.dp, mixed)
    shard(model, mesh.dp, mixed, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; a plain sum is what is wanted on NCCL, too.
            module.set_force_sum_reduction_for_comms(True)
