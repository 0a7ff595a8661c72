"""Passes over weights and gradients that a step must not make: casts, additions outside of the kernels, multiplications by one.

Counted over whole steps of several micro-batches, by shape.
"""

import collections
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import MODEL, OPTIM, SEQUENCES, Run, assert_same_run, build_engine, capture_gradients, micro_batches, run_steps
from counting import Call, Counting, waits
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig
from megagrin.models.transformer import ModelConfig

ONE = ParallelConfig()
SIZES = replace(MODEL, vocab_size=71, d_ff=28, n_experts=8)
BF16, FP32 = torch.bfloat16, torch.float32


def matrices(model: ModelConfig) -> dict[str, int]:
    """Elements of matrices, by name; a micro-batch's activations have as many as those of keys and values, which are left out."""
    query = model.n_heads * model.head_dim
    expert = model.n_experts * model.d_ff * model.d_model
    return {
        "q and o": query * model.d_model,
        "gate_up": 2 * expert,
        "down": expert,
        "embedding and head": model.vocab_size * model.d_model,
    }


def steps(run: Run, count: int = 3) -> list[list[Call]]:
    """Operators of each step of a fresh engine."""
    engine = build_engine(run)
    found = []
    for step in range(count):
        counting = Counting()
        batches = micro_batches(run, step, engine.mesh)
        with counting:
            engine.train_step(batches, step, 1e-3)
        found.append(counting.calls)
    return found


def casts(calls: list[Call]) -> dict[int, int]:
    """fp32 tensors that were cast to bf16, by their number of elements."""
    return dict(collections.Counter(size for call in calls for size in call.casts(FP32, BF16)))


def casts_of_steps(run: Run) -> list[dict[int, int]]:
    return [casts(calls) for calls in steps(run)]


@pytest.mark.parametrize(
    "engine",
    [{"zero": 3}, {"zero": 1}, {"zero": 3, "recompute": "full"}, {"zero": 2, "recompute": "selective"}],
    ids=["zero3", "zero1", "recomputed", "selective"],
)
def test_no_weight_is_cast_twice_between_two_steps(gloo: GlooPool, engine: dict[str, Any]) -> None:
    """Eight micro-batches a step, forward and backward."""
    sizes = matrices(SIZES)
    per_step = {sizes["q and o"]: 4, sizes["gate_up"]: 2, sizes["down"]: 2}
    of_steps = gloo.run(1, casts_of_steps, Run(dtype="bf16", micro=1, model=SIZES, engine=engine))[0]
    for of_step in of_steps:
        assert {size: of_step.get(size) for size in per_step} == per_step
        # Both matrices once; the head's gradient, too, is of that size and rounded once a micro-batch.
        assert of_step[sizes["embedding and head"]] == 2 + SEQUENCES


def test_without_copies_each_pass_casts(gloo: GlooPool) -> None:
    """What the switch switches; and that the count above can count."""
    sizes = matrices(SIZES)
    run = Run(dtype="bf16", micro=1, model=SIZES, engine={"weight_copies": False})
    for of_step in gloo.run(1, casts_of_steps, run)[0]:
        assert of_step[sizes["gate_up"]] == of_step[sizes["down"]] == 2 * SIZES.n_layers * SEQUENCES
        assert of_step[sizes["q and o"]] == 4 * 2 * SEQUENCES


ADDITIONS = ("add", "add_", "_foreach_add", "_foreach_add_", "sum")


def additions(run: Run) -> list[tuple[str, tuple[int, ...]]]:
    """Additions of tensors of the shape of this rank's expert gradients, in steps of several micro-batches."""
    model, found = run.model, []
    local = model.n_experts // run.parallel.ep
    shapes = {(local, 2 * model.d_ff, model.d_model), (local, model.d_model, model.d_ff)}
    for calls in steps(run, 2):
        for call in calls:
            hit = [shape for shape, _ in call.given if shape in shapes]
            if hit and call.name.rpartition(".")[2] in ADDITIONS:
                found.append((call.name, hit[0]))
    return found


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(1, Run(dtype="bf16"), id="bf16"),
        pytest.param(1, Run(dtype="fp32", engine={"zero": 1}), id="fp32"),
        pytest.param(1, Run(dtype="bf16", engine={"recompute": "full"}), id="recomputed"),
        pytest.param(2, Run(ParallelConfig(ep=2), dtype="bf16"), id="ep2"),
        pytest.param(2, Run(ParallelConfig(ep=2, ep_chunks=2), dtype="bf16"), id="ep2-chunks"),
        pytest.param(2, Run(ONE, dtype="bf16", engine={"zero": 1}), id="shared-zero1"),
        pytest.param(2, Run(ParallelConfig(pp=2), dtype="bf16"), id="pipeline"),
    ],
)
def test_kernels_add_the_gradients_of_experts(gloo: GlooPool, world_size: int, run: Run) -> None:
    """The reference kernel adds expert by expert, in place: no addition has the shape of the whole."""
    assert gloo.run(world_size, additions, run) == [[]] * world_size


