"""What ZeRO keeps of a parameter, read and written as DTensors, and one true gradient norm.

DeepSpeed stores fp32 weights and moments as flat partitions, cut differently by each stage. Here they become the tensors of our
checkpoints and come back from them, one parameter at a time: a rank holds one whole (tp-, ep-cut) parameter at most, and keeps
its 1/n of it.

DeepSpeed's own norm is replaced: for experts it averages the norms of the expert-parallel ranks where their squares should be
added up (`_average_expert_grad_norms`), and it knows no parameter that is whole on each tp rank but reduced over all of them.

Tested with DeepSpeed 0.19.8, whose inner names are used where it has no public ones.
"""

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megagrin.engines.base import require_finite
from megagrin.engines.zero_groups import Placed

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """Access to one ZeRO optimizer.

    Args:
        optimizer: DeepSpeed's wrapper (`engine.optimizer`): of ZeRO-1 and 2, of ZeRO-3, or its bf16 optimizer, which it takes for
            ZeRO-1 in bf16 with fp32 gradients.
        named: parameters by their name in the whole model.
        placed: where each one lives.
    """

    def __init__(self, optimizer: Any, named: dict[str, nn.Parameter], placed: dict[str, Placed]) -> None:
        self.optimizer, self.named, self.placed = optimizer, named, placed
        self.step = 0
        self._replicas = {parameter: placed[name].replicas for name, parameter in named.items()}
        self.stage3 = hasattr(optimizer, "fp16_partitioned_groups_flat")
        # The bf16 optimizer cannot be told a norm: its own clipping is switched off, and `clip` is called before its step.
        self.clipped_outside = hasattr(optimizer, "fp32_groups_gradient_flat_partition")
        self._make_moments()
        if self.stage3:
            # Gradients are to be sums; ZeRO-1 and 2 have a setting for that (gradient_allreduce_op).
            optimizer._gradient_averaging_world_size = lambda parameters, world_size: 1
            optimizer._get_norm_groups = types.MethodType(lambda _: [self.norm()], optimizer)
        elif self.clipped_outside:
            optimizer.clip_grad = 0.0
        else:
            optimizer.scaled_global_norm = types.MethodType(lambda *_, **__: self.norm(), optimizer)

    def _flat_masters(self) -> list[Tensor]:
        """The fp32 partitions that the inner optimizer steps, one a group."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):
                flat: list[Tensor] = getattr(self.optimizer, name)
                return flat
        raise AssertionError("no ZeRO optimizer")

    def _swappable(self, group: int) -> bool:
        return self.stage3 and self.optimizer._swappable_optimizer_subgroup(group)

    def _make_moments(self) -> None:
        """Make the moments before the first step, so that they can be loaded."""
        inner = self.optimizer.optimizer
        for index, flat in enumerate(self._flat_masters()):
            if self._swappable(index):
                self.optimizer._optimizer_states_and_gradient_swap_in(index)
            state = inner.state[flat]
            if "exp_avg" not in state:
                state["step"] = self._counted(0, flat)
                state |= {moment: torch.zeros_like(flat) for moment in MOMENTS}
            if self._swappable(index):
                self.optimizer._optimizer_states_and_gradient_swap_out(index)
        self.link_moments()

    def link_moments(self) -> None:
        """Let ZeRO-1 and 2 find the moments of a parameter; loading DeepSpeed's own files makes them forget."""
        if not self.stage3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def set_steps(self, step: int) -> None:
        """Let bias correction count on from `step` optimizer steps done."""
        inner = self.optimizer.optimizer
        for flat in self._flat_masters():
            inner.state[flat]["step"] = self._counted(step, flat)

    def _counted(self, step: int, flat: Tensor) -> Tensor | int:
        """Steps as the inner optimizer counts them: torch's fused AdamW in a tensor on its device, DeepSpeed's in a number."""
        torchs = isinstance(self.optimizer.optimizer, torch.optim.AdamW)
        return torch.tensor(float(step), device=flat.device) if torchs else step

    def norm(self) -> Tensor:
        """Euclidean norm over all gradients of all ranks, each element counted once; call it between backward and step.

        Returns:
            fp32 scalar on the device of the gradients, equal on all ranks.

        Raises:
            FloatingPointError: it is not finite.
        """
        squares = [norm.double().square() / replicas for norm, replicas in self._partition_norms()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        device = self.named[next(iter(self.named))].device
        total = total.to(device)
        dist.all_reduce(total)
        norm = total.sqrt()
        require_finite(norm, self.step)
        return norm.float()

    def _partition_norms(self) -> list[tuple[Tensor, int]]:
        """Norms of what this rank holds of the reduced gradients, with the number of ranks that hold the same."""
        optimizer = self.optimizer
        if self.clipped_outside:
            groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True)
            return [(gradient.norm(), self._replicas[group[0]]) for group, gradient in groups]
        if getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False):
            # Offloaded gradients may be on their way to a file already; their norms were taken before.
            norms = optimizer.norm_for_param_grads
            ids = {optimizer.get_param_id(parameter): parameter for parameter in self.named.values()}
            return [(torch.as_tensor(norms[key]), self._replicas[ids[key]]) for key in norms]
        groups = optimizer.fp16_groups if self.stage3 else optimizer.params_in_partition
        return [
            (torch.linalg.vector_norm(gradient, dtype=torch.float32), self._replicas[parameter])
            for index, group in enumerate(groups)
            for parameter, gradient in zip(group, optimizer.averaged_gradients[index], strict=False)
        ]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients by min(1, max_norm / norm), for the optimizer that is not told our norm."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in self.optimizer.fp32_groups_gradient_flat_partition:
            gradient.mul_(factor)

    def read(self, name: str, moment: str | None) -> DTensor:
        """A parameter's fp32 weight (None) or moment; a collective call of the ranks that share it."""
        parameter, placed = self.named[name], self.placed[name]
        read = functools.partial(self.optimizer.get_full_hp_param, parameter) if self.stage3 else parameter.get_full_hp_param  # type: ignore[attr-defined]
        whole = read(moment).view(_cut_shape(placed)).float()
        shard = placed.placements[0]
        assert isinstance(shard, Shard)
        parts = whole.chunk(placed.mesh.size(0), dim=shard.dim)
        rank = placed.mesh.get_local_rank(0)
        empty = whole.narrow(shard.dim, 0, 0)
        local = (parts[rank] if rank < len(parts) else empty).clone()
        stride = torch.empty(placed.shape, device="meta").stride()
        shape = torch.Size(placed.shape)
        return DTensor.from_local(local, placed.mesh, placed.placements, run_check=False, shape=shape, stride=stride)

    def write(self, name: str, moment: str | None, value: DTensor) -> None:
        """The way back of `read`; `publish` makes written weights known to the model."""
        parameter, placed = self.named[name], self.placed[name]
        flat = value.redistribute(placements=[Replicate(), *placed.placements[1:]]).to_local().flatten()
        if not self.stage3:
            parameter.set_full_hp_param(flat.view_as(parameter), moment)  # type: ignore[attr-defined]
            return
        partition, group = self.optimizer._get_fp32_opt_state_partition(parameter, False, moment)
        start = partition.numel() * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        own = flat[start : start + partition.numel()]
        partition.data.zero_()
        partition.data[: own.numel()].copy_(own)
        if self._swappable(group):
            self.optimizer._optimizer_states_and_gradient_swap_out(group)

    def publish(self) -> None:
        """Give the model the fp32 weights in its own dtype."""
        optimizer = self.optimizer
        if not self.stage3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            if self._swappable(group):
                optimizer._optimizer_states_and_gradient_swap_in(group)
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if self._swappable(group):
                optimizer._optimizer_states_and_gradient_swap_out(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _cut_shape(placed: Placed) -> list[int]:
    """Shape of a parameter as tp, ep or etp leave it on this rank."""
    shape = list(placed.shape)
    for axis, cut in enumerate(placed.placements[1:], start=1):
        assert isinstance(cut, Shard)
        block = -(-shape[cut.dim] // placed.mesh.size(axis))
        first = min(shape[cut.dim], placed.mesh.get_local_rank(axis) * block)
        shape[cut.dim] = min(shape[cut.dim], first + block) - first
    return shape
