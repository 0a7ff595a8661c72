"""What the native engine keeps beside the experts' parameters: 16-bit copies for the products, and sums of gradients in fp32.

Copies: where no other rank holds the same experts, nothing is gathered, and the fp32 parameters would be cast in every forward
and every backward pass: 6 bytes a weight each time. Kept copies cost 2 bytes a weight of memory and are written once a step.
Where experts are shared FSDP2 casts shards before it gathers them.

Sums: the kernels of the weight gradients add to what earlier micro-batches left, in fp32. Through autograd each micro-batch's
gradient would be written, read and added by a pass of its own, 16 bytes a weight. Left to autograd where something else must see
each gradient: in zero-bubble pipelines (torch.distributed.pipelining takes weight gradients by autograd.grad and adds them), and
under FSDP2 with ZeRO 2 and 3 (each micro-batch's gradient is reduced and its shards are added) unless a micro-batch comes in
chunks, whose gradients are then added here.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from megagrin.distributed.comm import local_tensor
from megagrin.moe.experts import MATRICES, Experts, WeightCopy
from megagrin.parallel.expert import PartedExperts, moe_layers


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A local gradient as a tensor of the parameter's kind."""
    if not isinstance(parameter, DTensor):
        return gradient
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(gradient, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


class _OwnGrad:
    """The gradient of a parameter whose dtype is that of the sum; see `MainGrad`."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def total(self) -> Tensor | None:
        """See `MainGrad.total`."""
        grad = self.parameter.grad
        return None if grad is None else local_tensor(grad).contiguous()

    def keep(self, total: Tensor) -> None:
        """See `MainGrad.keep`."""
        grad = self.parameter.grad
        if grad is None or local_tensor(grad) is not total:
            self.parameter.grad = self.for_autograd(total)

    def for_autograd(self, gradient: Tensor) -> Tensor:
        """See `MainGrad.for_autograd`."""
        return _like(gradient, self.parameter)


class _ShardedGrad(_OwnGrad):
    """The gradient of a gathered 16-bit parameter: FSDP2 takes it from where it keeps gradients of the reduction's dtype."""

    def __init__(self, sharded: Any, parameter: Tensor) -> None:
        super().__init__(parameter)
        self._sharded = sharded

    def total(self) -> Tensor | None:
        """See `MainGrad.total`."""
        grad = self._sharded.unsharded_accumulated_grad
        return None if grad is None else local_tensor(grad)

    def keep(self, total: Tensor) -> None:
        """See `MainGrad.keep`."""
        grad = self._sharded.unsharded_accumulated_grad
        if grad is None or local_tensor(grad) is not total:
            self._sharded.unsharded_accumulated_grad = _like(total, self.parameter)


def add_in_place(model: nn.Module, zero: int) -> None:
    """Let the kernels add the experts' gradients up, where each micro-batch's own need not be seen.

    Args:
        model: on the mesh, its data parallelism applied.
        zero: what FSDP2 does with gradients, see `megagrin.parallel.data.prepare_backward`.
    """
    for layer in moe_layers(model):
        experts = layer.experts
        shared = isinstance(experts, FSDPModule)
        if shared and zero > 1 and not isinstance(experts, PartedExperts):
            continue
        experts.main_grads = (_OwnGrad, _OwnGrad)
        if shared and _group(experts).mp_policy.param_dtype is not None:
            held = {p._module_info.param_name: p for p in _group(experts).fsdp_params}
            experts.main_grads = partial(_ShardedGrad, held[MATRICES[0]]), partial(_ShardedGrad, held[MATRICES[1]])


def _group(module: nn.Module) -> Any:
    """What FSDP2 knows of a module's parameters."""
    return fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]


def keep_copies(model: nn.Module, dtype: torch.dtype) -> list[Experts]:
    """Give experts that FSDP2 does not gather copies of their weights in dtype; returns those experts."""
    alone = [layer.experts for layer in moe_layers(model) if not isinstance(layer.experts, FSDPModule)]
    for experts in alone:
        experts.copies = WeightCopy(dtype), WeightCopy(dtype)
    return alone
