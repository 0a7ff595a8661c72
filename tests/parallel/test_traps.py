"""Traps of gradient scale that other frameworks fell into, by name. A wrong factor shows as the ratio that a test prints."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import (
    BALANCE,
    MODEL,
    OPTIM,
    SEQUENCES,
    Run,
    build_engine,
    capture_gradients,
    compare,
    initial_weights,
    micro_batches,
    reference,
    run_steps,
)
from helpers import GlooPool
from torch import Tensor

from megagrin.checkpoint import store
from megagrin.distributed.mesh import ParallelConfig, ParallelMesh
from megagrin.engines import base

UNCLIPPED = replace(OPTIM, clip_norm=0.0)
LAYOUTS = [
    pytest.param(4, ParallelConfig(), id="dp4"),
    pytest.param(4, ParallelConfig(tp=2, ep=2), id="tp2-dp2-ep2"),
    pytest.param(4, ParallelConfig(tp=2, ep=4), id="tp2-dp2-ep4", marks=pytest.mark.long),
    pytest.param(4, ParallelConfig(tp=2, etp=2), id="tp2-dp2-etp2-edp2", marks=pytest.mark.long),
    pytest.param(4, ParallelConfig(tp=2, ep=2, etp=2), id="tp2-dp2-ep2-etp2"),
    pytest.param(4, ParallelConfig(ep=2, etp=2), id="dp4-ep2-etp2", marks=pytest.mark.long),
    pytest.param(4, ParallelConfig(tp=2, cp=2, ep=2), id="tp2-cp2-ep2"),
]


def one_step(run: Run) -> dict[str, Any]:
    """Unclipped gradients of the second step, and what it reported. The first changes no weight: scope `batch` needs its load."""
    engine = build_engine(run)
    gradients = capture_gradients(engine)
    for step in range(2):
        result = engine.train_step(micro_batches(run, step, engine.mesh), step, lr=0.0)
    return {"gradients": gradients[1], "norm": result.grad_norm, "loss": result.loss}


def ratio(ours: Tensor, expected: Tensor) -> float:
    """The factor between two gradients; 1/DP, TP or EP where someone forgot one."""
    return (torch.linalg.vecdot(ours.flatten(), expected.flatten()) / expected.norm().square()).item()


@pytest.mark.parametrize("scope", ["batch", "global"])
@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_balance_loss_is_not_divided_by_dp(gloo: GlooPool, world_size: int, parallel: ParallelConfig, scope: Any) -> None:
    """The balance loss's own gradient, the difference between a step with it and one without."""

    def own(ranks: int, run: Run) -> dict[str, Tensor]:
        steps = [gloo.run(ranks, one_step, replace(run, balance=replace(run.balance, coef=coef)))[0] for coef in (1.0, 0.0)]
        return {name: steps[0]["gradients"][name] - steps[1]["gradients"][name] for name in steps[0]["gradients"]}

    # One micro-batch a rank: scope `global` counts over ranks, not over micro-batches.
    micro = SEQUENCES // parallel.data_parallel_size(world_size)
    run = Run(parallel, micro, balance=replace(BALANCE, scope=scope, z_coef=0.0), optim=UNCLIPPED)
    ours, expected = own(world_size, run), own(1, run.reference())
    for name in ("layers.1.moe.router.weight", "layers.0.moe.router.weight", "embed.weight"):
        assert ratio(ours[name], expected[name]) == pytest.approx(1, rel=1e-8), name


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_every_gradient_has_factor_one(gloo: GlooPool, world_size: int, parallel: ParallelConfig) -> None:
    """Expert gradients under EP × TP, routers and norms replicated over TP, biases of cut matrices, the vocabulary's rows."""
    run = Run(parallel, 2, optim=UNCLIPPED)
    expected = gloo.run(1, one_step, run.reference())[0]
    for ours in gloo.run(world_size, one_step, run):
        assert ours["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            if not name.endswith("k_proj.bias"):  # none in exact arithmetic
                assert ratio(ours["gradients"][name], gradient) == pytest.approx(1, rel=1e-8), name


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_norm_over_mixed_placements(gloo: GlooPool, world_size: int, parallel: ParallelConfig) -> None:
    """The clip norm is the norm of the whole gradients: cut, sharded and replicated ones each count once."""
    for ours in gloo.run(world_size, one_step, Run(parallel, 2, optim=UNCLIPPED)):
        whole = torch.cat([gradient.flatten() for gradient in ours["gradients"].values()])
        assert ours["norm"] == pytest.approx(whole.norm().item(), rel=1e-12)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_does_not_change_the_scale(gloo: GlooPool, micro: int) -> None:
    """Four, two or one micro-batch a rank; with the load of the step before, balance loss included."""
    run = Run(ParallelConfig(tp=2, ep=2), micro, optim=UNCLIPPED)
    expected = gloo.run(1, one_step, run.reference())[0]
    ours = gloo.run(4, one_step, run)[0]
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-9, atol=1e-13)


def local_parameters(run: Run) -> dict[str, Tensor]:
    """After three steps: this rank's own copy of what tp ranks hold in common, and everything gathered."""
    engine = build_engine(run)
    for step in range(3):
        engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-2)
    return store.gather(engine.model)


def test_copies_on_tp_ranks_stay_equal(gloo: GlooPool) -> None:
    """Routers, norms and biases see other tokens on every rank, and are the same bits after three steps."""
    run = Run(ParallelConfig(tp=2, ep=2), 2, "fp32")
    first, *others = gloo.run(4, local_parameters, run)
    start = gloo.run(1, initial_weights, run.reference())[0]
    for name, weight in first.items():
        assert not torch.equal(weight, start[name]), f"{name} was not trained"
        assert all(torch.equal(weight, other[name]) for other in others), name


def run_with_equal_draws(run: Run) -> dict[str, Any]:
    """Every tp rank draws as the first does: the mistake that `sequence_slice` prevents."""

    def first_slice(x_BS: Tensor, mesh: ParallelMesh) -> Tensor:
        return x_BS.chunk(mesh.size("tp"), dim=1)[0]

    sliced = base.sequence_slice
    base.sequence_slice = first_slice
    try:
        return run_steps(run)
    finally:
        base.sequence_slice = sliced


def test_tp_ranks_do_not_draw_equal_samples(gloo: GlooPool) -> None:
    """Draws belong to tokens: with another rank's, other experts are sampled, and the comparison notices."""
    run = Run(ParallelConfig(tp=2), 8, model=MODEL)
    expected = reference(gloo, run)
    compare(gloo.run(2, run_steps, run)[0], expected, 1e-10)
    with pytest.raises(AssertionError, match="another expert was sampled"):
        compare(gloo.run(2, run_with_equal_draws, run)[0], expected, 1e-10)
