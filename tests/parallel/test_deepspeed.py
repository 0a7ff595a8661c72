"""The DeepSpeed engine on gloo: the run of the native engine in one process, under every ZeRO stage, offload and layout."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GlooPool
from parallel.common import (
    MODEL,
    Run,
    compare,
    full,
    micro_batches,
    reference,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagrin.engines.base import EngineConfig
from megagrin.engines.deepspeed import DeepSpeedEngine
from megagrin.optim import learning_rate
from megagrin.parallel.mesh import ParallelConfig, build_mesh

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

DP, EP2, TP2 = ParallelConfig(), ParallelConfig(ep=2), ParallelConfig(tp=2)


@contextlib.contextmanager
def deepspeed_engine(run: Run, seed: int = 7) -> Iterator[DeepSpeedEngine]:
    """An engine on the default process group; afterwards DeepSpeed forgets its groups, as the pool's next case has others."""
    logging.disable(logging.WARNING)
    mesh = build_mesh(run.parallel, "cpu")
    config = EngineConfig(kind="deepspeed", dtype=run.dtype, **run.engine)  # type: ignore[arg-type]
    engine = DeepSpeedEngine(run.model, run.router, run.balance, run.optim, config, mesh, torch.device("cpu"), seed)
    try:
        yield engine
    finally:
        engine.zero.destroy()
        forget_groups()
        logging.disable(logging.NOTSET)


def forget_groups() -> None:
    """DeepSpeed counts modules and parameters of a process, and compares the counts of ranks: those of the pool differ."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = Init.num_persisted_parameters = Init.num_persisted_elements = 0


def clipped_gradients(engine: DeepSpeedEngine, max_norm: float) -> dict[str, Tensor]:
    """Whole gradients as the optimizer will see them, between the last backward pass and the step."""
    from deepspeed.utils import safe_get_full_grad

    state = engine.zero_state
    factor = min(1.0, max_norm / (state.norm().item() + 1e-6))
    gradients = {}
    for name, parameter in state.named.items():
        gradient = safe_get_full_grad(parameter)
        placed = engine.placed[name]
        shape, stride = torch.Size(placed.shape), torch.empty(placed.shape, device="meta").stride()
        if len(placed.placements) > 1:
            names = placed.mesh.mesh_dim_names[1:]
            gradient = DTensor.from_local(
                gradient, placed.mesh[names], placed.placements[1:], run_check=False, shape=shape, stride=stride
            )
        gradients[name] = full(gradient) * factor
    return gradients


def run_deepspeed(run: Run) -> dict[str, Any]:
    """Train, and return what `common.run_steps` returns."""
    with deepspeed_engine(run) as engine:
        gradients: list[dict[str, Tensor]] = []
        step_of_zero = engine.zero.step

        def step(*arguments: Any) -> None:
            gradients.append(clipped_gradients(engine, run.optim.clip_norm))
            step_of_zero(*arguments)

        engine.zero.step = step
        results = [
            engine.train_step(micro_batches(run, number, engine.mesh), number, learning_rate(run.optim, number, run.steps))
            for number in range(run.steps)
        ]
        weights = {name.removeprefix("model."): full(tensor) for name, tensor in engine.state(optimizer=False).items()}
        return {
            "losses": [result.loss for result in results],
            "balance": [result.balance_loss for result in results],
            "z": [result.z_loss for result in results],
            "norms": [result.grad_norm for result in results],
            "counts": torch.stack([result.counts_LE for result in results]) if results[0].counts_LE is not None else None,
            "gradients": {name: torch.stack([step[name] for step in gradients]) for name in gradients[0]},
            "weights": weights,
        }


MANY = {
    "dp2": (2, Run(DP, 1)),
    "ep2": (2, Run(EP2, 1)),
    "dp4-ep2": (4, Run(EP2, 1)),
    "dp2-tp2": (4, Run(TP2, 1)),
    "tp2-ep2-folded": (4, Run(replace(TP2, ep=2), 1)),
    "tp2-ep2-etp2": (4, Run(replace(TP2, ep=2, etp=2), 1)),
    "dp2-etp2-chunks": (4, Run(ParallelConfig(ep=2, etp=2, ep_chunks=2), 1)),
    "cp2-ep2-documents": (4, Run(ParallelConfig(cp=2, ep=2), 1, documents=True)),
    "dp2-tp2-cp2-ep4": (8, Run(ParallelConfig(tp=2, cp=2, ep=4), 1, documents=True)),
}


@pytest.mark.parametrize("layout", MANY)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_run(gloo: GlooPool, stage: int, layout: str) -> None:
    """Sampled experts, losses, clip norms, every gradient, final weights; several micro-batches a step."""
    world_size, run = MANY[layout]
    assert_same(gloo, world_size, replace(run, dtype="fp32", engine={"zero": stage}))


def assert_same(gloo: GlooPool, world_size: int, run: Run) -> None:
    expected = reference(gloo, run)
    assert min(expected["norms"]) > run.optim.clip_norm > 0, "clipping must be at work"
    for ours in gloo.run(world_size, run_deepspeed, run):
        compare(ours, expected, 1e-5)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"zero": 1, "offload_optimizer": "cpu"}, id="zero1-cpu"),
        pytest.param({"zero": 2, "offload_optimizer": "cpu"}, id="zero2-cpu"),
        pytest.param({"zero": 3, "offload_optimizer": "cpu"}, id="zero3-cpu"),
        pytest.param({"zero": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, id="zero3-all-cpu"),
    ],
)
def test_offload_to_cpu(gloo: GlooPool, engine: dict[str, Any]) -> None:
    """DeepSpeed's AdamW on the CPU; experts have a group of their own."""
    assert_same(gloo, 4, Run(EP2, 1, "fp32", engine=engine))


@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_offload_to_nvme(gloo: GlooPool, tmp_path: Path, parameters: str) -> None:
    """fp32 weights and moments, and the shards of the weights, live in files between their uses."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text('{"zero_optimization": {"offload_param": {"buffer_size": 1000000}}}')  # its default takes 2 GiB a rank
    engine = {"zero": 3, "offload_optimizer": "nvme", "offload_parameters": parameters, "nvme_path": str(tmp_path)}
    engine["deepspeed_config"] = str(settings)
    wide = replace(MODEL, d_model=64, d_ff=640)  # DeepSpeed writes nothing to files that is smaller than 1 MiB
    assert_same(gloo, 2, Run(EP2, 1, "fp32", model=wide, engine=engine))
    for kind in ["optimizer"] + ["*params"] * (parameters == "nvme"):
        assert list(tmp_path.glob(f"zero_stage_3/{kind}/rank*/*.swp")), f"nothing was offloaded to {kind}"