def test_an_addition_by_autograd_would_be_counted(gloo: GlooPool) -> None:
    """A zero-bubble pipeline needs each micro-batch's gradient by itself, see `megagrin.parallel.expert_weights`."""
    run = Run(ParallelConfig(pp=2, pp_schedule="zero_bubble"), dtype="fp32")
    assert all(found for found in gloo.run(2, additions, run))


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(1, Run(ONE, 1, "fp64"), id="one"),
        pytest.param(2, Run(ParallelConfig(ep=2, ep_chunks=2), 1, "fp64"), id="ep2-chunks"),
        pytest.param(2, Run(ParallelConfig(ep=2, ep_chunks=2), 1, "fp64", engine={"recompute": "full"}), id="chunks-recomputed"),
        pytest.param(4, Run(ParallelConfig(ep=2, ep_chunks=2), 1, "fp64", engine={"zero": 2}), id="chunks-shared-zero2"),
        pytest.param(4, Run(ParallelConfig(ep=2), 1, "fp64", engine={"zero": 1}), id="shared-zero1"),
    ],
)
def test_gradients_added_in_place_are_right(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Against one process and one micro-batch: losses, every gradient, update and clip norm."""
    assert_same_run(gloo, world_size, run)


def gradients_of(run: Run) -> dict[str, torch.Tensor]:
    engine = build_engine(run)
    captured = capture_gradients(engine)
    for step in range(2):
        engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-3)
    return captured[-1]


def test_copies_change_no_bit(gloo: GlooPool) -> None:
    """They are what a cast gives, also after a step; gradients of the second step."""
    kept, cast = (
        gloo.run(1, gradients_of, Run(dtype="bf16", micro=2, engine={"weight_copies": copies}))[0] for copies in (True, False)
    )
    assert kept.keys() == cast.keys()
    assert [name for name in kept if not torch.equal(kept[name], cast[name])] == []


def shared_gradients_are_wide(run: Run) -> float:
    """Share of the numbers of an expert's gradient, reduced over two ranks, that bf16 could hold."""
    gradient = gradients_of(replace(run, engine={"zero": 1}))["layers.0.moe.experts.down_proj"]
    return (gradient == gradient.bfloat16().float()).float().mean().item()


def test_sums_of_shared_experts_stay_in_fp32(gloo: GlooPool) -> None:
    run = Run(dtype="bf16", micro=1, optim=replace(OPTIM, clip_norm=0.0))
    assert max(gloo.run(2, shared_gradients_are_wide, run)) < 0.1


def loaded_weights_are_used(run: Run) -> list[float]:
    """Losses with the weights, with others written in place, and after they were written back."""
    engine = build_engine(run)
    batch = micro_batches(run, 0, engine.mesh)
    losses = [engine.evaluate(batch)]
    weight = engine.model.layers[0].moe.experts.down_proj
    before = weight.detach().clone()
    for value in (before * 3, before):
        with torch.no_grad():
            weight.copy_(value)
        losses.append(engine.evaluate(batch))
    return losses


def test_a_copy_follows_what_is_written_into_its_weight(gloo: GlooPool) -> None:
    first, changed, back = gloo.run(1, loaded_weights_are_used, Run(dtype="bf16"))[0]
    assert first == back
    assert abs(changed - first) > 1e-4


def clippings(run: Run) -> list[int]:
    """In each step, multiplications of all gradients by one number."""
    return [sum(call.name.endswith("_foreach_mul_") and len(call.given) > 20 for call in calls) for calls in steps(run)]


def test_gradients_below_the_limit_are_not_multiplied(gloo: GlooPool) -> None:
    run = Run(dtype="fp32", micro=SEQUENCES)
    norm = gloo.run(1, run_steps, replace(run, steps=1))[0]["norms"][0]
    for limit, passes in ((1e6, 0), (1.001 * norm, 0), (0.999 * norm, 1), (1e-3, 1), (0.0, 0)):
        run = replace(run, optim=replace(OPTIM, clip_norm=limit))
        assert gloo.run(1, clippings, run)[0][0] == passes, limit


def waits_of_a_step(run: Run) -> list[list[str]]:
    engine = build_engine(run)
    found = []
    for step in range(2):
        batches = micro_batches(run, step, engine.mesh)
        with Counting(), waits() as names:
            engine.train_step(batches, step, 1e-3)
        found.append(list(names))
    return found


@pytest.mark.parametrize(("world_size", "parallel"), [(1, ONE), (2, ParallelConfig(ep=2))], ids=["one", "ep2"])
def test_the_host_waits_for_the_device_where_it_must(gloo: GlooPool, world_size: int, parallel: ParallelConfig) -> None:
    """Labels at the start, the norm before the weights change, one vector at the end; sizes of each layer's exchange."""
    run = Run(parallel, micro=1, dtype="fp32")
    micro = SEQUENCES // world_size
    layers = run.model.n_layers * micro if parallel.ep > 1 else 0
    for found in gloo.run(world_size, waits_of_a_step, run):
        for of_step in found:
            assert of_step == ["tolist", *["tolist"] * layers, "item", "tolist"]


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x), lambda x: bool(x.any()), lambda x: x.unique()],
)
def test_a_wait_is_seen(wait: Callable[[torch.Tensor], Any]) -> None:
    x = torch.arange(3)
    with Counting(), waits() as names:
        x[x.clamp(max=1)].repeat_interleave(2)
    assert names == []
    with Counting(), waits() as names:
        wait(x)
    assert len(names) == 1


