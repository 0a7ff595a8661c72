"""What a step finds: the weights as they are, whoever changed them, and nothing of a step that did not come to its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import Run, build_engine, micro_batches
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig
from megagrin.engines.native import NativeEngine
from megagrin.parallel.expert import moe_layers

Change = Callable[[torch.nn.Parameter], None]


def in_place(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def by_data(parameter: torch.nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def evaluate(engine: NativeEngine, batches: list[Any]) -> float:
    """A good one, and one that is refused after its passes."""
    loss = engine.evaluate(batches)
    with pytest.raises(ValueError, match="no token of the evaluation has a label"):
        engine.evaluate([replace(batch, labels_BS=torch.full_like(batch.labels_BS, -100)) for batch in batches])
    return loss


def model_loss(engine: NativeEngine, batch: Any) -> float:
    """Of the model itself, as a tool would call it between two steps; what FSDP2 has gathered is freed again."""
    with torch.no_grad():
        loss = engine.model(batch.tokens_BS, batch.labels_BS).loss_sum.item()
    engine.state()
    return loss


def after_changes(run: Run, change: Change) -> list[float]:
    """Losses of the model, of an evaluation and of a step, each after weights were changed; a step came first."""
    engine = build_engine(run)
    of_step = [micro_batches(run, step, engine.mesh) for step in range(4)]
    found = [engine.train_step(of_step[0], 0, 1e-2).loss, model_loss(engine, of_step[1][0])]
    for measure in (lambda: evaluate(engine, of_step[2]), lambda: engine.train_step(of_step[3], 1, 1e-2).grad_norm):
        for parameter in engine.parameters:
            change(parameter)
        found.append(measure())
    return found


@pytest.mark.parametrize("change", [in_place, by_data])
def test_weights_changed_from_outside_are_not_taken_from_a_copy(gloo: GlooPool, change: Change) -> None:
    run = Run(dtype="bf16")
    without = replace(run, engine={"weight_copies": False})
    assert gloo.run(1, after_changes, run, change) == gloo.run(1, after_changes, without, change)


class _BrokenError(Exception):
    pass


@contextmanager
def broken(engine: NativeEngine, call: int) -> Iterator[None]:
    """The last layer's router fails in its `call`-th forward pass from now, on every rank."""
    router, calls = moe_layers(engine.model)[-1].router, 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _BrokenError

    handle = router.register_forward_pre_hook(fail)
    with pytest.raises(_BrokenError):
        yield
    handle.remove()


def steps_after_a_broken_one(run: Run, breaks: bool) -> list[Any]:
    engine = build_engine(run)
    of_step = [micro_batches(run, step, engine.mesh) for step in range(3)]
    found = [engine.train_step(of_step[0], 0, 1e-2)]
    if breaks:
        with broken(engine, call=3):
            engine.train_step(of_step[1], 1, 1e-2)
    found += [engine.train_step(of_step[step], step, 1e-2) for step in (1, 2)]
    return [(result.loss, result.grad_norm, result.counts_LE.tolist()) for result in found]


def test_nothing_is_left_of_a_step_that_failed(gloo: GlooPool) -> None:
    """Where nothing is gathered: it fails in the third of several micro-batches, and the same step is made again."""
    run = Run(dtype="fp32")
    assert gloo.run(1, steps_after_a_broken_one, run, True) == gloo.run(1, steps_after_a_broken_one, run, False)


def refusals(run: Run, in_evaluation: bool) -> list[str]:
    engine = build_engine(run)
    batches = micro_batches(run, 0, engine.mesh)
    engine.evaluate(batches)
    engine.train_step(batches, 0, 1e-2)
    with broken(engine, call=2):
        engine.evaluate(batches) if in_evaluation else engine.train_step(batches, 1, 1e-2)
    messages = []
    for call in (lambda: engine.train_step(batches, 1, 1e-2), lambda: engine.evaluate(batches), engine.state):
        with pytest.raises(RuntimeError, match="build the engine anew and load a checkpoint") as caught:
            call()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(1, Run(dtype="bf16"), id="alone"),
        pytest.param(2, Run(dtype="fp64", engine={"zero": 1}), id="zero1"),
        pytest.param(2, Run(ParallelConfig(ep=2, ep_chunks=2), dtype="bf16"), id="ep2-chunks"),
    ],
)
@pytest.mark.parametrize("in_evaluation", [False, True], ids=["step", "evaluation"])
def test_a_torn_pass_is_not_built_upon(gloo: GlooPool, world_size: int, run: Run, in_evaluation: bool) -> None:
    """Neither trained on nor saved: weights would be of two steps, and gradients in part of a step that was not made."""
    assert len(gloo.run(world_size, refusals, run, in_evaluation)) == world_size
