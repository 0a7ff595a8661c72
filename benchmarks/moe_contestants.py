"""The MoE layer of every contestant on the same tensors: from tokens, chosen experts and weights to the layer's output.

All compute Σ_k weight[t, k] · Expert[expert[t, k]](x[t]) with SwiGLU experts. Ours takes gate and up rows interleaved; the peers
take gate rows before up rows and get a copy in that order. A contestant whose package is absent, or which fails, is a line in
the output and no number.

Shape suffixes: T tokens, K experts per token, R routed rows, E experts, D model width, F expert width.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from moe_shapes import MoEShape, route
from torch import Tensor
from torch.nn.functional import linear, silu

from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.moe.dispatch import LocalDispatch
from megagrin.moe.router import Routing


@dataclass
class Inputs:
    """One of the sets of inputs that measurements rotate through."""

    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    dy_TD: Tensor


@dataclass
class Problem:
    """The tensors of one shape and routing."""

    shape: MoEShape
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    sets: list[Inputs]

    @property
    def counts(self) -> list[int]:
        """Rows per expert of the first set."""
        return torch.bincount(self.sets[0].expert_TK.flatten().cpu(), minlength=self.shape.n_experts).tolist()


def build(shape: MoEShape, routing: str, device: torch.device, dtype: torch.dtype, n_sets: int = 3) -> Problem:
    """Random tensors (zeros would run faster: less power), at scales that keep activations near 1."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(scale: float, *size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    sets = []
    for number in range(n_sets):
        expert_TK, weight_TK = route(shape, routing, seed=number)
        x_TD, dy_TD = (normal(1.0, shape.tokens, shape.d_model) for _ in range(2))
        sets.append(Inputs(x_TD.requires_grad_(), expert_TK.to(device), weight_TK.to(device).requires_grad_(), dy_TD))
    gate_up = normal(shape.d_model**-0.5, shape.n_experts, 2 * shape.d_ff, shape.d_model)
    down = normal(shape.d_ff**-0.5, shape.n_experts, shape.d_model, shape.d_ff)
    return Problem(shape, gate_up.requires_grad_(), down.requires_grad_(), sets)