def gradients_with_frozen_matrix(run: Run) -> list[bool]:
    engine = build_engine(run)
    experts = engine.model.layers[0].moe.experts
    experts.down_proj.requires_grad_(False)
    for index, batch in enumerate(micro_batches(run, 0, engine.mesh)):
        output = engine.model(batch.tokens_BS, batch.labels_BS)
        output.loss_sum.backward()
        assert index < SEQUENCES
    return [experts.gate_up_proj.grad is not None, experts.down_proj.grad is None]


def test_a_frozen_matrix_gets_no_gradient(gloo: GlooPool) -> None:
    assert gloo.run(1, gradients_with_frozen_matrix, Run(dtype="fp32"))[0] == [True, True]


# Bytes for each weight that an operator over whole matrices of experts reads and writes: the table of docs/kernels.md.
PASSES = {"aten._foreach_norm": 4, "aten._foreach_mul_": 8, "aten._fused_adamw_": 28, "aten.copy_": 6}


def whole_passes(run: Run) -> list[dict[str, int]]:
    """In each step, by operator: the layers' expert matrices that it takes as a whole, not expert by expert as products do."""
    model = run.model
    shapes = {(model.n_experts, 2 * model.d_ff, model.d_model), (model.n_experts, model.d_model, model.d_ff)}
    found = []
    for calls in steps(run, 2):
        touched: collections.Counter[str] = collections.Counter()
        for call in calls:
            touched[call.name] += any(shape in shapes for shape, _ in (*call.given, *call.made))
        found.append({name: count for name, count in touched.items() if count})
    return found


@pytest.mark.parametrize("micro", [1, SEQUENCES], ids=["8micro", "1micro"])
@pytest.mark.parametrize("clip_norm", [1e-3, 1e6], ids=["clipped", "free"])
def test_operators_over_all_weights_of_a_step(gloo: GlooPool, micro: int, clip_norm: float) -> None:
    """The norm, clipping where it does something, AdamW, and one refreshed copy of each matrix; whatever the micro-batches."""
    run = Run(dtype="bf16", micro=micro, optim=replace(OPTIM, clip_norm=clip_norm))
    expected = dict.fromkeys(PASSES, 1) | {"aten.copy_": 2 * run.model.n_layers}
    if clip_norm > 1:
        del expected["aten._foreach_mul_"]
    _, second = gloo.run(1, whole_passes, run)[0]
    assert second == expected
    # The columns of the table that a step has once: 6 for the copy, 4 for the norm, 0 or 8 for clipping, 28 for AdamW.
    assert sum(PASSES[name] for name in second) == 38 + 8 * (clip_norm < 1)
