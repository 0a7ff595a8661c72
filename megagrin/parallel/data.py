"""Data parallelism by FSDP2: parameters, gradients and optimizer state sharded over the ranks that hold the same ones.

Every gradient ends as the plain *sum* over ranks. The loss is divided by the tokens of the global batch before backward, so no
rank count enters anywhere, and expert gradients, which reach an expert from all ranks of its ep group by all-to-all and from the
others by this reduction, need no factor of their own.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megagrin.distributed.mesh import ParallelMesh
from megagrin.parallel.expert import moe_layers


def shard_placement(shards: int) -> Callable[[nn.Parameter], Shard]:
    """Where a parameter is sharded: along a dimension that no other axis cuts; dimension 0, which alone may be uneven, first.

    An expert's own dimensions come before the expert dimension: that one is short, and ep cuts it. No dimension is ever cut
    twice: DTensor's placement for that (_StridedShard) does not describe every uneven cut.
    """

    def placement(parameter: nn.Parameter) -> Shard:
        cut = (
            {shard.dim for shard in parameter.placements if isinstance(shard, Shard)} if isinstance(parameter, DTensor) else set()
        )
        free = [dim for dim in range(1, parameter.dim()) if dim not in cut and parameter.shape[dim] % shards == 0]
        if not free or (0 not in cut and parameter.dim() < 3):
            assert shards == 1 or 0 not in cut, "training/rules.py has a rule for every parameter that tp, ep and etp cut"
            return Shard(0)
        return Shard(free[0])

    return placement


def _replicated_small(model: nn.Module, mesh: ParallelMesh) -> list[nn.Module]:
    """Modules whose parameters every rank of a stage holds and uses on tokens of its own, under sequence parallelism."""
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)] if mesh.size("tp") > 1 else []


def shard_data_parallel(
    model: nn.Module, mesh: ParallelMesh, compute_dtype: torch.dtype, reshard: bool, keep_alone: bool = False
) -> None:
    """Apply `fully_shard` to every layer's experts (where others hold the same), the routers, every block, and the model.

    Args:
        model: on the meta device, after every other dimension.
        mesh: where to shard.
        compute_dtype: bf16 keeps fp32 master weights, computes in bf16 and reduces gradients in fp32; fp32 and fp64 just are.
        reshard: free gathered parameters after forward and gather again in backward (ZeRO-3); otherwise keep them.
        keep_alone: keep what no other rank has a part of from one optimizer step to the next, whatever `reshard` says: "gathered"
            means cast to compute_dtype there.
    """
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = wide
    if compute_dtype == torch.bfloat16:
        mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if compute_dtype != torch.bfloat16 and mesh.stage["tokens"].size() == 1:
        # Nothing to share and nothing to cast: FSDP's copies would cost 9 % of a step (benchmarks/parallel_overhead.py).
        return
    dense, expert = mesh.sharding(mesh.dense), mesh.sharding(mesh.expert)
    tokens = mesh.stage["tokens"]

    experts = [layer.experts for layer in moe_layers(model)]
    alone: set[nn.Parameter] = set()
    if expert.size() == 1:
        # Nobody to share experts with: FSDP would only copy them. The module casts them to the compute dtype itself.
        alone = {parameter for module in experts for parameter in module.parameters()}

    def shard(module: nn.Module | list[nn.Module], on: DeviceMesh, policy: MixedPrecisionPolicy, reshard_after: bool) -> None:
        shards = on.size(on.ndim - 1)
        keep = keep_alone and shards == 1
        fully_shard(
            module,
            mesh=on,
            mp_policy=policy,
            reshard_after_forward=reshard_after and not keep,
            shard_placement_fn=shard_placement(shards),
            ignored_params=alone,
        )
        if keep:
            for part in module if isinstance(module, list) else [module]:
                part.set_reshard_after_backward(False, recurse=False)  # type: ignore[operator]  # an FSDPModule now

    if not alone:
        for shared in experts:
            shard(shared, expert, mixed, reshard)
    # Small as they are, one group for all layers costs one collective, not one each.
    if experts and (compute_dtype == torch.bfloat16 or mesh.size("tp") > 1):
        shard([layer.router for layer in moe_layers(model)], tokens, wide, False)  # routers compute with their fp32 weights
    if small := _replicated_small(model, mesh):
        shard(small, tokens, mixed, False)
    for block in model.get_submodule("layers").children():
        shard(block, dense, mixed, reshard)
    shard(model, dense, mixed, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; a plain sum is what is wanted on NCCL, too.
            module.set_force_sum_reduction_for_comms(True)


def prepare_backward(model: nn.Module, zero: int, last: bool) -> None:
    """What FSDP2 does in the next backward pass of a step of several micro-batches.

    Args:
        model: sharded by `shard_data_parallel`.
        zero: 1 adds up whole gradients on each rank, in the reduction's dtype, and reduces their sum once, in the last backward
            pass; 2 and 3 reduce after each micro-batch and add up shards, so that no rank ever holds all gradients (under hybrid
            sharding inside a copy of the model; copies are summed in the last pass). 1 and 2 keep gathered parameters from
            micro-batch to micro-batch, 3 frees them after each use.
        last: it is the step's last micro-batch.
    """
    if not isinstance(model, FSDPModule):
        return
    if zero == 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)
    if zero < 3:
        model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)
