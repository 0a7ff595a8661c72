"""From parallel degrees to named device meshes: the only place where ranks are computed.

Attention and everything dense runs on the axis (dp), experts on the axes (edp, ep) over the same ranks, dp = edp · ep.
Consecutive ranks form an expert-parallel group, so that its all-to-all stays inside a node where the degree allows.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that are left.

    Attributes:
        ep: ranks that share one set of experts, by dropless all-to-all; 1 keeps all experts on every rank.
    """

    ep: int = 1

    def violations(self, world_size: int, n_experts: int) -> list[str]:
        """Every broken rule, as `field: value and rule`."""
        if self.ep < 1:
            return [f"parallel.ep: {self.ep} must be at least 1"]
        broken = []
        if world_size % self.ep:
            broken.append(f"parallel.ep: {self.ep} must divide the number of ranks ({world_size})")
        if self.ep > 1 and n_experts == 0:
            broken.append(f"parallel.ep: {self.ep} needs a model with experts; model.n_experts is 0")
        elif n_experts % self.ep:
            broken.append(f"parallel.ep: {self.ep} must divide model.n_experts ({n_experts})")
        return broken


@dataclass(frozen=True)
class ParallelMesh:
    """The meshes of a job.

    Attributes:
        dp: one axis over all ranks; dense parameters are sharded over it, batches are split over it.
        edp: ranks that hold the same experts; expert parameters are sharded over it.
        ep: ranks that share one set of experts.
    """

    dp: DeviceMesh
    edp: DeviceMesh
    ep: DeviceMesh

    @property
    def dp_rank(self) -> int:
        """This rank's block of the global batch."""
        return self.dp.get_local_rank()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """All ranks that see different tokens."""
        return self.dp.get_group()


def build_mesh(config: ParallelConfig, device_type: str) -> ParallelMesh:
    """Build the meshes over the default process group, whose size must fit the degrees (`ParallelConfig.violations`)."""
    edp = dist.get_world_size() // config.ep
    mesh = init_device_mesh(device_type, (edp, config.ep), mesh_dim_names=("edp", "ep"))
    return ParallelMesh(mesh._flatten("dp"), mesh["edp"], mesh["ep"])
