"""Where a run starts from: decided from its configuration and the files on disk, without an engine or a process group."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megagrin import config
from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
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
    """

    step: int = 0
    checkpoint: Path | None = None
    weights_only: bool = False


def find_start(run: RunConfig, fingerprint: str) -> Start:
    """The newest checkpoint of the run folder, else the weights of train.init_from, else initial weights.

    Args:
        run: what is to be trained.
        fingerprint: of the training token file (`IndexedDataset.fingerprint`).

    Raises:
        ValueError: a checkpoint cannot be read, or belongs to another model, seed, batch or token file.
    """
    found = store.checkpoints(Path(run.train.run_dir))
    if found:
        info = store.read_info(found[-1])
        _refuse_changes(run, fingerprint, info, found[-1])
        return Start(info.step, found[-1])
    if run.train.init_from is not None:
        source = store.find(Path(run.train.init_from))
        saved = store.read_info(source).run["model"]
        changes = config.changed_fields(saved, dataclasses.asdict(run.model))
        if changes := [change for change in changes if not change.startswith("preset:")]:
            raise ValueError(f"train.init_from: {source} holds another model: {'; '.join(changes)}")
        return Start(0, source, weights_only=True)
    return Start()


def _refuse_changes(run: RunConfig, fingerprint: str, info: CheckpointInfo, path: Path) -> None:
    changes = config.changed_fields(info.run, dataclasses.asdict(run))
    fixed = [change for change in changes if change.startswith(FIXED_ON_RESUME) and not change.startswith("model.preset:")]
    if info.data and info.data != fingerprint:
        fixed.append(f"data.train: the token file {run.data.train} has other contents")
    if fixed:
        raise ValueError(
            f"train.run_dir: {path} was trained with other settings ({'; '.join(fixed)}); "
            "take another run_dir, or the old settings"
        )
