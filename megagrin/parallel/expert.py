"""Expert parallelism: experts split over the ep axis in consecutive blocks, their matrices cut over the etp axis.

Tokens come to their experts by all-to-all over ep; the ranks of an etp group then share what they received and each computes with
its part of d_ff. With ep 1 the etp group gathers tokens before they are sorted, which moves a k-th of the rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from megagrin.distributed.mesh import ParallelMesh
from megagrin.moe.dispatch import AllToAllDispatch, Dispatch, GatheredDispatch, OverlappedDispatch
from megagrin.moe.experts import Experts
from megagrin.moe.layer import MoELayer

# gate_up_proj (E, 2F, D), its gate and up rows interleaved: an even cut keeps pairs together; down_proj (E, D, F).
_CUT_DIM = {"gate_up_proj": 1, "down_proj": 2}


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]


class PartedExperts(Experts):
    """Experts that work on several chunks of rows in one call, see `OverlappedDispatch`."""

    def forward(  # type: ignore[override]
        self,
        handles: list[tuple[Tensor, Tensor]],
        work: Callable[[int, tuple[Tensor, Tensor], Callable[..., Tensor]], Tensor],
    ) -> list[Tensor]:
        """Call `work` for every chunk.

        Args:
            handles: of the chunks under way; as arguments of this call they tell FSDP2 when the gradients are complete.
            work: brings the rows of a chunk in, applies the function given to it, and sends the outputs off.

        Returns:
            Handles of the outputs under way.
        """
        return [work(index, handle, self.compute) for index, handle in enumerate(handles)]

    def compute(self, *rows: Any) -> Tensor:
        """The experts' work on one chunk, without its journey: what may be recomputed."""
        return super().forward(*rows)


def _token_dispatch(n_experts: int, mesh: ParallelMesh) -> Dispatch:
    cut_group = mesh.group("etp") if mesh.size("etp") > 1 else None
    if mesh.size("ep") == 1:
        assert cut_group is not None
        return GatheredDispatch(n_experts, cut_group)
    if mesh.config.ep_chunks > 1:
        return OverlappedDispatch(n_experts, mesh.group("ep"), cut_group, mesh.config.ep_chunks)
    return AllToAllDispatch(n_experts, mesh.group("ep"), cut_group)


def shard_experts(model: nn.Module, mesh: ParallelMesh) -> None:
    """Keep 1/(ep·etp) of the experts' weights on each rank, as DTensors on the axes that cut them; needs the meta device."""
    axes = tuple(axis for axis in ("ep", "etp") if mesh.size(axis) > 1)
    for layer in moe_layers(model):
        experts = layer.experts
        n_experts = experts.gate_up_proj.shape[0]
        layer.token_dispatch = _token_dispatch(n_experts, mesh)
        if isinstance(layer.token_dispatch, OverlappedDispatch):
            with torch.device("meta"):
                layer.experts = PartedExperts(n_experts, experts.gate_up_proj.shape[2], experts.down_proj.shape[2])
        for name, parameter in list(experts.named_parameters()):
            assert parameter.is_meta
            cut = [Shard(0 if axis == "ep" else _CUT_DIM[name]) for axis in axes]
            shape = list(parameter.shape)
            for axis, shard in zip(axes, cut, strict=True):
                shape[shard.dim] //= mesh.size(axis)
            local = torch.empty(shape, dtype=parameter.dtype, device="meta")
            sharded = DTensor.from_local(local, mesh.expert[axes], cut, run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(sharded))
