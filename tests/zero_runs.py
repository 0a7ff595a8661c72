"""The DeepSpeed engine in the pool's processes, as `common` has the native one."""

import contextlib
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from common import Run, compare, full, micro_batches, reference, to_compare
from helpers import GlooPool
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagrin.distributed.mesh import build_mesh
from megagrin.engines.base import EngineConfig
from megagrin.engines.deepspeed import DeepSpeedEngine
from megagrin.optim.schedule import learning_rate


@contextlib.contextmanager
def deepspeed_engine(run: Run, seed: int = 7) -> Iterator[DeepSpeedEngine]:
    """An engine on the default process group; afterwards DeepSpeed forgets its groups, as the pool's next case has others."""
    mesh = build_mesh(run.parallel, "cpu")
    config = EngineConfig(kind="deepspeed", dtype=run.dtype, **run.engine)  # type: ignore[arg-type]
    engine = DeepSpeedEngine(run.model, run.router, run.balance, run.optim, config, mesh, torch.device("cpu"), seed)
    try:
        yield engine
    finally:
        engine.zero.destroy()
        forget_groups()


def forget_groups() -> None:
    """DeepSpeed counts modules and parameters of a process, and compares the counts of ranks: those of the pool differ.

    Its stack of modules and its cached methods keep every model, and with it the engine and all groups: 36 threads a case that
    wake every 10 ms.
    """
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None
    parameter_offload.FWD_MODULE_STACK.clear()
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and cached.__module__.startswith("deepspeed."):
            cached.cache_clear()
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


def capture(engine: DeepSpeedEngine, run: Run) -> list[dict[str, Tensor]]:
    """A list that receives all gradients before each of the optimizer's steps."""
    gradients: list[dict[str, Tensor]] = []
    step_of_zero = engine.zero.step

    def step(*arguments: Any) -> None:
        gradients.append(clipped_gradients(engine, run.optim.clip_norm))
        step_of_zero(*arguments)

    engine.zero.step = step
    return gradients


def run_deepspeed(run: Run) -> dict[str, Any]:
    """Train, and return what `common.run_steps` returns."""
    with deepspeed_engine(run) as engine:
        gradients = capture(engine, run)
        results = [
            engine.train_step(micro_batches(run, number, engine.mesh), number, learning_rate(run.optim, number, run.steps))
            for number in range(run.steps)
        ]
        weights = {name.removeprefix("model."): full(tensor) for name, tensor in engine.state(optimizer=False).items()}
        return to_compare(results, gradients, weights)


def build_op(name: str) -> None:
    """Compile one of DeepSpeed's C++ parts, once a machine: ranks that do it together wait for each other for minutes."""
    command = f"from deepspeed.ops.op_builder import {name}; {name}().load()"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Every rank under DeepSpeed reports the run of one native process."""
    expected = reference(gloo, run)
    assert min(expected["norms"]) > run.optim.clip_norm > 0, "clipping must be at work"
    for ours in gloo.run(world_size, run_deepspeed, run):
        compare(ours, expected, 1e-5)
