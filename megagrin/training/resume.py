"""What a run goes on from, and what it may not change when it does: known from files alone, before an engine exists."""

import dataclasses
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


def newest(run: RunConfig) -> tuple[Path, CheckpointInfo] | None:
    """The checkpoint in the run folder that the run continues from; None for a new run.

    Raises:
        ValueError: its description cannot be read.
    """
    found = store.checkpoints(Path(run.train.run_dir))
    if not found:
        return None
    with config.about("train.run_dir"):
        return found[-1], store.read_info(found[-1])


def resume_violations(run: RunConfig, path: Path, info: CheckpointInfo, fingerprint: str) -> list[str]:
    """Why a run cannot continue from a checkpoint of its folder.

    Args:
        run: the run that is to continue.
        path: its newest checkpoint.
        info: what that checkpoint says.
        fingerprint: of the training token file.
    """
    changes = config.changed_fields(info.run, dataclasses.asdict(run))
    fixed = [change for change in changes if change.startswith(FIXED_ON_RESUME) and not change.startswith("model.preset:")]
    if info.data and info.data != fingerprint:
        fixed.append(f"data.train: the token file {run.data.train} has other contents")
    broken = []
    if fixed:
        broken.append(
            f"train.run_dir: {path} was trained with other settings ({'; '.join(fixed)}); "
            "take another run_dir, or the old settings"
        )
    if store.format_of(path) == "deepspeed" and run.engine.kind != "deepspeed":
        broken.append(
            f"engine.kind: {run.engine.kind} cannot continue from {path}, which holds DeepSpeed's own files; "
            "`megagrin convert-checkpoint` makes a native checkpoint of them"
        )
    return broken


def initial_weights(run: RunConfig) -> Path | None:
    """The checkpoint that train.init_from names; None where it names none.

    Raises:
        ValueError: there is none, or it is of another model, or DeepSpeed's own.
    """
    if run.train.init_from is None:
        return None
    with config.about("train.init_from"):
        source = store.find(Path(run.train.init_from))
        saved = store.read_info(source).run["model"]
        changes = config.changed_fields(saved, dataclasses.asdict(run.model))
        if changes := [change for change in changes if not change.startswith("preset:")]:
            raise ValueError(f"{source} holds another model: {'; '.join(changes)}")
        if store.format_of(source) == "deepspeed":
            raise ValueError(
                f"{source} holds DeepSpeed's own files; `megagrin convert-checkpoint` makes a native checkpoint of them"
            )
    return source
