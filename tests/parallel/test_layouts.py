"""The same run on data-parallel and expert-parallel layouts: losses, gradients and clip norm of sampled routing."""

from dataclasses import replace

import pytest
import torch
from common import (
    BALANCE,
    MODEL,
    ROUTER,
    SEQ,
    SEQUENCES,
    STEPS,
    Run,
    assert_same_run,
    compare,
    initial_weights,
    reference,
    run_forced,
    run_steps,
)
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig

EP2 = ParallelConfig(ep=2)
LAYOUTS = [  # (ranks, degrees, sequences a micro-batch)
    pytest.param(1, ParallelConfig(), 2, id="accumulation"),
    pytest.param(2, ParallelConfig(), 4, id="dp2"),
    pytest.param(2, EP2, 4, id="ep2"),
    pytest.param(4, EP2, 2, id="ep2-edp2"),
    pytest.param(4, ParallelConfig(ep=4), 1, id="ep4-accumulation"),
]


LONG = (pytest.mark.slow, pytest.mark.long)
LENGTHS = [("fp32", 5), ("fp64", 10), *(pytest.param(dtype, STEPS, marks=LONG) for dtype in ("fp32", "fp64"))]


@pytest.mark.parametrize(("dtype", "steps"), LENGTHS)
@pytest.mark.parametrize(("world_size", "parallel", "micro"), LAYOUTS)
def test_same_run_on_every_layout(
    gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, dtype: str, steps: int
) -> None:
    """Losses, every gradient, the clip norm and the sampled experts of every step."""
    assert_same_run(gloo, world_size, Run(parallel, micro, dtype, steps))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["sparsemixer_v2_star", "gshard"])
def test_other_routers_and_k(gloo: GlooPool, kind: str, top_k: int) -> None:
    """EP 2 × DP 2 for the other estimators, top-1 and top-3."""
    run = Run(EP2, 2, model=replace(MODEL, top_k=top_k), router=replace(ROUTER, kind=kind))  # type: ignore[arg-type]
    assert_same_run(gloo, 4, run)


def test_dense_model_and_kept_parameters(gloo: GlooPool) -> None:
    """The dense twin, with gathered parameters kept between forward and backward."""
    run = Run(model=replace(MODEL, n_experts=0, top_k=1), engine={"zero": 2})
    assert_same_run(gloo, 4, run)


def test_documents(gloo: GlooPool) -> None:
    """Several documents in a sequence."""
    assert_same_run(gloo, 4, Run(EP2, 1, documents=True))


def test_global_scope_counts_over_ranks(gloo: GlooPool) -> None:
    """Scope `global` without accumulation sees the whole batch, as one process does; `local` does not."""
    whole = Run(EP2, 2, balance=replace(BALANCE, scope="global", coef=1.0))
    assert_same_run(gloo, 4, whole)
    local = gloo.run(4, run_steps, replace(whole, balance=replace(whole.balance, scope="local")))[0]
    with pytest.raises(AssertionError):
        compare(local, reference(gloo, whole), 1e-10)


def test_bf16_follows_fp32(gloo: GlooPool) -> None:
    """bf16 compute with fp32 masters: ranks agree with one process far better than bf16 agrees with fp32."""
    run = Run(EP2, 2, "bf16", 2)
    narrow, exact = reference(gloo, run), reference(gloo, replace(run, dtype="fp32"))
    ours = gloo.run(4, run_steps, run)[0]
    assert all(weight.dtype == torch.float32 for weight in ours["weights"].values())
    assert all(gradient.dtype == torch.float32 for gradient in ours["gradients"].values())
    assert abs(ours["losses"][0] / narrow["losses"][0] - 1) < 1e-4
    assert 0 < abs(narrow["losses"][0] / exact["losses"][0] - 1) < 1e-2


@pytest.mark.parametrize("micro", [2, 1])
def test_bf16_gradients_follow_fp32(gloo: GlooPool, micro: int) -> None:
    """Every gradient, accumulated or not, where rounding cannot flip a draw: one flip moves an expert's gradient as a whole."""
    run = Run(EP2, micro, "bf16", 1, router=replace(ROUTER, forced_balance=True))
    exact = reference(gloo, replace(run, dtype="fp32"))
    ours = gloo.run(4, run_steps, run)[0]
    assert torch.equal(ours["counts"], exact["counts"])
    for name, gradient in exact["gradients"].items():
        if "k_proj.bias" not in name:  # nothing but rounding in exact arithmetic
            error = (ours["gradients"][name][0] - gradient[0]).norm()
            assert 0 < error < 0.05 * gradient[0].norm(), name


@pytest.mark.parametrize("experts", [[5, 4], [0, 7], [3, 2]], ids=["second-rank-only", "both-ends", "first-rank-only"])
@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 4), (4, 2)])
def test_empty_experts_and_ranks(gloo: GlooPool, experts: list[int], world_size: int, ep: int) -> None:
    """All tokens to two experts: nothing is dropped, six experts and whole ranks stay empty, nothing hangs."""
    run = Run(ParallelConfig(ep=ep))
    alone = gloo.run(1, run_forced, run.reference(), experts)[0]
    assert alone["counts"][0].tolist() == [SEQUENCES * SEQ * (expert in experts) for expert in range(8)]
    for ours in gloo.run(world_size, run_forced, run, experts):
        assert torch.equal(ours["counts"], alone["counts"])
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert ours["norm"] == pytest.approx(alone["norm"], rel=1e-11)
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-9, atol=1e-14)
    for name in ("gate_up_proj", "down_proj"):
        gradient = alone["gradients"][f"layers.0.moe.experts.{name}"]
        assert [bool(gradient[expert].abs().sum() > 0) for expert in range(8)] == [expert in experts for expert in range(8)]


def test_initial_weights_do_not_depend_on_layout(gloo: GlooPool) -> None:
    """Bit for bit, with experts over both axes and a vocabulary that divides by no number of ranks."""
    alone = gloo.run(1, initial_weights, Run(dtype="fp32"))[0]
    for world_size, ep in [(2, 2), (4, 2), (3, 1)]:
        for weights in gloo.run(world_size, initial_weights, Run(ParallelConfig(ep=ep), dtype="fp32")):
            assert weights.keys() == alone.keys()
            assert all(torch.equal(weights[name], alone[name]) for name in alone)
