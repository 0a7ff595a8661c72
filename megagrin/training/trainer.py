"""Building a run's parts from its configuration, and moving them between memory and disk."""

import dataclasses
from pathlib import Path

import torch

from megagrin import config
from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.checkpoint.tokens import Candidate, mismatch, token_source
from megagrin.data.loader import Batch, GlobalBatches, evaluation_batches
from megagrin.distributed.mesh import ParallelMesh, build_mesh
from megagrin.distributed.runtime import Runtime
from megagrin.engines.base import Engine
from megagrin.engines.deepspeed import DeepSpeedEngine
from megagrin.engines.native import NativeEngine
from megagrin.training.run_config import RunConfig

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
            self._refuse_tokenizer("data.tokenizer", found[-1], info)
            self.engine.load(found[-1], info.step)
            return info.step
        if self.run.train.init_from is not None:
            source = store.find(Path(self.run.train.init_from))
            info = store.read_info(source)
            saved = info.run["model"]
            changes = config.changed_fields(saved, dataclasses.asdict(self.run.model))
            if changes := [change for change in changes if not change.startswith("preset:")]:
                raise ValueError(f"train.init_from: {source} holds another model: {'; '.join(changes)}")
            self._refuse_tokenizer("train.init_from", source, info)
            weights = self.engine.state(optimizer=False)
            store.load(source, weights)
            self.engine.load_state(weights, 0)
        return 0

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

    def _refuse_tokenizer(self, setting: str, path: Path, info: CheckpointInfo) -> None:
        candidate = Candidate(setting, self.run.data.tokenizer, self.tokens.tokenizer_sha256)
        if reason := mismatch(candidate, path, info):
            raise ValueError(reason)

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
