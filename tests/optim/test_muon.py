"""Muon against plain loops over single matrices, whole and sharded.

Shape suffixes: M matrices, N rows, C columns, E experts, F expert width, D model width.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import OPTIM, STEPS, Run, assert_same_run, build_engine, full, micro_batches
from helpers import GlooPool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.distributed.mesh import ParallelConfig
from megagrin.optim.muon import Muon, is_matrix, orthogonalize

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.9
MUON = replace(OPTIM, kind="muon")


def plain_newton_schulz(u_NC: Tensor) -> Tensor:
    """Five quintic steps on one matrix, as the published recipe states them."""
    x = u_NC / u_NC.norm()
    if u_NC.shape[0] > u_NC.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if u_NC.shape[0] > u_NC.shape[1] else x


def plain_muon(weight_NC: Tensor, gradients: list[Tensor]) -> Tensor:
    """Muon on one matrix, momentum in Keller Jordan's form (a plain sum): orthogonalisation takes its scale away."""
    buffer = torch.zeros_like(weight_NC)
    for gradient_NC in gradients:
        buffer = MOMENTUM * buffer + gradient_NC
        update = plain_newton_schulz(gradient_NC + MOMENTUM * buffer)
        weight_NC = weight_NC * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(weight_NC.shape)) * update
    return weight_NC


def plain_experts(weight_ENC: Tensor, gradients: list[Tensor], parts: int) -> Tensor:
    """Every expert by itself; `parts` 2 takes the even rows, gate, and the odd ones, up, apart."""
    out = torch.empty_like(weight_ENC)
    for expert in range(weight_ENC.shape[0]):
        for part in range(parts):
            rows = slice(part, None, parts)
            out[expert, rows] = plain_muon(weight_ENC[expert, rows], [gradient[expert, rows] for gradient in gradients])
    return out


PARAMETERS = {  # name -> shape; two of one shape make a stack
    "layers.0.attention.q_proj.weight": (12, 20),
    "layers.1.attention.q_proj.weight": (12, 20),
    "layers.0.attention.o_proj.weight": (20, 12),
    "layers.0.moe.experts.gate_up_proj": (4, 16, 6),
    "layers.0.moe.experts.down_proj": (4, 6, 8),
}


def expected(name: str, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """What three plain steps make of a parameter."""
    if weight.dim() == 2:
        return plain_muon(weight, gradients)
    return plain_experts(weight, gradients, 2 if name.endswith("gate_up_proj") else 1)


def _tensors() -> dict[str, list[Tensor]]:
    """Weight and three gradients of every parameter, fp64."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
        for name, shape in PARAMETERS.items()
    }


def _step(parameters: dict[str, nn.Parameter], gradients: list[dict[str, Tensor]]) -> Muon:
    bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Muon(
        torch.optim.AdamW([bias], lr=LR, weight_decay=0.0), list(parameters.items()), LR, DECAY, MOMENTUM, torch.float64
    )
    for of_step in gradients:
        bias.grad = torch.ones_like(bias)
        for name, parameter in parameters.items():
            parameter.grad = of_step[name]
        optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full_like(bias, 1 - len(gradients) * LR), rtol=0, atol=1e-6)
    return optimizer


def test_equals_plain_loops_over_matrices() -> None:
    """Dense matrices, and each expert's gate, up and down."""
    tensors = _tensors()
    parameters = {name: nn.Parameter(values[0].clone()) for name, values in tensors.items()}
    _step(parameters, [{name: values[step] for name, values in tensors.items()} for step in (1, 2, 3)])
    for name, values in tensors.items():
        torch.testing.assert_close(parameters[name].detach(), expected(name, values[0], values[1:]), rtol=1e-12, atol=1e-12)


def test_equals_torchs_muon_as_far_as_bf16_goes() -> None:
    """The same recipe in torch, which orthogonalises in bf16."""
    weight, *gradients = _tensors()["layers.0.attention.q_proj.weight"]
    ours, theirs = nn.Parameter(weight.float()), nn.Parameter(weight.float())
    other = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    optimizer = Muon(adamw, [("q", ours)], LR, DECAY, MOMENTUM, torch.float32)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.float(), gradient.float()
        optimizer.step()
        other.step()
    assert 0 < (ours - theirs).norm() < 0.02 * (ours - weight).norm()


def test_updates_have_the_size_of_adamws() -> None:
    """RMS about 0.2 of the learning rate for every shape; singular values near 1."""
    for shape in [(1, 32, 64), (2, 16, 256), (3, 256, 16)]:
        out_MNC = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(out_MNC)
        assert values.min() > 0.6
        assert values.max() < 1.3
        rms = out_MNC.square().mean().sqrt() * 0.2 * math.sqrt(max(shape[1:]))
        assert 0.15 < rms < 0.25


def test_zero_gradients_leave_a_zero_update() -> None:
    """An expert without tokens: no NaN, no noise blown up to full size."""
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))
    assert orthogonalize(torch.full((1, 4, 6), 1e-20)).abs().max() < 1e-9


