"""The same run under tensor and sequence parallelism: losses, gradients, clip norm; vocabularies that do not divide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import MODEL, SEQ, STEPS, Run, assert_same_run, build_engine, initial_weights, micro_batches, reference, run_steps
from helpers import GlooPool
from torch import Tensor
from torch.distributed.tensor import Shard

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.data.loader import DataConfig
from megagrin.distributed.mesh import ParallelConfig
from megagrin.optim.schedule import learning_rate
from megagrin.parallel.tensor import shard_rows
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, TrainConfig

HEADS4 = replace(MODEL, n_kv_heads=4)  # the key-value heads allow tp 4
DENSE = replace(MODEL, n_experts=0, top_k=1)
UNBIASED = replace(MODEL, attention_bias=False, lm_head_bias=False)
THREE = replace(HEADS4, vocab_size=3)  # over 4 ranks: one has nothing
MORE = pytest.mark.long
LONG = [  # (ranks, degrees, sequences a micro-batch), 20 steps
    pytest.param(2, ParallelConfig(tp=2), 4, id="tp2"),
    pytest.param(4, ParallelConfig(tp=2, ep=2), 2, id="tp2-dp2-ep2", marks=MORE),
]
SHORT = [
    pytest.param(4, ParallelConfig(tp=4), 8, HEADS4, id="tp4"),
    pytest.param(4, ParallelConfig(tp=2), 1, MODEL, id="tp2-dp2-accumulation"),
    pytest.param(4, ParallelConfig(tp=4, ep=4), 2, HEADS4, id="tp4-ep4", marks=MORE),
    pytest.param(4, ParallelConfig(tp=2, ep=4), 2, replace(MODEL, top_k=1), id="tp2-dp2-ep4-top1", marks=MORE),
    pytest.param(2, ParallelConfig(tp=2, ep=2), 4, replace(MODEL, top_k=4), id="tp2-ep2-top4"),
    pytest.param(4, ParallelConfig(tp=4), 4, replace(DENSE, n_kv_heads=4), id="dense-tp4"),
    pytest.param(4, ParallelConfig(tp=2), 2, DENSE, id="dense-tp2-dp2", marks=MORE),
    pytest.param(2, ParallelConfig(tp=2), 4, replace(MODEL, attention_bias=False, lm_head_bias=False), id="plain", marks=MORE),
    pytest.param(4, ParallelConfig(tp=4), 8, THREE, id="tp4-rank-without-vocabulary"),
    pytest.param(4, ParallelConfig(tp=2, dp_replicate=2), 2, MODEL, id="tp2-hybrid", marks=MORE),
    pytest.param(4, ParallelConfig(tp=2, cp=2), 4, MODEL, id="tp2-cp2"),
    pytest.param(8, ParallelConfig(tp=4, ep=2), 4, THREE, id="tp4-dp2-ep2-rank-without-vocabulary", marks=MORE),
    pytest.param(8, ParallelConfig(tp=2, ep=4, dp_replicate=2), 2, MODEL, id="tp2-dp4-ep4-hybrid", marks=MORE),
]


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.long), "fp64"])
@pytest.mark.parametrize(("world_size", "parallel", "micro"), LONG)
def test_same_run_over_20_steps(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, dtype: str) -> None:
    assert_same_run(gloo, world_size, Run(parallel, micro, dtype, STEPS))


@pytest.mark.parametrize(("world_size", "parallel", "micro", "model"), SHORT)
def test_same_run(gloo: GlooPool, world_size: int, parallel: ParallelConfig, micro: int, model: Any) -> None:
    assert_same_run(gloo, world_size, Run(parallel, micro, model=model))


def test_documents(gloo: GlooPool) -> None:
    """Labels, positions and documents stay whole in a tp group; sequences without any label."""
    assert_same_run(gloo, 4, Run(ParallelConfig(tp=2), 2, documents=True, ignored=4))


def test_bf16(gloo: GlooPool) -> None:
    """bf16 compute with fp32 masters: two ranks are hardly farther from fp32 than one. Dense: no draw can flip."""
    run = Run(ParallelConfig(tp=2), 8, "bf16", 2, model=DENSE)
    narrow, exact = reference(gloo, run), reference(gloo, replace(run, dtype="fp32"))
    ours = gloo.run(2, run_steps, run)[0]
    assert all(tensor.dtype == torch.float32 for what in ("weights", "gradients") for tensor in ours[what].values())
    assert 0 < abs(ours["losses"][0] / exact["losses"][0] - 1) < 1e-2
    for name, gradient in exact["gradients"].items():
        if "k_proj.bias" not in name:
            error, alone = ((run_["gradients"][name][0] - gradient[0]).norm() / gradient[0].norm() for run_ in (ours, narrow))
            assert 0 < error < 1.5 * alone + 0.005, f"{name}: {error:.4f} from fp32, one process {alone:.4f}"


@pytest.mark.parametrize(("rows", "ranks"), [(32064, 128), (32064, 64), (67, 4), (3, 4), (5, 4), (1, 8), (9, 4)])
def test_shards_are_those_of_dtensor(rows: int, ranks: int) -> None:
    """Every row once, in the blocks that checkpoints will say a rank holds."""
    shards = [shard_rows(rows, ranks, rank) for rank in range(ranks)]
    assert [row for first, count in shards for row in range(first, first + count)] == list(range(rows))
    assert [count for _, count in shards] == [Shard.local_shard_size_and_offset(rows, ranks, rank)[0] for rank in range(ranks)]


@pytest.mark.parametrize("vocab_size", [67, 3])
def test_initial_weights(gloo: GlooPool, vocab_size: int) -> None:
    """Bit for bit those of one process."""
    run = Run(dtype="fp32", model=replace(HEADS4, vocab_size=vocab_size))
    alone = gloo.run(1, initial_weights, run)[0]
    for parallel in (ParallelConfig(tp=4, ep=2, etp=2), ParallelConfig(tp=2, ep=2)):
        for weights in gloo.run(4, initial_weights, replace(run, parallel=parallel)):
            assert weights.keys() == alone.keys()
            assert all(torch.equal(weights[name], alone[name]) for name in alone)


def train_and_save(run: Run, folder: str) -> None:
    """The first step, and a checkpoint."""
    engine = build_engine(run)
    engine.train_step(micro_batches(run, 0, engine.mesh), 0, learning_rate(run.optim, 0, run.steps))
    store.save(Path(folder), engine.state(), CheckpointInfo(1, 8, {}))


def resume(run: Run, folder: str) -> dict[str, Any]:
    """The steps behind the checkpoint."""
    engine = build_engine(run)
    engine.load(store.find(Path(folder)), 1)
    results = [
        engine.train_step(micro_batches(run, step, engine.mesh), step, learning_rate(run.optim, step, run.steps))
        for step in range(1, run.steps)
    ]
    return {"losses": [result.loss for result in results], "weights": store.gather(engine.model)}


@pytest.mark.parametrize("vocab_size", [67, pytest.param(3, marks=MORE)])
def test_checkpoints_travel_between_layouts(gloo: GlooPool, tmp_path: Path, vocab_size: int) -> None:
    """Saved on one layout, continued on another: moments, uneven and empty vocabulary shards included."""
    run = Run(model=replace(HEADS4, vocab_size=vocab_size))
    expected = reference(gloo, run)
    layouts = [(4, ParallelConfig(tp=4, ep=2)), (1, ParallelConfig()), (4, ParallelConfig(tp=2, ep=2))]
    for number, ((ranks, saved), (others, resumed)) in enumerate(zip(layouts, layouts[1:] + layouts[:1], strict=True)):
        folder = str(tmp_path / str(number))
        gloo.run(ranks, train_and_save, replace(run, parallel=saved, micro=2), folder)
        for ours in gloo.run(others, resume, replace(run, parallel=resumed, micro=2), folder):
            assert ours["losses"] == pytest.approx(expected["losses"][1:], rel=1e-10)
            for name, weight in expected["weights"].items():
                torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-8, atol=1e-11)


@torch.no_grad()
def logits(run: Run) -> tuple[Tensor, Tensor, float]:
    """Of all positions, of the last one, and the validation loss."""
    engine = build_engine(run)
    batches = micro_batches(run, 0, engine.mesh)
    tokens_BS = torch.arange(2 * SEQ).view(2, SEQ) % run.model.vocab_size
    whole = engine.model(tokens_BS).logits_BSV
    last = engine.model(tokens_BS, last_only=True).logits_BSV
    return whole, last[:, -1], engine.evaluate(batches)


@pytest.mark.parametrize("vocab_size", [67, 3])
def test_logits_and_validation_loss(gloo: GlooPool, vocab_size: int) -> None:
    run = Run(model=replace(HEADS4, vocab_size=vocab_size))
    whole, last, loss = gloo.run(1, logits, run)[0]
    torch.testing.assert_close(whole[:, -1], last, rtol=1e-10, atol=1e-12)
    for ours in gloo.run(4, logits, replace(run, parallel=ParallelConfig(tp=4))):
        torch.testing.assert_close(ours[0], whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours[1], last, rtol=1e-10, atol=1e-12)
        assert ours[2] == pytest.approx(loss, rel=1e-12)


def test_what_cannot_be_cut_is_refused() -> None:
    """Each rule names the field, its value, and what it must fit."""
    data, train = DataConfig(train="x"), TrainConfig(seq_len=14, global_batch_size=8, micro_batch_size=1)
    run = RunConfig(train=train, model=MODEL, data=data, parallel=ParallelConfig(tp=4, etp=16))
    broken = "\n".join(rules.violations(run, 16))
    assert "parallel.tp: 4 must divide model.n_kv_heads (2)" in broken
    assert "parallel.tp: 4 must divide train.seq_len (14)" in broken
    assert "parallel.etp: 16 must divide model.d_ff (24)" in broken
    run = replace(run, model=replace(DENSE, d_ff=25), parallel=ParallelConfig(tp=2), train=replace(train, global_batch_size=9))
    broken = "\n".join(rules.violations(run, 6))
    assert "parallel.tp: 2 must divide model.d_ff (25)" in broken
    assert "model.d_model: 32 must be a multiple of the ranks that shard each part of a matrix (3)" in broken
    run = replace(run, model=replace(MODEL, d_ff=25), parallel=ParallelConfig(ep=2))
    assert "model.d_model: 32 must be a multiple of the ranks that shard each expert (3)" in "\n".join(rules.violations(run, 6))
