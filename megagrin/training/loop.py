"""`megagrin train`: the training loop."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from megagrin.distributed.runtime import Runtime, session, world_size_from_environment
from megagrin.engines.base import StepResult
from megagrin.observe.metrics import MetricsLogger, expert_load
from megagrin.optim.schedule import learning_rate
from megagrin.planning.flops import flops_per_token, model_flops_utilization, peak_flops
from megagrin.settings import config
from megagrin.training import preflight, rules
from megagrin.training.resume import Start
from megagrin.training.run_config import RunConfig, describe, parse_config
from megagrin.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """Parse, check, train."""
    run, options = parse_config(argv, OPTIONS)
    world_size = _world_size(options)
    config.check(rules.violations(run, world_size))
    config.check(preflight.violations(run))
    if options["dry_run"]:
        print(describe(run, world_size))
        _warn(preflight.slowness(run))
        return 0
    with session(run.runtime) as runtime:
        train(run, runtime)
    return 0


OPTIONS = {
    "dry_run": config.Option(bool, False, "check everything that can be known before a start, say what would run, and stop"),
    "world_size": config.Option(int, None, "with --dry_run: ranks to check the layout for"),
}


def _world_size(options: dict[str, Any]) -> int:
    """Ranks of the run: torchrun's, or those that a dry run is asked about."""
    given = options["world_size"]
    if given is None:
        return world_size_from_environment()
    if given < 1:
        raise ValueError(f"--world_size: {given} must be at least 1")
    if not options["dry_run"] and given != world_size_from_environment():
        raise ValueError(f"--world_size: {given} needs --dry_run; ranks are started by torchrun (see launch/)")
    return given


def train(run: RunConfig, runtime: Runtime) -> None:
    """Train until `train.steps` optimizer steps are done, from wherever the run folder stands."""
    run_dir = Path(run.train.run_dir)
    trainer = Trainer(run, runtime)
    begun = trainer.resume()
    start = begun.step
    if runtime.is_main:
        _announce(run, runtime, begun)
    if start == run.train.steps:
        return
    logger = MetricsLogger(run.metrics, run_dir, dataclasses.asdict(run), start, run.train.steps) if runtime.is_main else None
    rates = _Rates(run, runtime)
    saved = start
    try:
        if trainer.valid and start == 0:
            _evaluate(trainer, 0, logger)
        rates.pause()
        for step in range(start, run.train.steps):
            lr = learning_rate(run.optim, step, run.train.steps)
            result = trainer.engine.train_step(trainer.batches.micro_batches(step), step, lr)
            done = step + 1
            if logger is not None:
                logger.log(done, _record(run, result, done, lr) | rates.step())
            if trainer.valid and _due(done, run.train.eval_interval, run.train.steps):
                _evaluate(trainer, done, logger)
                rates.pause()
            if _due(done, run.checkpoint.interval, run.train.steps):
                trainer.save(done)
                saved = done
                rates.pause()
    finally:
        if logger is not None:
            logger.close()
    if runtime.is_main:
        print(f"done     {run.train.steps} steps, checkpoint of step {saved} in {run_dir}", flush=True)


def _announce(run: RunConfig, runtime: Runtime, start: Start) -> None:
    """Keep the settings in the run folder, and print them and what they change."""
    run_dir = Path(run.train.run_dir)
    print(describe(run, runtime.world_size), flush=True)
    if start.step == run.train.steps:
        print(f"done     nothing to do: train.steps is {run.train.steps}, and {start.checkpoint} has done them", flush=True)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    _keep_config(run, run_dir, start.step)
    if start.step:
        print(f"resumed  after step {start.step}", flush=True)
    for change in start.changes:
        print(f"changed  {change}", flush=True)
    _warn(start.warning)
    _warn(preflight.slowness(run))


def _warn(text: str) -> None:
    if text:
        print(f"warning  {text}", flush=True)


def _keep_config(run: RunConfig, run_dir: Path, step: int) -> None:
    """Write config.yaml, and, where it says something new, config.step_<N>.yaml: the settings from step N on."""
    newest = run_dir / "config.yaml"
    before = newest.read_bytes() if newest.exists() else b""
    config.save(run, newest)
    if newest.read_bytes() != before:
        config.save(run, run_dir / f"config.step_{step:08d}.yaml")


def _evaluate(trainer: Trainer, done: int, logger: MetricsLogger | None) -> None:
    valid_loss = trainer.evaluate()
    if logger is not None:
        logger.log(done, {"valid_loss": valid_loss})


def _due(done: int, interval: int, steps: int) -> bool:
    return done == steps or (interval > 0 and done % interval == 0)


def _record(run: RunConfig, result: StepResult, done: int, lr: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "consumed_samples": done * run.train.global_batch_size,
    }
    if result.counts_LE is not None:
        load_LE, max_L, entropy_L = expert_load(result.counts_LE)
        record |= {"load_max": max_L.tolist(), "load_entropy": entropy_L.tolist(), "load": load_LE.tolist()}
    return record


class _Rates:
    """Tokens per second, MFU and memory between one step's end and the next, without evaluation and saving."""

    def __init__(self, run: RunConfig, runtime: Runtime) -> None:
        self.tokens = run.train.global_batch_size * run.train.seq_len
        self.device = runtime.device
        self.world_size = runtime.world_size
        self.token_flops = flops_per_token(run.model, run.train.seq_len)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[run.engine.dtype]
        # On rank 0 only: an unknown device is measured, and ranks that share a CPU would measure each other.
        self.peak = peak_flops(self.device, dtype, run.metrics.peak_tflops) if runtime.is_main else float("inf")
        self.last = time.perf_counter()

    def pause(self) -> None:
        """Start timing anew after work that is not training."""
        self.last = time.perf_counter()

    def step(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = self.tokens / (now - self.last)
        self.last = now
        mfu = model_flops_utilization(rate, self.token_flops, self.world_size, self.peak)
        return {"tokens_per_second": rate, "mfu": mfu, "memory_gib": self._memory() / 2**30}

    def _memory(self) -> float:
        """Peak bytes: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
