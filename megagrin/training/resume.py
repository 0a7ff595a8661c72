"""Where a run starts from: decided from its configuration and the files on disk, without an engine or a process group."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megagrin import config
from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate
from megagrin.training.run_config import RunConfig

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
class Start:
    """Where a run starts from.

    Attributes:
        step: optimizer steps already done.
        checkpoint: what is loaded; None for initial weights.
        weights_only: the checkpoint is that of train.init_from: neither moments nor steps are taken from it.
        changes: settings that differ from those the checkpoint was trained with, as `section.field: old -> new`.
        warning: what the changes do to the learning rate of the next step; empty when nothing.
    """

    step: int = 0
    checkpoint: Path | None = None
    weights_only: bool = False
    changes: tuple[str, ...] = ()
    warning: str = ""


def find_start(run: RunConfig, fingerprint: str) -> Start:
    """The newest checkpoint of the run folder, else the weights of train.init_from, else initial weights.

    Args:
        run: what is to be trained.
        fingerprint: of the training token file (`IndexedDataset.fingerprint`).

    Raises:
        ValueError: a checkpoint cannot be read, belongs to another model, seed, batch or token file, or has done more
            than train.steps.
    """
    found = store.checkpoints(Path(run.train.run_dir))
    if found:
        info = store.read_info(found[-1])
        # As a checkpoint holds it: without tuples.
        changes = config.changed_fields(info.run, json.loads(json.dumps(dataclasses.asdict(run))))
        _refuse_changes(run, fingerprint, info, found[-1], changes)
        if run.train.steps < info.step:
            raise ValueError(
                f"train.steps: {run.train.steps} is less than the {info.step} steps that {found[-1]} has done; "
                "ask for more, or take another run_dir"
            )
        return Start(info.step, found[-1], False, tuple(changes), _rate_jump(run, info))
    if run.train.init_from is not None:
        source = store.find(Path(run.train.init_from))
        saved = store.read_info(source).run["model"]
        changes = config.changed_fields(saved, dataclasses.asdict(run.model))
        if changes := [change for change in changes if not change.startswith("preset:")]:
            raise ValueError(f"train.init_from: {source} holds another model: {'; '.join(changes)}")
        return Start(0, source, weights_only=True)
    return Start()


def _refuse_changes(run: RunConfig, fingerprint: str, info: CheckpointInfo, path: Path, changes: list[str]) -> None:
    fixed = [change for change in changes if change.startswith(FIXED_ON_RESUME) and not change.startswith("model.preset:")]
    if info.data and info.data != fingerprint:
        fixed.append(f"data.train: the token file {run.data.train} has other contents")
    if fixed:
        raise ValueError(
            f"train.run_dir: {path} was trained with other settings ({'; '.join(fixed)}); "
            "take another run_dir, or the old settings"
        )


def _rate_jump(run: RunConfig, info: CheckpointInfo) -> str:
    """The learning rate of the next step where the earlier settings would have given another one."""
    if info.step == run.train.steps or "optim" not in info.run or "train" not in info.run:
        return ""
    known = {field.name for field in dataclasses.fields(OptimConfig)}
    earlier = OptimConfig(**{name: value for name, value in info.run["optim"].items() if name in known})
    before = learning_rate(earlier, info.step, info.run["train"]["steps"])
    after = learning_rate(run.optim, info.step, run.train.steps)
    if math.isclose(before, after, rel_tol=1e-9):
        return ""
    return f"the learning rate of step {info.step + 1} is {after:.3e}; with the earlier settings it was to be {before:.3e}"
