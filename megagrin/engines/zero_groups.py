"""Our meshes as DeepSpeed wants to see them: who shares which parameter.

DeepSpeed reduces a parameter's gradient over its data-parallel group, or, where the parameter says so, over an *expert*
data-parallel group that it knows by name. That mechanism carries all we need: every parameter that is not shared by exactly the
data-parallel ranks names its group. Three kinds (`Axis`):

    dense    ranks that see different sequences or parts of them (dp · cp) and hold the same part of a matrix
    expert   ranks that hold the same part of the same experts (edp)
    tokens   all ranks: norms and routers under sequence parallelism, whole on every tp rank and fed with other tokens on each

DeepSpeed's own construction of expert groups knows no folding, so the groups are registered under the names it looks them up by.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from megagrin.distributed.mesh import ParallelMesh
from megagrin.moe.experts import Experts
from megagrin.moe.router import Router
from megagrin.parallel.data import shard_placement

Axis = Literal["dense", "expert", "tokens"]


@dataclass(frozen=True)
class Placed:
    """Where a parameter lives: what FSDP2 would have known from its DTensor.

    Attributes:
        axis: who else holds the same elements.
        shape: of the whole parameter.
        mesh: `fsdp` (or `tokens`) and the axes that cut the parameter, in this order.
        placements: on `mesh`; the first cuts what each of the sharing ranks keeps in a checkpoint.
        replicas: how often the parameter exists outside its group.
    """

    axis: Axis
    shape: tuple[int, ...]
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    replicas: int


def axes(model: nn.Module, mesh: ParallelMesh) -> dict[str, Axis]:
    """The kind of every parameter, by name."""
    kinds: dict[str, Axis] = {name: "dense" for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        kind: Axis | None = "expert" if isinstance(module, Experts) else None
        if mesh.size("tp") > 1 and isinstance(module, Router | nn.LayerNorm):
            kind = "tokens"
        if kind is not None:
            kinds |= {f"{path}.{name}": kind for name, _ in module.named_parameters(recurse=False)}
    return kinds


def place(parameter: Tensor, axis: Axis, mesh: ParallelMesh) -> Placed:
    """Describe a parameter that is still a DTensor where tp, ep or etp cut it."""
    view = {"dense": mesh.dense, "expert": mesh.expert, "tokens": mesh.stage}[axis]
    names = ["tokens" if axis == "tokens" else "fsdp"]
    placements: list[Placement] = []
    if isinstance(parameter, DTensor):
        cut_names = parameter.device_mesh.mesh_dim_names
        assert cut_names is not None
        names += cut_names
        placements += parameter.placements
    own = view[tuple(names)]
    shard = shard_placement(own.size(0))(parameter)  # type: ignore[arg-type]
    replicas = mesh.size("tp") if axis == "dense" and not placements else 1
    return Placed(axis, tuple(parameter.shape), own, (shard, *placements), replicas)


class Groups:
    """The groups of a mesh by kind; also the `mpu` of DeepSpeed, an object with the methods below."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self.by_axis: dict[Axis, dist.ProcessGroup] = {
            "dense": mesh.dense["fsdp"].get_group(),
            "expert": mesh.expert["fsdp"].get_group(),
            "tokens": mesh.group("tokens"),
        }

    def name(self, axis: Axis) -> str | None:
        """The expert group of a kind, under a name as DeepSpeed parses it; None where the data-parallel group will do."""
        ranks, dense = (dist.get_process_group_ranks(self.by_axis[kind]) for kind in (axis, "dense"))
        if ranks == dense:
            return None
        return f"ep_size_{self._mesh.size('ep') * self._mesh.size('etp') if axis == 'expert' else 1}"

    def register(self) -> None:
        """Put the named groups where DeepSpeed looks for them."""
        from deepspeed.utils import groups

        for axis in ("expert", "tokens"):
            name = self.name(axis)
            if name is None:
                continue
            # Only the size of the expert-parallel group is asked for, and only to name files; rows travel over our own groups.
            experts = self._mesh.expert["ep"].get_group()
            for table, group in (
                (groups._EXPERT_PARALLEL_GROUP, experts),
                (groups._EXPERT_DATA_PARALLEL_GROUP, self.by_axis[axis]),
            ):
                table[name] = group
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(experts)
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(self.by_axis[axis])

    def mark(self, parameter: nn.Parameter, placed: Placed) -> None:
        """Tell DeepSpeed over whom a parameter's gradient is reduced, and whether tp cuts it."""
        axis = placed.axis
        name = self.name(axis)
        # Its bf16 optimizer takes a norm whether or not it clips, and fails on a tp rank without a parameter marked so.
        parameter.tensor_model_parallel = axis == "dense" and placed.replicas == 1  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = self.by_axis[axis]  # type: ignore[attr-defined]  # ZeRO-3 asks for this one
        if name is not None:
            parameter.allreduce = False  # type: ignore[attr-defined]  # ZeRO-1 and 2 ask for these
            parameter.group_name = name  # type: ignore[attr-defined]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tp ranks."""
        return self._mesh.group("tp")

    def get_model_parallel_rank(self) -> int:
        """Rank among them."""
        return self._mesh.rank("tp")

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._mesh.size("tp")

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of kind `dense`."""
        return self.by_axis["dense"]

    def get_data_parallel_rank(self) -> int:
        """Rank among them."""
        return dist.get_rank(self.by_axis["dense"])

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.by_axis["dense"])


def moe_marker(group_name: str) -> nn.Module:
    """A module without parameters by which ZeRO-1 and 2 notice that a model has named groups.

    DeepSpeed looks for its own MoE layer; ours is another. This one is an instance of it and holds nothing, so that it has
    nothing to save, load or run either.

    Args:
        group_name: any registered one.
    """
    from deepspeed.moe.layer import MoE

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.num_local_experts = 0
            self.expert_group_name = group_name

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """Nothing to do: the groups are registered already."""

    return Marker()
