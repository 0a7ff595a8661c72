"""Everything a run is made of: the composed configuration, its cross-section rules, and the parts built from it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megagrin import config
from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointConfig, CheckpointInfo
from megagrin.data.loader import Batch, DataConfig, GlobalBatches, evaluation_batches
from megagrin.distributed.mesh import ParallelConfig, ParallelMesh, build_mesh
from megagrin.distributed.runtime import Runtime, RuntimeConfig
from megagrin.engines.base import Engine, EngineConfig
from megagrin.engines.deepspeed import DeepSpeedEngine
from megagrin.engines.native import NativeEngine
from megagrin.engines.zero_settings import violations as kind_violations
from megagrin.models.grin import PRESETS
from megagrin.models.transformer import ModelConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import RouterConfig
from megagrin.observe.metrics import MetricsConfig
from megagrin.optim.optimizer import OptimConfig
from megagrin.parallel.pipeline import bubble_over_work, describe_parts, stage_parts

DESCRIPTION = f"""Train a model. Start more than one process with torchrun (see launch/).

Presets for model.preset: {", ".join(PRESETS)}. A run folder that holds a checkpoint is continued from its newest one."""

ENGINES: dict[str, type[Engine]] = {"native": NativeEngine, "deepspeed": DeepSpeedEngine}

# What a resumed run may not change: another model cannot take the weights, and another batch or seed would be another run.
FIXED_ON_RESUME = (
    "model",
    "router",
    "train.seed",
    "train.seq_len",
    "train.global_batch_size",
    "data.shuffle",
    "data.document_attention",
)


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
        if not 0 <= self.seed < 1 << 63:
            broken.append(f"train.seed: {self.seed} must lie in [0, 2^63)")
        if self.eval_interval < 0:
            broken.append(f"train.eval_interval: {self.eval_interval} must not be negative")
        return broken


@dataclass(frozen=True)
class RunConfig:
    """A complete run; each section is documented beside the code it turns."""

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

    def violations(self, world_size: int) -> list[str]:
        """Every broken rule of every section, and of sections together, for a number of ranks."""
        broken = [*self.train.violations(), *self.model.violations(), *self.router.violations(), *self.balance.violations()]
        broken += [*self.optim.violations(), *self.checkpoint.violations(), *self.metrics.violations()]
        broken += [*self.data.violations(), *self.runtime.violations(), *self.engine.violations()]
        broken += self.parallel.violations(world_size, self.model.n_experts)
        broken += kind_violations(self.engine, self.optim, self.parallel)
        if self.checkpoint.format == "deepspeed" and self.engine.kind != "deepspeed":
            broken.append(f"checkpoint.format: deepspeed needs engine.kind deepspeed (it is {self.engine.kind})")
        train = self.train
        dp = self.parallel.data_parallel_size(world_size)
        positive = min(dp, train.global_batch_size, train.micro_batch_size) >= 1
        if positive and train.global_batch_size % (dp * train.micro_batch_size):
            broken.append(
                f"train.global_batch_size: {train.global_batch_size} must be a multiple of "
                f"data-parallel ranks × train.micro_batch_size ({dp} × {train.micro_batch_size})"
            )
        elif positive and self.parallel.pp >= 1:
            broken += self.parallel.pipeline_violations(
                self.model.n_layers, train.global_batch_size // (dp * train.micro_batch_size)
            )
        broken += self._sequence_violations() + self._cut_violations(world_size) + self._zero_bubble_violations()
        if train.seq_len > self.model.max_positions:
            broken.append(f"train.seq_len: {train.seq_len} must not exceed model.max_positions ({self.model.max_positions})")
        if self.router.forced_balance and not train.allow_forced_balance:
            broken.append(
                "router.forced_balance: true ignores the router and is for benchmarks; "
                "set train.allow_forced_balance=true to train with it all the same"
            )
        if self.data.train is None:
            broken.append("data.train: the prefix of a token file (made by `megagrin data tokenize`) must be given")
        return broken

    def _zero_bubble_violations(self) -> list[str]:
        """Rules of backward passes in two halves, as `field: value and rule`."""
        engine, broken = self.engine, []
        if self.parallel.pp <= 1 or self.parallel.pp_schedule != "zero_bubble":
            return []
        if engine.compile:
            broken.append(
                "engine.compile: true with parallel.pp_schedule zero_bubble is not possible: a compiled backward pass computes "
                "gradients of inputs and of weights together; take 1f1b or interleaved_1f1b"
            )
        if engine.recompute in ("full", "budget"):
            broken.append(
                f"engine.recompute: {engine.recompute} with parallel.pp_schedule zero_bubble would recompute a block once for "
                "its inputs and once more for each of its weights; take selective, or 1f1b or interleaved_1f1b"
            )
        return broken

    def _sequence_violations(self) -> list[str]:
        """Rules of the ranks that share a sequence, as `field: value and rule`."""
        model, parallel = self.model, self.parallel
        if parallel.cp <= 1 or parallel.tp < 1:
            return []
        broken = []
        if self.train.seq_len % (2 * parallel.cp * parallel.tp):
            broken.append(
                f"train.seq_len: {self.train.seq_len} must be a multiple of 2 × parallel.cp × parallel.tp "
                f"({2 * parallel.cp * parallel.tp}): each cp rank takes an early and a late chunk, and tp cuts what it takes"
            )
        if parallel.cp_method == "ulysses":
            broken += [
                f"parallel.cp_method: ulysses needs model.{name} ({heads}) to be a multiple of parallel.cp × parallel.tp "
                f"({parallel.cp * parallel.tp}); all_gather does not"
                for name, heads in (("n_heads", model.n_heads), ("n_kv_heads", model.n_kv_heads))
                if heads % (parallel.cp * parallel.tp)
            ]
        return broken

    def _cut_violations(self, world_size: int) -> list[str]:
        """Rules of matrices that are cut over ranks, as `field: value and rule`."""
        model, parallel = self.model, self.parallel
        if min(parallel.tp, parallel.cp, parallel.ep, parallel.etp, parallel.dp_replicate) < 1:
            return []
        divides = [("tp", "model.n_heads", model.n_heads), ("tp", "model.n_kv_heads", model.n_kv_heads)]
        divides.append(("etp", "model.d_ff", model.d_ff) if model.is_moe else ("tp", "model.d_ff", model.d_ff))
        if parallel.cp == 1:  # the rule of cp includes this one
            divides.append(("tp", "train.seq_len", self.train.seq_len))
        broken = [
            f"parallel.{axis}: {getattr(parallel, axis)} must divide {name} ({length})"
            for axis, name, length in divides
            if length % getattr(parallel, axis)
        ]
        # What is cut once needs a second dimension that data-parallel sharding can cut evenly.
        dense = parallel.data_parallel_size(world_size) * parallel.cp // parallel.dp_replicate
        if parallel.tp > 1 and dense and model.d_model % dense:
            broken.append(
                f"model.d_model: {model.d_model} must be a multiple of the ranks that shard each part of a matrix ({dense}); "
                "parallel.dp_replicate lowers that number"
            )
        expert = parallel.expert_data_parallel_size(world_size) // parallel.dp_replicate
        one_left = parallel.etp > 1 or (expert and model.d_ff % expert)
        if parallel.ep > 1 and expert and model.d_model % expert and one_left:
            broken.append(
                f"model.d_model: {model.d_model} must be a multiple of the ranks that shard each expert ({expert}); "
                "parallel.dp_replicate lowers that number"
            )
        return broken


def _preset_defaults(peek: Callable[[str], str | None]) -> dict[str, Any]:
    name = peek("model.preset")
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"model.preset: {name} is none of {', '.join(PRESETS)}")
    return {f"model.{key}": value for key, value in dataclasses.asdict(PRESETS[name]).items()}


def parse_config(argv: list[str], extra: Callable[[Any], None] | None = None) -> tuple[RunConfig, Any]:
    """Recipe files and overrides to a configuration; rules are not checked yet, see `RunConfig.violations`."""
    return config.parse(RunConfig, argv, "megagrin train", DESCRIPTION, _preset_defaults, extra)


def build_engine(run: RunConfig, mesh: ParallelMesh, device: torch.device) -> Engine:
    """The engine of a run, with its initial weights."""
    return ENGINES[run.engine.kind](
        run.model,
        run.router,
        run.balance,
        run.optim,
        run.engine,
        mesh,
        device,
        run.train.seed,
        run.train.micro_batch_size * run.train.seq_len,
    )


class Trainer:
    """Builds a run's parts and moves them between memory and disk. The loop itself is in megagrin/training/loop.py."""

    def __init__(self, run: RunConfig, runtime: Runtime) -> None:
        self.run, self.runtime = run, runtime
        self.run_dir = Path(run.train.run_dir)
        self.mesh = build_mesh(run.parallel, runtime.device.type)
        assert run.data.train is not None
        common = {"seq_len": run.train.seq_len, "vocab_size": run.model.vocab_size, "dp_rank": self.mesh.dp_rank}
        self.batches = GlobalBatches(
            run.data,
            run.data.train,
            global_batch_size=run.train.global_batch_size,
            micro_batch_size=run.train.micro_batch_size,
            dp_size=self.mesh.dp_size,
            seed=run.train.seed,
            **common,
        )
        self.valid: list[Batch] = []
        if run.data.valid is not None:
            self.valid = evaluation_batches(
                run.data,
                run.data.valid,
                samples=run.train.eval_samples,
                micro_batch_size=run.train.micro_batch_size,
                dp_size=self.mesh.dp_size,
                **common,
            )
        self.engine = build_engine(run, self.mesh, runtime.device)

    def resume(self) -> int:
        """Continue from the newest checkpoint of the run folder, or take weights from train.init_from.

        Returns:
            Optimizer steps already done.

        Raises:
            ValueError: the checkpoint belongs to another model, seed, batch or token file.
        """
        found = store.checkpoints(self.run_dir)
        if found:
            info = store.read_info(found[-1])
            self._refuse_changes(info, found[-1])
            self.engine.load(found[-1], info.step)
            return info.step
        if self.run.train.init_from is not None:
            source = store.find(Path(self.run.train.init_from))
            saved = store.read_info(source).run["model"]
            changes = config.changed_fields(saved, dataclasses.asdict(self.run.model))
            if changes := [change for change in changes if not change.startswith("preset:")]:
                raise ValueError(f"train.init_from: {source} holds another model: {'; '.join(changes)}")
            weights = self.engine.state(optimizer=False)
            store.load(source, weights)
            self.engine.load_state(weights, 0)
        return 0

    def save(self, step: int) -> Path:
        """Commit a checkpoint after `step` optimizer steps and delete what is not kept."""
        samples = step * self.run.train.global_batch_size
        info = CheckpointInfo(step, samples, dataclasses.asdict(self.run), self.batches.fingerprint)
        path = store.commit(self.run_dir, info, lambda folder: self.engine.save(folder, self.run.checkpoint.format))
        if self.runtime.is_main:
            store.prune(self.run_dir, self.run.checkpoint.keep)
        return path

    def evaluate(self) -> float:
        """Mean cross entropy over the validation samples, nats per token."""
        return self.engine.evaluate(self.valid)

    def _refuse_changes(self, info: CheckpointInfo, path: Path) -> None:
        changes = config.changed_fields(info.run, dataclasses.asdict(self.run))
        fixed = [change for change in changes if change.startswith(FIXED_ON_RESUME) and not change.startswith("model.preset:")]
        if info.data and info.data != self.batches.fingerprint:
            fixed.append(f"data.train: the token file {self.run.data.train} has other contents")
        if fixed:
            raise ValueError(
                f"train.run_dir: {path} was trained with other settings ({'; '.join(fixed)}); "
                "take another run_dir, or the old settings"
            )


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
    digits = max(0, 3 - int(math.log10(max(1, total / 1e6))))
    return "\n".join(
        [
            f"model    {run.model.preset}: {total / 1e6:.{digits}f}M parameters, {active / 1e6:.{digits}f}M active per token",
            f"layout   {world_size} ranks: {dense}; experts {experts}",
            f"batch    {tokens:,} tokens: {train.global_batch_size} sequences of {train.seq_len}, "
            f"{accumulation} micro-batches a rank",
            f"length   {train.steps:,} steps, {train.steps * tokens:,} tokens",
            *_describe_pipeline(run, accumulation),
        ]
    )


def _describe_pipeline(run: RunConfig, micro_batches: int) -> list[str]:
    if run.parallel.pp == 1:
        return []
    stages = describe_parts(stage_parts(run.model, run.parallel))
    bubble = bubble_over_work(run.parallel, micro_batches)
    return [f"pipeline {run.parallel.pp_schedule}: {stages}; waiting {bubble:.0%} of the working time"]
