"""Pipeline parallelism: the split, its rules, and what the layouts of test_matrix do not show."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BALANCE, MODEL, SEQUENCES, Run, assert_same_run, build_engine, micro_batches
from helpers import GlooPool
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.distributed.mesh import ParallelConfig
from megagrin.kernels import moe_mlp
from megagrin.models.grin import PRESETS
from megagrin.parallel.pipeline import balanced_split, bubble_over_work, describe_parts, stage_parts


def _best_maximum(costs: list[float], parts: int) -> float:
    if parts == 1:
        return sum(costs)
    return min(max(sum(costs[:cut]), _best_maximum(costs[cut:], parts - 1)) for cut in range(1, len(costs) - parts + 2))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_split_is_optimal(costs: list[int], data: st.DataObject) -> None:
    """No other cut into consecutive, non-empty parts has a cheaper dearest part: compared with all of them."""
    parts = data.draw(st.integers(1, len(costs)))
    sizes = balanced_split([float(cost) for cost in costs], parts)
    assert len(sizes) == parts
    assert min(sizes) >= 1
    assert sum(sizes) == len(costs)
    ends = [sum(sizes[: part + 1]) for part in range(parts)]
    dearest = max(sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True))
    assert dearest == _best_maximum([float(cost) for cost in costs], parts)


def test_head_counts_as_work() -> None:
    """A head of a third of a layer leaves the last stage shorter where layers are few, and every layer is in one stage."""
    model = PRESETS["grin_16x3_8b"]
    parts = stage_parts(model, ParallelConfig(pp=8))
    assert [layer for part in parts for layer in part.layers] == list(range(model.n_layers))
    assert [part.embed for part in parts] == [True] + [False] * 7
    assert [part.head for part in parts] == [False] * 7 + [True]
    assert describe_parts(parts).startswith("embed, 0-")
    small = replace(MODEL, n_layers=4, vocab_size=5000)
    assert len(stage_parts(small, ParallelConfig(pp=2))[1].layers) < 2
    assert [len(part.layers) for part in stage_parts(small, ParallelConfig(pp=3, pp_split=(2, 2, 0)))] == [2, 2, 0]


def test_bubble() -> None:
    """(p − 1)/m, divided by the stages a rank, and by three with weight gradients apart."""
    assert bubble_over_work(ParallelConfig(pp=4), 12) == pytest.approx(0.25)
    interleaved = ParallelConfig(pp=4, pp_schedule="interleaved_1f1b", pp_stages_per_rank=2)
    assert bubble_over_work(interleaved, 12) == pytest.approx(0.125)
    assert bubble_over_work(replace(interleaved, pp_schedule="zero_bubble"), 12) == pytest.approx(0.125 / 3)


@pytest.mark.parametrize(
    ("options", "micro_batches", "rule"),
    [
        ({"pp": 4}, 3, "parallel.pp: 4 with parallel.pp_schedule 1f1b must not exceed the 3 micro-batches"),
        ({"pp": 2, "pp_stages_per_rank": 2}, 4, "parallel.pp_stages_per_rank: 2 must be 1"),
        ({"pp": 2, "pp_schedule": "interleaved_1f1b"}, 4, "parallel.pp_stages_per_rank: 1 must be at least 2"),
        ({"pp_split": (1, 1)}, 4, "parallel.pp_split: (1, 1) needs parallel.pp above 1"),
        ({"pp": 2, "pp_split": (1, 2)}, 4, "parallel.pp_split: [1, 2] must add up to model.n_layers (2)"),
        ({"pp": 2, "pp_split": (2,)}, 4, "must have a number for each of the 2 stages"),
        ({"pp": 5}, 8, "must not exceed model.n_layers + 2 (4"),
        ({"pp": 2, "pp_schedule": "zero_bubble"}, 5, "must be a multiple of the rounds (2)"),
    ],
)
def test_rules(options: dict[str, Any], micro_batches: int, rule: str) -> None:
    """Field, value and rule."""
    assert any(rule in line for line in ParallelConfig(**options).pipeline_violations(MODEL.n_layers, micro_batches))


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        pytest.param(3, {"pp": 3}, id="head-alone"),
        pytest.param(2, {"pp": 2, "pp_split": (0, 2)}, id="embedding-alone"),
        pytest.param(2, {"pp": 2, "pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2}, id="ends-alone"),
    ],
)
def test_uneven_stages(gloo: GlooPool, ranks: int, degrees: dict[str, Any]) -> None:
    """Stages without layers, more micro-batches than stages."""
    assert_same_run(gloo, ranks, Run(ParallelConfig(**degrees), 1, steps=2))


def test_balance_loss_reaches_every_stage(gloo: GlooPool) -> None:
    """With a coefficient that rules the routers' gradients; without the loss on the first stage they would be others."""
    run = Run(ParallelConfig(pp=2), 2, steps=2, balance=replace(BALANCE, coef=1.0))
    assert_same_run(gloo, 2, run)
    without = replace(run, balance=replace(BALANCE, coef=0.0))
    with pytest.raises(AssertionError):
        _compare_gradients(gloo, run, without)


