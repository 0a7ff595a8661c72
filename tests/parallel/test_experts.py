"""Experts split over ep and cut over etp, folded with tensor parallelism of the rest; the exchange in overlapping chunks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import MODEL, STEPS, Run, assert_same_run, reference, run_forced, run_steps
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig

FOLDED = ParallelConfig(tp=2, ep=2, etp=2)
LONG = pytest.mark.long
SHORT = [
    pytest.param(2, ParallelConfig(etp=2), 4, MODEL, id="etp2"),
    pytest.param(4, ParallelConfig(etp=4), 2, MODEL, id="etp4", marks=LONG),
    pytest.param(4, ParallelConfig(etp=2), 1, MODEL, id="etp2-edp2-accumulation", marks=LONG),
    pytest.param(4, ParallelConfig(ep=2, etp=2), 2, MODEL, id="ep2-etp2"),
    pytest.param(4, ParallelConfig(tp=2, etp=2), 2, MODEL, id="tp2-etp2", marks=LONG),
    pytest.param(4, FOLDED, 4, replace(MODEL, top_k=1), id="tp2-ep2-etp2-top1"),
    pytest.param(2, ParallelConfig(ep=2, ep_chunks=2), 4, MODEL, id="ep2-overlapped", marks=LONG),
    pytest.param(4, ParallelConfig(ep=2, ep_chunks=2), 1, MODEL, id="ep2-edp2-overlapped"),
    pytest.param(4, replace(FOLDED, ep_chunks=3), 2, replace(MODEL, top_k=4), id="tp2-ep2-etp2-overlapped-top4"),
    pytest.param(8, FOLDED, 2, MODEL, id="tp2-dp4-ep2-etp2-edp2", marks=LONG),
    pytest.param(8, ParallelConfig(tp=2, cp=2, ep=4, etp=2), 4, MODEL, id="tp2-cp2-ep4-etp2", marks=LONG),
    pytest.param(8, ParallelConfig(tp=2, ep=2, etp=2, dp_replicate=2), 2, MODEL, id="tp2-ep2-etp2-hybrid", marks=LONG),
]


@pytest.mark.parametrize(("world_size", "parallel", "micro", "model"), SHORT)
def test_same_run(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, model: Any) -> None:
    assert_same_run(gloo, world_size, Run(parallel, micro, model=model))


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp64", marks=LONG)])
def test_same_run_over_20_steps(gloo: GlooPool, dtype: str) -> None:
    assert_same_run(gloo, 4, Run(FOLDED, 2, dtype, STEPS))


@pytest.mark.parametrize(
    "engine",
    [
        {"zero": 3},
        pytest.param({"zero": 1}, marks=LONG),
        {"recompute": "full"},
        {"recompute": "selective", "recompute_parts": ("expert_mlp", "router")},
    ],
    ids=str,
)
def test_overlapped_with_sharding_and_recompute(gloo: GlooPool, engine: dict[str, Any]) -> None:
    """Weights gathered anew in backward, or kept; blocks that exchange again in backward, or only compute again."""
    assert_same_run(gloo, 4, Run(ParallelConfig(ep=2, ep_chunks=2), 2, engine=engine))


@pytest.mark.parametrize("experts", [[5, 4], [0, 7], [3, 2]], ids=["second-rank-only", "both-ends", "first-rank-only"])
@pytest.mark.parametrize(
    "parallel", [replace(FOLDED, ep_chunks=2), ParallelConfig(tp=2, etp=4)], ids=["folded-overlapped", "tp2-etp4"]
)
def test_empty_experts_and_ranks(gloo: GlooPool, experts: list[int], parallel: ParallelConfig) -> None:
    """All tokens to two experts: whole ep ranks receive nothing and share nothing with their etp group."""
    run = Run(parallel)
    alone = gloo.run(1, run_forced, run.reference(), experts)[0]
    for ours in gloo.run(4, run_forced, run, experts):
        assert torch.equal(ours["counts"], alone["counts"])
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert ours["norm"] == pytest.approx(alone["norm"], rel=1e-11)
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-9, atol=1e-14)


def test_bf16(gloo: GlooPool) -> None:
    """Experts' gradients arrive in fp32 whether FSDP2 shards them (edp 2) or not (edp 1)."""
    for ranks, parallel in ((4, ParallelConfig(ep=2, etp=2)), (4, ParallelConfig(etp=2))):
        run = Run(parallel, 2, "bf16", 2)
        narrow, exact = reference(gloo, run), reference(gloo, replace(run, dtype="fp32"))
        ours = gloo.run(ranks, run_steps, run)[0]
        assert all(gradient.dtype == torch.float32 for gradient in ours["gradients"].values())
        assert abs(ours["losses"][0] / narrow["losses"][0] - 1) < 1e-3
        assert abs(ours["norms"][0] / exact["norms"][0] - 1) < 0.1
