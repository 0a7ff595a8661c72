"""From a plain model to one that runs on the mesh: one ordered list, one line per dimension."""

import torch

from megagrin.distributed.mesh import ParallelMesh
from megagrin.models.transformer import Transformer
from megagrin.parallel.compile import compile_dense
from megagrin.parallel.context import shard_context
from megagrin.parallel.data import shard_data_parallel
from megagrin.parallel.expert import shard_experts
from megagrin.parallel.recompute import Recompute, apply_recompute
from megagrin.parallel.tensor import shard_tensors


def parallelize(
    model: Transformer,
    mesh: ParallelMesh,
    compute_dtype: torch.dtype,
    reshard: bool | None,
    recompute: Recompute,
    compiled: bool,
    keep_alone: bool = False,
) -> None:
    """Apply every parallel dimension in place.

    Args:
        model: on the meta device.
        mesh: the job's meshes.
        compute_dtype: dtype of matrix products.
        reshard: see `shard_data_parallel`; None leaves data parallelism to an engine that has its own.
        recompute: see `apply_recompute`.
        compiled: see `compile_dense`.
        keep_alone: see `shard_data_parallel`.
    """
    if mesh.size("tp") > 1:
        shard_tensors(model, mesh)
    if mesh.size("ep") * mesh.size("etp") > 1:
        shard_experts(model, mesh)
    if mesh.size("cp") > 1:
        shard_context(model, mesh, mesh.config.cp_method)
    if compiled:
        compile_dense(model)
    apply_recompute(model, recompute)
    if reshard is not None:
        shard_data_parallel(model, mesh, compute_dtype, reshard, keep_alone)
