"""Building a run's parts from its configuration, and moving them between memory and disk."""

import dataclasses
from pathlib import Path

import torch

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.checkpoint.tokens import token_source
from megagrin.data.loader import Batch, GlobalBatches, evaluation_batches
from megagrin.distributed.mesh import ParallelMesh, build_mesh
from megagrin.distributed.runtime import Runtime
from megagrin.engines.base import Engine
from megagrin.engines.builds import bounded_builds
from megagrin.engines.deepspeed import DeepSpeedEngine
from megagrin.engines.native import NativeEngine
from megagrin.settings import config
from megagrin.training.resume import Start, find_start
from megagrin.training.run_config import RunConfig

ENGINES: dict[str, type[Engine]] = {"native": NativeEngine, "deepspeed": DeepSpeedEngine}


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
        self.tokens = token_source(run.data.train, run.data.tokenizer)
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
        with bounded_builds(run.runtime.timeout_minutes * 60):
            self.engine = build_engine(run, self.mesh, runtime.device)

    def resume(self) -> Start:
        """Continue from the newest checkpoint of the run folder, or take weights from train.init_from.

        Returns:
            Where the run starts from.

        Raises:
            ValueError: the checkpoint belongs to another model, seed, batch or token file, or to more steps than are asked for.
        """
        start = find_start(self.run, self.batches.fingerprint)
        if start.checkpoint is None:
            return start
        if start.weights_only:
            weights = self.engine.state(optimizer=False)
            with config.about("train.init_from"):
                store.load(start.checkpoint, weights)
            self.engine.load_state(weights, 0)
        else:
            with config.about("train.run_dir"):
                self.engine.load(start.checkpoint, start.step)
        return start

    def save(self, step: int) -> Path:
        """Commit a checkpoint after `step` optimizer steps and delete what is not kept."""
        samples = step * self.run.train.global_batch_size
        info = CheckpointInfo(step, samples, dataclasses.asdict(self.run), self.batches.fingerprint, self.tokens)
        path = store.commit(self.run_dir, info, lambda folder: self.engine.save(folder, self.run.checkpoint.format))
        if self.runtime.is_main:
            store.prune(self.run_dir, self.run.checkpoint.keep)
        return path

    def evaluate(self) -> float:
        """Mean cross entropy over the validation samples, nats per token."""
        return self.engine.evaluate(self.valid)