def test_who_is_a_matrix() -> None:
    """Embedding, head, routers, norms and biases stay with AdamW."""
    two, one = torch.empty(2, 2), torch.empty(2)
    taken = ["layers.0.attention.q_proj.weight", "layers.3.mlp.gate_proj.weight", "layers.0.moe.experts.down_proj"]
    assert all(is_matrix(name, two) for name in taken)
    left = ["embed.weight", "lm_head.weight", "layers.0.moe.router.weight"]
    assert not any(is_matrix(name, two) for name in left)
    assert not is_matrix("layers.0.attention.q_proj.bias", one)


def run_sharded(shape: tuple[int, ...], names: tuple[str, ...], dense: list[Any], experts: list[Any]) -> dict[str, Tensor]:
    """Three steps on shards; returns full weights."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    tensors = _tensors()

    def shard(name: str, tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, dense if len(PARAMETERS[name]) == 2 else experts)

    parameters = {name: nn.Parameter(shard(name, values[0])) for name, values in tensors.items()}
    optimizer = _step(parameters, [{name: shard(name, values[step]) for name, values in tensors.items()} for step in (1, 2, 3)])
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]["momentum_buffer"]
        assert state.placements == parameter.placements, name
    dist.barrier()
    return {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("shape", "names", "dense", "experts"),
    [
        pytest.param((2,), ("fsdp",), [Shard(0)], [Shard(1)], id="rows"),
        pytest.param((2,), ("fsdp",), [Shard(1)], [Shard(2)], id="columns"),
        pytest.param((2,), ("ep",), [Replicate()], [Shard(0)], id="whole-experts"),
        pytest.param((3,), ("fsdp",), [Shard(0)], [Shard(1)], id="uneven"),
        pytest.param((4,), ("fsdp",), [Shard(1)], [Shard(1)], id="more-ranks-than-matrices"),
        pytest.param((2, 2), ("fsdp", "tp"), [Shard(1), Shard(0)], [Shard(2), Shard(1)], id="rows-and-columns"),
        pytest.param((2, 2), ("fsdp", "ep"), [Shard(0), Replicate()], [Shard(1), Shard(0)], id="experts-and-rows"),
        pytest.param((2, 2), ("dp_replicate", "fsdp"), [Replicate(), Shard(0)], [Replicate(), Shard(1)], id="hybrid"),
    ],
)
def test_shards_step_as_whole_matrices_do(gloo: GlooPool, shape: Any, names: Any, dense: Any, experts: Any) -> None:
    """However a matrix is cut, its update is that of the whole matrix."""
    for got in gloo.run(math.prod(shape), run_sharded, shape, names, dense, experts):
        for name, values in _tensors().items():
            torch.testing.assert_close(got[name], expected(name, values[0], values[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.long), "fp64"])
@pytest.mark.parametrize(
    ("world_size", "parallel", "micro"),
    [
        pytest.param(2, ParallelConfig(), 4, id="dp2", marks=pytest.mark.long),
        pytest.param(2, ParallelConfig(ep=2), 4, id="ep2", marks=pytest.mark.long),
        pytest.param(4, ParallelConfig(ep=2), 2, id="ep2-edp2"),
        pytest.param(4, ParallelConfig(dp_replicate=2), 1, id="hybrid-accumulation", marks=pytest.mark.long),
        pytest.param(2, ParallelConfig(tp=2), 4, id="tp2"),
        pytest.param(2, ParallelConfig(pp=2), 2, id="pp2"),
        pytest.param(4, ParallelConfig(tp=2, etp=2), 2, id="tp2-etp2-dp2", marks=pytest.mark.long),
    ],
)
def test_same_run_on_every_layout(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, dtype: str) -> None:
    """Losses, gradients, updates and clip norm of 20 steps of sampled routing."""
    assert_same_run(gloo, world_size, Run(parallel, micro, dtype, STEPS, optim=MUON))


def run_resumed(run: Run, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after four steps in a row, and after two, a checkpoint, a new engine and two more."""

    def weights(engine: Any) -> dict[str, Tensor]:
        return {name: full(parameter) for name, parameter in engine.model.named_parameters()}

    engine = build_engine(run)
    path = None
    for step in range(4):
        engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-2)
        if step == 1:
            path = store.save(Path(folder), engine.state(), CheckpointInfo(2, 0, {}))
    whole = weights(engine)
    assert path is not None
    engine = build_engine(run)
    engine.load(path, 2)
    for step in (2, 3):
        engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-2)
    return whole, weights(engine)


def test_resumes_bit_for_bit(gloo: GlooPool, tmp_path: Path) -> None:
    """Momentum of matrices and AdamW's moments of the rest are all in the checkpoint."""
    for whole, resumed in gloo.run(4, run_resumed, Run(ParallelConfig(ep=2), 1, "fp32", optim=MUON), str(tmp_path)):
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
