"""From parallel degrees to named device meshes: the only place where ranks are computed.

The same ranks are seen in two ways (folding). Everything dense runs on (pp, dp, cp, tp), experts on (pp, edp, ep, etp), with
dp·cp·tp = edp·ep·etp ranks in a pipeline stage. The last axis holds consecutive ranks, so that the most talkative dimension stays
inside a node. Each view is a mesh of its own, because FSDP2 wants the axis it shards over and the axes a parameter is already
cut along in one mesh.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that are left.

    Attributes:
        tp: ranks that share every dense matrix, and the sequence between the matrices (tensor and sequence parallel).
        pp: pipeline stages.
        cp: ranks that share each sequence in attention (context parallel).
        ep: ranks that share one set of experts, by dropless all-to-all; 1 keeps all experts on every rank.
        etp: ranks that share each expert's matrices (expert tensor parallel).
        ep_chunks: parts that a rank's tokens are split into for the exchange over ep: with 2, one half travels while the experts
            work on the other; 1 does not overlap. Results are the same.
        dp_replicate: copies of the sharded model, usually the number of nodes: parameters are gathered inside a copy only
            (hybrid sharding); 1 shards over all data-parallel ranks.
        cp_method: how attention reaches over the cp ranks: all_gather brings all keys and values to each of them; ulysses swaps
            sequence for heads, of which each then holds 1/cp (docs/parallelism.md compares their costs).
        pp_schedule: order of the micro-batches in a pipeline: 1f1b; interleaved_1f1b, with several stages a rank; zero_bubble,
            which computes weight gradients apart from the others and fills waiting time with them.
        pp_stages_per_rank: stages that each pipeline rank holds: stage s is on rank s mod pp.
        pp_split: layers of each stage, in order; none splits by counted FLOPs. The first stage also holds the embedding, the last
            one the head, and these two may have no layer at all.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    ep_chunks: int = 1
    dp_replicate: int = 1
    cp_method: Literal["all_gather", "ulysses"] = "all_gather"
    pp_schedule: Literal["1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    pp_stages_per_rank: int = 1
    pp_split: tuple[int, ...] | None = None

    @property
    def pp_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * self.pp_stages_per_rank

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different sequences; 0 where the degrees do not fit the number of ranks."""
        return self._left_over(world_size, self.pp * self.cp * self.tp)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Ranks that hold the same part of the same experts; 0 where the degrees do not fit the number of ranks."""
        return self._left_over(world_size, self.pp * self.ep * self.etp)

    @staticmethod
    def _left_over(world_size: int, taken: int) -> int:
        return world_size // taken if taken >= 1 and world_size % taken == 0 else 0

    def violations(self, world_size: int, n_experts: int) -> list[str]:
        """Every broken rule about ranks and experts, as `field: value and rule`."""
        degrees = {field.name: getattr(self, field.name) for field in fields(self) if field.type is int}
        small = [f"parallel.{name}: {degree} must be at least 1" for name, degree in degrees.items() if degree < 1]
        if small:
            return small
        broken = []
        for names in (("pp", "cp", "tp"), ("pp", "ep", "etp")):
            product = math.prod(degrees[name] for name in names)
            if world_size % product:
                label = " × ".join(f"parallel.{name}" for name in names if degrees[name] > 1)
                broken.append(f"{label}: {product} must divide the number of ranks ({world_size})")
        if n_experts == 0:
            broken += [
                f"parallel.{name}: {getattr(self, name)} needs a model with experts; model.n_experts is 0"
                for name in ("ep", "etp")
                if getattr(self, name) > 1
            ]
        elif self.ep_chunks > 1 and self.ep == 1:
            broken.append(f"parallel.ep_chunks: {self.ep_chunks} splits an exchange that parallel.ep=1 does not make")
        elif n_experts % self.ep:
            broken.append(f"parallel.ep: {self.ep} must divide model.n_experts ({n_experts})")
        if not broken:
            for size, what in (
                (self.data_parallel_size(world_size), "data-parallel ranks"),
                (self.expert_data_parallel_size(world_size), "ranks with the same experts"),
            ):
                if size % self.dp_replicate:
                    broken.append(f"parallel.dp_replicate: {self.dp_replicate} must divide the {what} ({size})")
        return broken

    def pipeline_violations(self, n_layers: int, micro_batches: int) -> list[str]:
        """Every broken rule about the pipeline, for a number of micro-batches that each rank has in an optimizer step."""
        a_rank, schedule = self.pp_stages_per_rank, self.pp_schedule
        if self.pp == 1:
            fields = (("pp_stages_per_rank", a_rank > 1), ("pp_split", self.pp_split is not None))
            return [f"parallel.{name}: {getattr(self, name)} needs parallel.pp above 1" for name, given in fields if given]
        broken = []
        if schedule == "1f1b" and a_rank > 1:
            broken.append(f"parallel.pp_stages_per_rank: {a_rank} must be 1 with parallel.pp_schedule 1f1b")
        if schedule == "interleaved_1f1b" and a_rank < 2:
            broken.append(f"parallel.pp_stages_per_rank: {a_rank} must be at least 2 with parallel.pp_schedule {schedule}")
        broken += self._split_violations(n_layers)
        counted = "micro-batches a rank (train.global_batch_size / data-parallel ranks / train.micro_batch_size)"
        rounds = max(1, micro_batches // self.pp)
        if schedule == "1f1b" and micro_batches < self.pp:
            broken.append(f"parallel.pp: {self.pp} with parallel.pp_schedule 1f1b must not exceed the {micro_batches} {counted}")
        elif schedule != "1f1b" and micro_batches % rounds:
            broken.append(
                f"parallel.pp: {self.pp} with parallel.pp_schedule {schedule} takes the {micro_batches} {counted} "
                f"in rounds of pp or a little more: their number must be a multiple of the rounds ({rounds})"
            )
        return broken

    def _split_violations(self, n_layers: int) -> list[str]:
        if self.pp_split is None:
            if self.pp_stages <= n_layers + 2:
                return []
            return [
                f"parallel.pp: {self.pp} × parallel.pp_stages_per_rank {self.pp_stages_per_rank} must not exceed "
                f"model.n_layers + 2 ({n_layers + 2}: embedding and head may be stages of their own)"
            ]
        name = f"parallel.pp_split: {list(self.pp_split)}"
        broken = []
        if len(self.pp_split) != self.pp_stages:
            broken.append(f"{name} must have a number for each of the {self.pp_stages} stages (pp × pp_stages_per_rank)")
        if sum(self.pp_split) != n_layers:
            broken.append(f"{name} must add up to model.n_layers ({n_layers})")
        if min(self.pp_split, default=0) < 0 or 0 in self.pp_split[1:-1]:
            broken.append(f"{name} must be positive; only the first and the last stage may be without layers")
        return broken


@dataclass(frozen=True)
class ParallelMesh:
    """The meshes of a job. A view's axes all exist, with size 1 where the degree is 1.

    Attributes:
        dense: (pp, dp_replicate, fsdp, tp): where dense parameters live; fsdp = dp_shard · cp, as both see different tokens.
        batch: (pp, dp, cp, tp): which sequences, and which part of a sequence, a rank sees.
        expert: (pp, dp_replicate, fsdp, ep, etp): where expert parameters live; fsdp are ranks that hold the same experts.
        stage: (pp, tokens): the ranks of a pipeline stage, each with tokens of its own (tp ranks by sequence parallelism).
        config: what they were built from.
    """

    dense: DeviceMesh
    batch: DeviceMesh
    expert: DeviceMesh
    stage: DeviceMesh
    config: ParallelConfig

    @property
    def dp_rank(self) -> int:
        """This rank's block of the global batch."""
        return self.batch["dp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        """Number of blocks that the global batch is cut into."""
        return self.batch["dp"].size()

    def size(self, axis: str) -> int:
        """Ranks along one of pp, dp, cp, tp, ep, etp."""
        return (self.expert if axis in ("ep", "etp") else self.batch)[axis].size()

    def rank(self, axis: str) -> int:
        """This rank's place along one of pp, dp, cp, tp, ep, etp."""
        return (self.expert if axis in ("ep", "etp") else self.batch)[axis].get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group along one of pp, dp, cp, tp, ep, etp, or `tokens`: the ranks of this stage."""
        if axis == "tokens":
            return self.stage["tokens"].get_group()
        return (self.expert if axis in ("ep", "etp") else self.batch)[axis].get_group()

    def sharding(self, view: DeviceMesh) -> DeviceMesh:
        """The axes that FSDP2 shards parameters of `dense` or `expert` over: (fsdp), or (dp_replicate, fsdp)."""
        return view["fsdp"] if view["dp_replicate"].size() == 1 else view["dp_replicate", "fsdp"]


def build_mesh(config: ParallelConfig, device_type: str) -> ParallelMesh:
    """Build the meshes over the default process group, whose size must fit the degrees (`ParallelConfig.violations`)."""
    world = dist.get_world_size()
    dp, edp = config.data_parallel_size(world), config.expert_data_parallel_size(world)

    def view(**axes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    copies = config.dp_replicate
    return ParallelMesh(
        dense=view(pp=config.pp, dp_replicate=copies, fsdp=dp // copies * config.cp, tp=config.tp),
        batch=view(pp=config.pp, dp=dp, cp=config.cp, tp=config.tp),
        expert=view(pp=config.pp, dp_replicate=copies, fsdp=edp // copies, ep=config.ep, etp=config.etp),
        stage=view(pp=config.pp, tokens=world // config.pp),
        config=config,
    )
