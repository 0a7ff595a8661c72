"""What data-parallel ranks share: ZeRO-1, 2 and 3-like settings, hybrid sharding, and gradients accumulated in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from common import OPTIM, SEQUENCES, STEPS, Run, assert_same_run, build_engine, capture_gradients, micro_batches
from helpers import GlooPool
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megagrin.distributed.mesh import ParallelConfig
from megagrin.moe.balance import BalanceConfig

LONG = pytest.mark.long
DP, EP2 = ParallelConfig(), ParallelConfig(ep=2)
HYBRID = ParallelConfig(dp_replicate=2)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(2, Run(EP2, 1, "fp64", STEPS, engine={"zero": 1}), id="zero1-ep2"),
        pytest.param(2, Run(DP, 1, "fp64", engine={"zero": 1}), id="zero1-dp2"),
        pytest.param(2, Run(DP, 1, "fp64", STEPS, engine={"zero": 2}), id="zero2-dp2"),
        pytest.param(2, Run(DP, 1, "fp32", engine={"zero": 3}), id="zero3-dp2-fp32"),
        pytest.param(4, Run(EP2, 1, engine={"zero": 1}), id="zero1-dp4-ep2", marks=LONG),
        pytest.param(4, Run(EP2, 1, engine={"zero": 2}), id="zero2-dp4-ep2", marks=LONG),
        pytest.param(4, Run(EP2, 1, engine={"zero": 3}), id="zero3-dp4-ep2"),
        pytest.param(4, Run(HYBRID, 1, "fp64", STEPS, engine={"zero": 3}), id="hybrid-zero3"),
        pytest.param(4, Run(HYBRID, 1, engine={"zero": 2}), id="hybrid-zero2"),
        pytest.param(4, Run(HYBRID, 1, engine={"zero": 1}), id="hybrid-zero1"),
        pytest.param(4, Run(replace(HYBRID, ep=2), 1), id="hybrid-ep2"),
        pytest.param(8, Run(replace(HYBRID, ep=2), 1, documents=True), id="hybrid-fsdp2-ep2", marks=LONG),
        pytest.param(8, Run(replace(HYBRID, ep=2, cp=2), 1, documents=True), id="hybrid-cp2-ep2", marks=LONG),
    ],
)
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Losses, every gradient, update and clip norm, with several micro-batches a step where the batch allows."""
    assert_same_run(gloo, world_size, run)


def held_between_micro_batches(run: Run) -> dict[str, int]:
    """Numbers of a rank's layer 0 block between the first and the second micro-batch of a step, by what they are."""
    engine = build_engine(run)
    block = engine.model.layers[0]
    seen: dict[str, int] = {}
    batches = micro_batches(run, 0, engine.mesh)
    passes: list[None] = []

    def look(*_: Any) -> None:
        passes.append(None)
        if len(passes) == 2:
            parameters = _fsdp_parameters(block)
            seen["gathered"] = sum(p.sharded_state.name == "UNSHARDED" for p in parameters)
            seen["whole_gradients"] = sum(p.unsharded_accumulated_grad is not None or _whole_gradient(p) for p in parameters)
            seen["shard_gradients"] = sum(p.sharded_param.grad is not None for p in parameters)
            seen["parameters"] = len(parameters)
            seen["sums_of_one_copy"] = sum(group._partial_reduce_output is not None for group in _fsdp_groups(block))

    engine.model.embed.register_forward_pre_hook(look)
    engine.train_step(batches, 0, 1e-3)
    return seen


def _fsdp_groups(block: Any) -> list[Any]:
    states = [module._get_fsdp_state() for module in block.modules() if isinstance(module, FSDPModule)]
    return [group for state in states for group in state._fsdp_param_groups]


def _fsdp_parameters(block: Any) -> list[Any]:
    return [parameter for group in _fsdp_groups(block) for parameter in group.fsdp_params]


def _whole_gradient(parameter: Any) -> bool:
    return hasattr(parameter, "_unsharded_param") and parameter._unsharded_param.grad is not None


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_a_rank_holds(gloo: GlooPool, zero: int) -> None:
    """Between two micro-batches: ZeRO-1 holds whole gradients, 2 shards of them, 3 no gathered parameters either."""
    seen = gloo.run(2, held_between_micro_batches, Run(DP, 2, engine={"zero": zero}))[0]
    everything = seen.pop("parameters")
    assert everything > 0
    assert seen == {
        "gathered": everything if zero < 3 else 0,
        "whole_gradients": everything if zero == 1 else 0,
        "shard_gradients": everything if zero > 1 else 0,
        "sums_of_one_copy": 0,
    }


def test_copies_meet_once_a_step(gloo: GlooPool) -> None:
    """Hybrid sharding: between two micro-batches a copy of the model holds its own sum; no gradient is final yet."""
    for seen in gloo.run(4, held_between_micro_batches, Run(HYBRID, 1, engine={"zero": 2})):
        assert (seen["shard_gradients"], seen["whole_gradients"]) == (0, 0)
        assert seen["sums_of_one_copy"] > 0


def step_gradients(run: Run, one_by_one: bool) -> list[dict[str, Tensor]]:
    """Full gradients of a step, or of each of its micro-batches alone (as parts of the same global batch); nothing moves."""
    engine = build_engine(run)
    gradients = capture_gradients(engine)
    batches = micro_batches(run, 0, engine.mesh)
    tokens = engine._global_tokens(batches)
    engine._global_tokens = lambda _: tokens  # type: ignore[method-assign]
    for part in [[batch] for batch in batches] if one_by_one else [batches]:
        engine.train_step(part, 0, 0.0)
    return gradients


def _off(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest relative error of a gradient."""
    return max(((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact if "k_proj.bias" not in name)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (4, 1)], ids=["4-micro-batches", "4-ranks-micro-1"])
def test_gradients_accumulate_in_fp32(gloo: GlooPool, world_size: int, micro: int, zero: int) -> None:
    """The bf16 gradients of all micro-batches are added in fp32: a bf16 sum would be off by 2^-9 and more."""
    # No balance loss: its load fractions would move from one micro-batch's step to the next.
    run = Run(DP, micro, "bf16", 1, engine={"zero": zero}, balance=BalanceConfig(coef=0.0), optim=replace(OPTIM, clip_norm=0.0))
    parts = gloo.run(1, step_gradients, replace(run, engine={}), True)[0]
    assert len(parts) == SEQUENCES // micro
    exact = {name: torch.stack([part[name].double() for part in parts]).sum(0) for name in parts[0]}
    narrow = {name: parts[0][name].bfloat16() for name in exact}
    for part in parts[1:]:
        narrow = {name: narrow[name] + part[name].bfloat16() for name in exact}
    ours = gloo.run(world_size, step_gradients, run, False)[0][0]
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert _off(ours, exact) < 1e-6
    assert _off(narrow, exact) > 1e-3
