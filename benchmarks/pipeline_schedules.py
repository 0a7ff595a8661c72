"""What a pipeline schedule costs: processor time (work) and wall time of a step, against interleaved 1F1B in the same run.

Every schedule trains grin_tiny on the same micro-batches; steps of all schedules alternate in an order that turns, and the ratio
of each round counts. A schedule that computes something twice shows in its work, whatever it waits.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/pipeline_schedules.py [--rounds 15] [--micro-batches 8]
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from parallel_overhead import LR, SEED, tokens

from megagrin.distributed.mesh import ParallelConfig, build_mesh
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.grin import GRIN_TINY as MODEL
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import RouterConfig
from megagrin.optim.optimizer import OptimConfig

SCHEDULES = {"1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2}  # stages a rank
BASE = "interleaved_1f1b"


def engine(schedule: str) -> NativeEngine:
    """A pipeline over all ranks."""
    degrees = {"pp": dist.get_world_size(), "pp_schedule": schedule, "pp_stages_per_rank": SCHEDULES[schedule]}
    mesh = build_mesh(ParallelConfig(**degrees), "cpu")  # type: ignore[arg-type]
    config = EngineConfig(dtype="fp32")
    return NativeEngine(MODEL, RouterConfig(), BalanceConfig(), OptimConfig(), config, mesh, torch.device("cpu"), SEED)


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--micro-batches", type=int, default=8)
    options = parser.parse_args()
    batches = [tokens(1, 256) for _ in range(options.micro_batches)]
    with session(RuntimeConfig(device="cpu")) as runtime:
        engines = {schedule: engine(schedule) for schedule in SCHEDULES}
        seconds: dict[str, list[tuple[float, float]]] = {schedule: [] for schedule in SCHEDULES}
        names = list(SCHEDULES)
        for round_ in range(options.rounds + 2):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                dist.barrier()
                wall, work = time.perf_counter(), time.process_time()
                engines[name].train_step(batches, round_, LR)
                spent = torch.tensor([time.process_time() - work])
                dist.all_reduce(spent)
                seconds[name].append((spent.item(), time.perf_counter() - wall))
    if runtime.rank:
        return
    for name in names:
        for what, index in (("work", 0), ("wall", 1)):
            pairs = zip(seconds[name][2:], seconds[BASE][2:], strict=True)
            ratios = [ours[index] / base[index] for ours, base in pairs]
            low, _, high = statistics.quantiles(ratios, n=4)
            print(f"{name:<17} {what} {statistics.median(ratios):.3f} of {BASE} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
