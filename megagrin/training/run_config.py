"""The composed configuration of a run, how it is read, and what it would be in a few lines."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megagrin.checkpoint.store import MAX_STEPS, CheckpointConfig
from megagrin.data.loader import DataConfig
from megagrin.distributed.mesh import ParallelConfig
from megagrin.distributed.runtime import RuntimeConfig
from megagrin.engines.base import EngineConfig
from megagrin.models.grin import PRESETS
from megagrin.models.transformer import ModelConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import RouterConfig
from megagrin.observe.metrics import MetricsConfig
from megagrin.optim.optimizer import OptimConfig
from megagrin.parallel.pipeline import bubble_over_work, describe_parts, stage_parts
from megagrin.settings import config

DESCRIPTION = f"""Train a model. Start more than one process with torchrun (see launch/).

Presets for model.preset: {", ".join(PRESETS)}. A run folder that holds a checkpoint is continued from its newest one."""


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        run_dir: folder of everything the run writes; it continues from the newest checkpoint there.
        steps: optimizer steps.
        seq_len: tokens per sequence.
        global_batch_size: sequences per optimizer step, over all ranks.
        micro_batch_size: sequences per forward pass and rank.
        seed: of initial weights, sample order and sampled routing.
        eval_interval: optimizer steps between evaluations; 0 evaluates only at the end. Evaluation needs data.valid.
        eval_samples: sequences per evaluation, over all ranks.
        init_from: checkpoint or run folder to take weights from (weights only) when the run has no checkpoint of its own.
        allow_forced_balance: accept router.forced_balance, which makes routing meaningless; for benchmarks.
    """

    run_dir: str = "runs/default"
    steps: int = 1000
    seq_len: int = 1024
    global_batch_size: int = 32
    micro_batch_size: int = 4
    seed: int = 0
    eval_interval: int = 100
    eval_samples: int = 64
    init_from: str | None = None
    allow_forced_balance: bool = False

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = [
            f"train.{name}: {getattr(self, name)} must be at least 1"
            for name in ("steps", "seq_len", "global_batch_size", "micro_batch_size", "eval_samples")
            if getattr(self, name) < 1
        ]
        if self.steps > MAX_STEPS:
            broken.append(f"train.steps: {self.steps} must not exceed {MAX_STEPS}: checkpoints are named by eight digits")
        if not 0 <= self.seed < 1 << 63:
            broken.append(f"train.seed: {self.seed} must lie in [0, 2^63)")
        if self.eval_interval < 0:
            broken.append(f"train.eval_interval: {self.eval_interval} must not be negative")
        return broken


@dataclass(frozen=True)
class RunConfig:
    """A complete run; each section is documented beside the code it turns. What must hold between sections is in rules.py."""

    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


CHANGED = " (changed)"


def _preset_defaults(look: Callable[[str], Any]) -> dict[str, Any]:
    name = look("model.preset")
    if name is None:
        return {}
    base = name.removesuffix(CHANGED)
    if base not in PRESETS:
        raise ValueError(f"model.preset: {name or repr(name)} is none of {', '.join(PRESETS)}")
    return {f"model.{key}": value for key, value in dataclasses.asdict(PRESETS[base]).items()}


def name_shape(run: RunConfig) -> RunConfig:
    """The same run, its model under its right name: a preset's alone where every field is the preset's, else with CHANGED."""
    base = run.model.preset.removesuffix(CHANGED)
    if base not in PRESETS:
        return run
    as_preset = replace(run.model, preset=base)
    return replace(run, model=as_preset if as_preset == PRESETS[base] else replace(as_preset, preset=base + CHANGED))


def parse_config(argv: list[str], extra: Mapping[str, config.Option] | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Recipe files and overrides to a configuration; rules are not checked yet, see `rules.violations`."""
    return config.parse(RunConfig, argv, "megagrin train", DESCRIPTION, _preset_defaults, extra, name_shape)


def _degrees(**sizes: int) -> list[tuple[str, int]]:
    """Axes of more than one rank; the data-parallel one, which comes with every layout, is always named."""
    return [(name, size) for name, size in sizes.items() if size > 1 or name.endswith("dp")]


def describe(run: RunConfig, world_size: int) -> str:
    """What a run would be, in a few lines."""
    total, active = run.model.parameter_counts()
    train = run.train
    parallel = run.parallel
    dp, edp = parallel.data_parallel_size(world_size), parallel.expert_data_parallel_size(world_size)
    accumulation = train.global_batch_size // (dp * train.micro_batch_size)
    tokens = train.global_batch_size * train.seq_len
    dense = " × ".join(f"{name} {size}" for name, size in _degrees(pp=parallel.pp, dp=dp, cp=parallel.cp, tp=parallel.tp))
    experts = " × ".join(f"{name} {size}" for name, size in _degrees(edp=edp, ep=parallel.ep, etp=parallel.etp))
    return "\n".join(
        [
            f"model    {run.model.preset}: {_count(total)} parameters, {_count(active)} active per token",
            f"layout   {world_size} ranks: {dense}; experts {experts}",
            f"batch    {tokens:,} tokens: {train.global_batch_size} sequences of {train.seq_len}, "
            f"{accumulation} micro-batches a rank",
            f"length   {train.steps:,} steps, {train.steps * tokens:,} tokens",
            *_describe_pipeline(run, accumulation),
        ]
    )


def _count(number: int) -> str:
    """With a unit, to four digits: 0.214M, 5.214M, 41.87B, 1.203T."""
    for size, unit in ((10**6, "M"), (10**9, "B"), (10**12, "T")):
        if number < 1000 * size:
            return f"{number / size:.{3 - max(0, int(math.log10(max(1, number / size))))}f}{unit}"
    return f"{number:.1e}"


def _describe_pipeline(run: RunConfig, micro_batches: int) -> list[str]:
    if run.parallel.pp == 1:
        return []
    stages = describe_parts(stage_parts(run.model, run.parallel))
    bubble = bubble_over_work(run.parallel, micro_batches)
    return [f"pipeline {run.parallel.pp_schedule}: {stages}; waiting {bubble:.0%} of the working time"]
