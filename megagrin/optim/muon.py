"""Muon: momentum whose every matrix is orthogonalised as a whole, on any sharding; AdamW for everything else.

Keller Jordan's Muon (kellerjordan.github.io/posts/muon) with the update scale of Moonlight (arXiv 2502.16982, section 2.2):

    m ← μ·m + (1 − μ)·g;   u = (1 − μ)·g + μ·m (Nesterov);   W ← (1 − lr·λ)·W − lr·0.2·√max(n, m)·NewtonSchulz(u)

An orthogonalised (n, m) matrix has RMS 1/√max(n, m), so that the factor gives updates the RMS that AdamW's have (about 0.2), and
learning rate and weight decay mean the same for both.

`torch.optim.Muon` (2.11, 2.13) is not used: it takes 2-D tensors only, orthogonalises always in bf16, in which layouts cannot
agree, and knows nothing of shards.

Sharded matrices: ranks that hold slices of the same stack of matrices exchange them by all-to-all, so that each gets a share of
the stack in whole matrices, orthogonalises it, and sends the slices back. Nothing is computed twice inside a sharding group.

Shape suffixes: M matrices, N and C rows and columns of one matrix (C too where rows are cut: the local count), E experts,
F expert width, D model width.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megagrin.distributed.comm import local_tensor

# Quintic iteration that lifts small singular values fastest; they end in about [0.7, 1.2], not at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_EPS = 1e-7  # an update whose norm is below it (an expert that nobody chose for long) fades instead of being blown up
_RMS = 0.2
# Elements of a stack that is exchanged and orthogonalised at once: bounds the extra memory, still fills a GPU.
_STACK_ELEMENTS = 1 << 27


def orthogonalize(u_MNC: Tensor) -> Tensor:
    """Newton–Schulz: about U·Vᵀ of every matrix U·Σ·Vᵀ of a stack.

    Args:
        u_MNC: (M, N, C); the dtype is the one computed in.

    Returns:
        Same shape and dtype, singular values near 1. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = u_MNC.shape[1] > u_MNC.shape[2]
    x = u_MNC.mT if tall else u_MNC
    norm_M11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm_M11.clamp_min(_EPS)).to(u_MNC.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: matrices between hidden states; not embedding, head, routers, norms or biases."""
    return parameter.dim() >= 2 and not name.startswith(("embed.", "lm_head.")) and ".router." not in name


def _chunks(length: int, parts: int) -> list[int]:
    """Sizes that `torch.chunk`, and with it DTensor and FSDP2, cut a dimension into, with zeros at the end."""
    size = -(-length // parts)
    return [max(0, min(size, length - part * size)) for part in range(parts)]


class _Cut:
    """One cut of a stack's matrices along rows (1) or columns (2) over the ranks of a group."""

    def __init__(self, dim: int, length: int, group: dist.ProcessGroup) -> None:
        self.dim, self.group = dim, group
        self.rank, self.lengths = dist.get_rank(group), _chunks(length, dist.get_world_size(group))

    def whole(self, x_MNC: Tensor) -> Tensor:
        """Slices of all matrices -> all of this rank's share of the matrices."""
        shares = _chunks(x_MNC.shape[0], len(self.lengths))
        mine = shares[self.rank]
        other = x_MNC.shape[3 - self.dim]
        received = self._exchange(list(x_MNC.split(shares)), [mine * length * other for length in self.lengths], x_MNC)
        slices = [part.view(self._shape(mine, length, other)) for part, length in zip(received, self.lengths, strict=True)]
        return torch.cat(slices, self.dim)

    def slices(self, x_MNC: Tensor, matrices: int) -> Tensor:
        """The way back: this rank's share of whole matrices -> its slice of all `matrices`."""
        shares = _chunks(matrices, len(self.lengths))
        other, mine = x_MNC.shape[3 - self.dim], self.lengths[self.rank]
        received = self._exchange(list(x_MNC.split(self.lengths, self.dim)), [share * mine * other for share in shares], x_MNC)
        return torch.cat([part.view(self._shape(share, mine, other)) for part, share in zip(received, shares, strict=True)])

    def _shape(self, matrices: int, length: int, other: int) -> tuple[int, int, int]:
        return (matrices, length, other) if self.dim == 1 else (matrices, other, length)

    def _exchange(self, send: list[Tensor], receive: list[int], like: Tensor) -> list[Tensor]:
        out = like.new_empty(sum(receive))
        flat = torch.cat([part.reshape(-1) for part in send])
        dist.all_to_all_single(out, flat, receive, [part.numel() for part in send], group=self.group)
        return list(out.split(receive))


def _cuts(parameter: Tensor) -> list[_Cut]:
    """How a parameter's matrices are cut, in the order in which the cuts are undone.

    FSDP2's cut is made last, whatever its place in the mesh, so that it is undone first. A cut of the expert dimension leaves
    matrices whole.
    """
    if not isinstance(parameter, DTensor):
        return []
    mesh, shape = parameter.device_mesh, list(parameter.shape)
    names = mesh.mesh_dim_names
    assert names is not None
    axes = [axis for axis in range(mesh.ndim) if names[axis] not in ("dp_replicate", "fsdp")]
    axes += [axis for axis in range(mesh.ndim) if axis not in axes]
    cuts = []
    for axis in axes:
        placement = parameter.placements[axis]
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]  # every placement that is not replicated here cuts
        length = shape[dim]
        shape[dim] = _chunks(length, mesh.size(axis))[mesh.get_local_rank(axis)]
        if (stack_dim := dim + 3 - parameter.dim()) > 0:
            cuts.append(_Cut(stack_dim, length, mesh.get_group(axis)))
    return cuts[::-1]