def gate_before_up(gate_up_E2FD: Tensor) -> Tensor:
    """Interleaved rows (g0, u0, g1, u1, …) to all gate rows before all up rows."""
    n_experts, rows, d_model = gate_up_E2FD.shape
    return gate_up_E2FD.view(n_experts, rows // 2, 2, d_model).transpose(1, 2).reshape(n_experts, rows, d_model)


def interleave(gate_up_E2FD: Tensor) -> Tensor:
    """The inverse of `gate_before_up`."""
    n_experts, rows, d_model = gate_up_E2FD.shape
    return gate_up_E2FD.view(n_experts, 2, rows // 2, d_model).transpose(1, 2).reshape(n_experts, rows, d_model)


Forward = Callable[[Tensor, Tensor, Tensor, Inputs], Tensor]


@dataclass
class Contestant:
    """A layer under test.

    Attributes:
        forward: (gate_up, down, x, inputs) -> y; gate_up in the order that `interleaved` says.
        trains: it has a backward pass.
        package: what must be importable, or None.
    """

    name: str
    forward: Forward
    interleaved: bool = False
    trains: bool = True
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot take part, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def ours(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """The layer as megagrin's MoELayer runs it, after its router."""
    dispatch = LocalDispatch(gate_up.shape[0])
    sent = dispatch.dispatch(x_TD, Routing(inputs.expert_TK, inputs.weight_TK, None))
    y_RD = expert_mlp(sent.x, gate_up, down, sent.weight_R, sent.counts_L, sent.backward_weight_R, sent.plan)
    return dispatch.combine(y_RD, sent)


def _sorted(inputs: Inputs, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token of each sorted row, sorted row of each choice, rows per expert."""
    flat_R = inputs.expert_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat_R.device).scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return order_R // inputs.expert_TK.shape[1], place_R, counts_E


def _weighted_sum(y_RD: Tensor, place_R: Tensor, weight_TK: Tensor) -> Tensor:
    y_TKD = y_RD[place_R].view(*weight_TK.shape, -1)
    return torch.bmm(weight_TK.to(y_RD.dtype).unsqueeze(1), y_TKD).squeeze(1)


def _swiglu(h_R2F: Tensor) -> Tensor:
    gate_RF, up_RF = h_R2F.chunk(2, dim=-1)
    return silu(gate_RF) * up_RF


def grouped_mm(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """torch's grouped product between eager operations, as frameworks without kernels of their own have it."""
    token_R, place_R, counts_E = _sorted(inputs, gate_up.shape[0])
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    h_R2F = torch._grouped_mm(x_TD[token_R], gate_up.transpose(1, 2), offs=offsets_E)
    y_RD = torch._grouped_mm(_swiglu(h_R2F), down.transpose(1, 2), offs=offsets_E)
    return _weighted_sum(y_RD, place_R, inputs.weight_TK)


def expert_loop(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """One cuBLAS product per expert; the counts come to the host."""
    token_R, place_R, counts_E = _sorted(inputs, gate_up.shape[0])
    blocks = x_TD[token_R].split(counts_E.tolist())
    parts = zip(blocks, gate_up.unbind(), down.unbind(), strict=True)
    y_RD = torch.cat([linear(_swiglu(linear(block, up)), down) for block, up, down in parts])
    return _weighted_sum(y_RD, place_R, inputs.weight_TK)


def liger(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """liger-kernel's fused MoE (Triton)."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weight_TK = inputs.weight_TK.to(x_TD.dtype)
    return LigerFusedMoEFunction.apply(x_TD, gate_up, down, inputs.expert_TK.to(torch.int32), weight_TK)


def scattermoe(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """scattermoe's parallel_linear (Triton), composed as in its GLU layer."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    top_k = inputs.expert_TK.shape[1]
    sorted_experts, sorted_places, offsets = flatten_sort_count(inputs.expert_TK, num_experts=gate_up.shape[0])
    order: tuple[Any, ...] = (sorted_experts, sorted_places, offsets)
    h_R2F = parallel_linear(x_TD, gate_up.permute(0, 2, 1), top_k, *order, grouped_out=True)
    gates = inputs.weight_TK.to(x_TD.dtype)
    return parallel_linear(_swiglu(h_R2F), down.permute(0, 2, 1), 1, *order, grouped_in=True, gates=gates)


def megablocks_gemm(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """MegaBlocks' grouped_gemm (CUTLASS or cuBLAS) between eager operations; its counts live on the host."""
    from grouped_gemm.ops import gmm

    token_R, place_R, counts_E = _sorted(inputs, gate_up.shape[0])
    host_counts_E = counts_E.cpu()
    h_R2F = gmm(x_TD[token_R], gate_up, host_counts_E, trans_b=True)
    return _weighted_sum(gmm(_swiglu(h_R2F), down, host_counts_E, trans_b=True), place_R, inputs.weight_TK)


def triton_kernels(gate_up: Tensor, down: Tensor, x_TD: Tensor, inputs: Inputs) -> Tensor:
    """Triton's own matmul_ogs; forward only. Its gates are a softmax of the chosen logits: logs of weights return as weights."""
    from triton_kernels.matmul_ogs import PrecisionConfig, matmul_ogs
    from triton_kernels.routing import routing

    logits_TE = torch.full((x_TD.shape[0], gate_up.shape[0]), -1e4, device=x_TD.device)
    logits_TE.scatter_(1, inputs.expert_TK, inputs.weight_TK.detach().log())
    data, gather, scatter = routing(logits_TE.to(torch.float32), inputs.expert_TK.shape[1])
    precision = PrecisionConfig()
    h_R2F = matmul_ogs(x_TD, gate_up.transpose(1, 2), None, data, gather_indx=gather, precision_config=precision)
    return matmul_ogs(
        *(_swiglu(h_R2F), down.transpose(1, 2), None, data),
        scatter_indx=scatter,
        precision_config=precision,
        gammas=data.gate_scal,
    )


CONTESTANTS = (
    Contestant("megagrin", ours, interleaved=True),
    Contestant("torch._grouped_mm", grouped_mm),
    Contestant("cuBLAS loop", expert_loop),
    Contestant("liger-kernel", liger, package="liger_kernel"),
    Contestant("scattermoe", scattermoe, package="scattermoe"),
    Contestant("grouped_gemm", megablocks_gemm, package="grouped_gemm"),
    Contestant("triton_kernels", triton_kernels, trains=False, package="triton_kernels"),
)


class Layer:
    """A contestant with its weights."""

    def __init__(self, contestant: Contestant, problem: Problem) -> None:
        self.contestant, self.problem = contestant, problem
        gate_up = problem.gate_up_E2FD
        self.gate_up = gate_up if contestant.interleaved else gate_before_up(gate_up.detach()).requires_grad_()

    def forward(self, number: int) -> Tensor:
        """Output for one of the sets; the graph is built where the contestant trains."""
        inputs = self.problem.sets[number % len(self.problem.sets)]
        with torch.set_grad_enabled(self.contestant.trains):
            return self.contestant.forward(self.gate_up, self.problem.down_EDF, inputs.x_TD, inputs)

    def forward_backward(self, number: int) -> tuple[Tensor, ...]:
        """Gradients of x, gate and up, down, weights."""
        inputs = self.problem.sets[number % len(self.problem.sets)]
        leaves = (inputs.x_TD, self.gate_up, self.problem.down_EDF, inputs.weight_TK)
        return torch.autograd.grad(self.forward(number), leaves, inputs.dy_TD)

    def results(self) -> dict[str, Tensor]:
        """Output and gradients in one layout for all contestants."""
        found = {"y": self.forward(0).detach()}
        if self.contestant.trains:
            dx, d_gate_up, d_down, d_weight = self.forward_backward(0)
            d_gate_up = d_gate_up if self.contestant.interleaved else interleave(d_gate_up)
            found |= {"dx": dx, "d gate_up": d_gate_up, "d down": d_down, "d weight": d_weight}
        return found


# Norm of the difference over the norm. In bf16 contestants round at different points, each of relative size 2^-9.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


def differences(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of each result from the same of another contestant; NaN where a result holds one."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.float() - b.float()).norm() / b.float().norm())

    return {name: distance(value, expected[name]) for name, value in results.items()}


def disagreement(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """What differs too much, in words; None where all agrees."""
    wrong = [f"{name} by {value:.2g}" for name, value in found.items() if not value <= TOLERANCE[dtype]]
    return f"differs from ours: {', '.join(wrong)}" if wrong else None
