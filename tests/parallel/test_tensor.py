"""The same run under tensor and sequence parallelism, with experts whole, split and cut: losses, gradients, clip norm."""

from dataclasses import replace

import pytest
from common import MODEL, STEPS, Run, assert_same_run
from helpers import GlooPool

from megagrin.parallel.mesh import ParallelConfig

HEADS4 = replace(MODEL, n_kv_heads=4)  # the key-value heads allow tp 4
DENSE = replace(MODEL, n_experts=0, top_k=1)
LONG = [  # (ranks, degrees, sequences a micro-batch), 20 steps
    pytest.param(2, ParallelConfig(tp=2), 4, id="tp2"),
    pytest.param(4, ParallelConfig(tp=2, ep=2), 2, id="tp2-dp2-ep2"),
]
SHORT = [
    pytest.param(4, ParallelConfig(tp=4), 8, HEADS4, id="tp4"),
    pytest.param(4, ParallelConfig(tp=2), 1, MODEL, id="tp2-dp2-accumulation"),
    pytest.param(4, ParallelConfig(tp=4, ep=4), 2, HEADS4, id="tp4-ep4"),
    pytest.param(4, ParallelConfig(tp=2, ep=4), 2, replace(MODEL, top_k=1), id="tp2-dp2-ep4-top1"),
    pytest.param(2, ParallelConfig(tp=2, ep=2), 4, replace(MODEL, top_k=4), id="tp2-ep2-top4"),
    pytest.param(4, ParallelConfig(tp=4), 4, replace(DENSE, n_kv_heads=4), id="dense-tp4"),
    pytest.param(4, ParallelConfig(tp=2), 2, DENSE, id="dense-tp2-dp2"),
    pytest.param(2, ParallelConfig(tp=2), 4, replace(MODEL, attention_bias=False, lm_head_bias=False), id="no-biases"),
    pytest.param(4, ParallelConfig(tp=4), 8, replace(HEADS4, vocab_size=3), id="tp4-rank-without-vocabulary"),
    pytest.param(4, ParallelConfig(tp=2, dp_replicate=2), 2, MODEL, id="tp2-hybrid"),
    pytest.param(8, ParallelConfig(tp=4), 4, replace(HEADS4, vocab_size=3), id="tp4-dp2-rank-without-vocabulary"),
    pytest.param(8, ParallelConfig(tp=2, ep=4, dp_replicate=2), 2, MODEL, id="tp2-dp4-ep4-hybrid"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(("world_size", "parallel", "micro"), LONG)
def test_same_run_over_20_steps(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, dtype: str) -> None:
    assert_same_run(gloo, world_size, Run(parallel, micro, dtype, STEPS))


@pytest.mark.parametrize(("world_size", "parallel", "micro", "model"), SHORT)
def test_same_run(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, model: object) -> None:
    assert_same_run(gloo, world_size, Run(parallel, micro, model=model))  # type: ignore[arg-type]