def _compare_gradients(gloo: GlooPool, run: Run, other: Run) -> None:
    ours, theirs = (gloo.run(2, router_gradients, case)[0] for case in (run, other))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=0)


def router_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of this rank's routers in the second step: the first one counts as balanced, where the loss has no gradient."""
    engine = build_engine(run)
    held: dict[str, torch.Tensor] = {}

    def capture(*_: Any) -> None:
        for name, parameter in engine.model.named_parameters():
            if "router" in name and parameter.grad is not None:
                held[name] = parameter.grad.clone()

    engine.optimizer.register_step_pre_hook(capture)
    for step in range(2):
        engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-3)
    return held


def expert_products(run: Run) -> dict[str, int]:
    """Products of experts' backward passes in a step of this rank."""
    engine = build_engine(run)
    calls = dict.fromkeys(["m_grouped_dgrad", "k_grouped_wgrad"], 0)
    kept = {name: getattr(moe_mlp, name) for name in calls}

    def counted(name: str) -> Any:
        def product(*args: Any) -> torch.Tensor:
            calls[name] += 1
            return kept[name](*args)

        return product

    for name in calls:
        setattr(moe_mlp, name, counted(name))
    engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
    for name in calls:
        setattr(moe_mlp, name, kept[name])
    return calls


@pytest.mark.parametrize(
    "engine", [{}, {"recompute": "selective", "recompute_parts": ("expert_mlp",)}], ids=["kept", "recomputed"]
)
def test_zero_bubble_does_no_product_twice(gloo: GlooPool, engine: dict[str, Any]) -> None:
    """Input gradients first, weight gradients later, and the products of one backward pass in both together."""
    model = replace(MODEL, n_layers=4)
    several = ParallelConfig(pp=2, pp_schedule="interleaved_1f1b", pp_stages_per_rank=2)
    expected = gloo.run(2, expert_products, Run(several, 2, model=model, engine=engine))
    assert all(min(calls.values()) > 0 for calls in expected)
    assert (
        gloo.run(2, expert_products, Run(replace(several, pp_schedule="zero_bubble"), 2, model=model, engine=engine)) == expected
    )


def save_after_step(run: Run, folder: str) -> float:
    """Train a step, save, and evaluate."""
    engine = build_engine(run)
    engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
    info = CheckpointInfo(1, SEQUENCES, {})
    store.save(Path(folder), engine.state(), info)
    return engine.evaluate(micro_batches(run, 1, engine.mesh))


def load_and_continue(run: Run, folder: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Evaluate what another layout saved, train on, and return the weights."""
    engine = build_engine(run)
    engine.load(store.find(Path(folder)), 1)
    held = store.gather(engine.model, engine.mesh.group("pp"))
    valid = engine.evaluate(micro_batches(run, 1, engine.mesh))
    return valid, engine.train_step(micro_batches(run, 1, engine.mesh), 1, 1e-3).loss, held


def test_checkpoints_move_between_pipelines(gloo: GlooPool, tmp_path: Path) -> None:
    """Saved on pp 2 × ep 2, read on one rank, on pp 3 and on pp 2 with two stages a rank: the same weights bit for bit."""
    saved = Run(ParallelConfig(pp=2, ep=2), 2)
    valid = gloo.run(4, save_after_step, saved, str(tmp_path))
    assert max(valid) == min(valid)
    interleaved = ParallelConfig(pp=2, pp_schedule="interleaved_1f1b", pp_stages_per_rank=2)
    weights: dict[str, torch.Tensor] = {}
    for ranks, run in [(1, Run(micro=SEQUENCES)), (3, Run(ParallelConfig(pp=3), 2)), (2, Run(interleaved, 2))]:
        for again, loss, held in gloo.run(ranks, load_and_continue, run, str(tmp_path)):
            assert again == pytest.approx(valid[0], rel=1e-11)
            weights = weights or held
            assert held.keys() == weights.keys()
            assert all(torch.equal(held[name], weights[name]) for name in weights)
            assert loss == loss