def _updates(u_MNC: Tensor, cuts: list[_Cut], paired: bool) -> Tensor:
    """Orthogonalised and scaled updates of this rank's slices of a stack of matrices.

    Args:
        u_MNC: this rank's slices of the momentum.
        cuts: from `_cuts`.
        paired: each matrix is a gate and an up matrix, (2F, D) with their rows interleaved. They are orthogonalised one by
            one: they are two maps that only storage puts together, and the dense SwiGLU has them apart.
    """
    counts = []
    for cut in cuts:
        counts.append(u_MNC.shape[0])
        u_MNC = cut.whole(u_MNC)
    shape = u_MNC.shape
    if paired:
        u_MNC = u_MNC.view(shape[0], shape[1] // 2, 2, shape[2]).transpose(1, 2).flatten(0, 1)
    u_MNC = orthogonalize(u_MNC) * (_RMS * math.sqrt(max(u_MNC.shape[1:])))
    if paired:
        u_MNC = u_MNC.view(shape[0], 2, shape[1] // 2, shape[2]).transpose(1, 2).reshape(shape)
    for cut, count in zip(reversed(cuts), reversed(counts), strict=True):
        u_MNC = cut.slices(u_MNC, count)
    return u_MNC


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others, as one optimizer with one state.

    Args:
        adamw: an optimizer over the parameters that are no matrices; it takes its steps inside this one's.
        matrices: (name, parameter) of the matrices, the same list on all ranks of a sharding group.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: μ.
        dtype: dtype of orthogonalisation and of the exchange of slices.
    """

    def __init__(
        self,
        adamw: torch.optim.Optimizer,
        matrices: list[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        self._adamw, self._dtype = adamw, dtype
        stacks: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for name, parameter in matrices:
            key: tuple[Any, ...] = (parameter.shape, name.endswith("gate_up_proj"))
            if isinstance(parameter, DTensor):
                key += (parameter.device_mesh, parameter.placements)
            stacks.setdefault(key, []).append(parameter)
        muon = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "muon": True}
        # The groups are the same dictionaries in both optimizers: a learning rate set here is set there.
        groups = [*adamw.param_groups, *({"params": stack, "paired": key[1], **muon} for key, stack in stacks.items())]
        super().__init__(groups, {})
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without gradient stay as they are (in a stack: all have one or none has)."""
        self._adamw.step()
        for group in self.param_groups:
            if group.get("muon"):
                parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
                for stack in _bounded(parameters):
                    self._step_stack(stack, group)

    def _step_stack(self, stack: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for parameter in stack:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            gradient, momentum = local_tensor(parameter.grad), local_tensor(state["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(momentum, group["momentum"]).to(self._dtype))
        shape = directions[0].shape
        matrices = math.prod(shape[:-2])
        flat = torch.cat([direction.reshape(matrices, *shape[-2:]) for direction in directions])
        updates = _updates(flat, _cuts(stack[0]), group["paired"]).split(matrices)
        for parameter, update in zip(stack, updates, strict=True):
            local = local_tensor(parameter)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update.view(shape), alpha=-group["lr"])


def _bounded(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters in stacks of at most _STACK_ELEMENTS elements of the full tensors, at least one each."""
    if not parameters:
        return []
    size = max(1, _STACK_ELEMENTS // parameters[0].numel())
    return [parameters[start : start + size] for start in range(0, len(parameters), size)]
