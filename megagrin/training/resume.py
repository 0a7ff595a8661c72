"""Where a run starts from, and what it may not change then: known from its files, before a rank is there."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.checkpoint.tokens import Candidate, mismatch, token_source
from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate
from megagrin.settings import config
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
        ValueError: a checkpoint cannot be read, belongs to another model, seed, batch, token file or tokenizer, or has done
            more than train.steps.
    """
    found = newest(run)
    if found is not None:
        path, info = found
        config.check(resume_violations(run, path, info, fingerprint))
        return Start(info.step, path, False, tuple(_changes(run, info)), _rate_jump(run, info))
    source = initial_weights(run)
    return Start() if source is None else Start(0, source, weights_only=True)


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
    fixed = [change for change in _changes(run, info) if change.startswith(FIXED_ON_RESUME)]
    fixed = [change for change in fixed if not change.startswith("model.preset:")]
    if info.data and info.data != fingerprint:
        fixed.append(f"data.train: the token file {run.data.train} has other contents")
    broken = []
    if fixed:
        broken.append(
            f"train.run_dir: {path} was trained with other settings ({'; '.join(fixed)}); "
            "take another run_dir, or the old settings"
        )
    elif reason := _other_tokenizer(run, "data.tokenizer", path, info):
        broken.append(reason)
    if run.train.steps < info.step:
        broken.append(
            f"train.steps: {run.train.steps} is less than the {info.step} steps that {path} has done; "
            "ask for more, or take another run_dir"
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
        ValueError: there is none, or it is of another model or tokenizer, or DeepSpeed's own.
    """
    if run.train.init_from is None:
        return None
    with config.about("train.init_from"):
        source = store.find(Path(run.train.init_from))
        info = store.read_info(source)
        changes = config.changed_fields(info.run["model"], dataclasses.asdict(run.model))
        if changes := [change for change in changes if not change.startswith("preset:")]:
            raise ValueError(f"{source} holds another model: {'; '.join(changes)}")
        if store.format_of(source) == "deepspeed":
            raise ValueError(
                f"{source} holds DeepSpeed's own files; `megagrin convert-checkpoint` makes a native checkpoint of them"
            )
    if reason := _other_tokenizer(run, "train.init_from", source, info):
        raise ValueError(reason)
    return source


def _changes(run: RunConfig, info: CheckpointInfo) -> list[str]:
    """Settings that differ, as a checkpoint holds them: without tuples."""
    return config.changed_fields(info.run, json.loads(json.dumps(dataclasses.asdict(run))))


def _other_tokenizer(run: RunConfig, setting: str, path: Path, info: CheckpointInfo) -> str | None:
    """Why the tokens of this run are not those of a checkpoint."""
    tokens = token_source(run.data.train, run.data.tokenizer)
    return mismatch(Candidate(setting, run.data.tokenizer, tokens.tokenizer_sha256), path, info)


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
