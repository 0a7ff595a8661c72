"""Checkpoints: sharded by DCP, tensors only (safetensors), committed by a rename.

A folder `step_00000100` holds model and optimizer tensors under their global names and shapes, so that any layout can read what
any other wrote, and `checkpoint.json` with step, consumed samples and the resolved configuration. A folder without
`checkpoint.json` is not a checkpoint: everything is written to a hidden folder that is renamed when it is whole.
"""

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from megagrin.distributed.runtime import every_rank
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig
from megagrin.settings.arguments import describe

Format = Literal["native", "deepspeed"]
FORMAT = 2  # 1 kept all gate rows of an expert before all up rows
MAX_STEPS = 10**8 - 1
_NAME = re.compile(r"step_(\d{8})")
_META = "checkpoint.json"
DEEPSPEED_FOLDER = "deepspeed"  # holds what DeepSpeed wrote, in a checkpoint of its format


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
        interval: optimizer steps between checkpoints; 0 saves only at the end of the run.
        keep: newest checkpoints that stay on disk; 0 keeps all.
        format: native: tensors that any layout and either engine continue from; deepspeed: DeepSpeed's own files, which the same
            layout of engine.kind deepspeed continues from (`megagrin convert-checkpoint` converts them).
    """

    interval: int = 500
    keep: int = 3
    format: Format = "native"

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        return [
            f"checkpoint.{name}: {value} must not be negative"
            for name, value in (("interval", self.interval), ("keep", self.keep))
            if value < 0
        ]


@dataclass(frozen=True)
class TokenSource:
    """What made the tokens that a model was trained on.

    Attributes:
        tokenizer_sha256: of the tokenizer's file; None where it is not known.
        append_bos: documents start with the tokenizer's bos id.
        append_eos: documents end with its eos id.
    """

    tokenizer_sha256: str | None = None
    append_bos: bool = False
    append_eos: bool = True


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says.

    Attributes:
        step: optimizer steps done.
        consumed_samples: sequences trained on.
        run: the resolved configuration of the run, as a dictionary.
        data: fingerprint of the training token file; empty when the weights were imported.
        tokens: what made that file; None in checkpoints of before this was kept.
    """

    step: int
    consumed_samples: int
    run: dict[str, Any]
    data: str = ""
    tokens: TokenSource | None = None


def checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _META).is_file())


def find(path: Path) -> Path:
    """The checkpoint meant by a path: a checkpoint folder itself, or the newest one of a run folder.

    Raises:
        ValueError: there is none.
    """
    if (path / _META).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise ValueError(f"{path}: neither a checkpoint (a folder with {_META}) nor a run folder with checkpoints")
    return found[-1]


def read_info(path: Path) -> CheckpointInfo:
    """Read `checkpoint.json`.

    Raises:
        ValueError: unreadable, or written by another format version.
    """
    try:
        content = json.loads((path / _META).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"{path / _META}: format {content['format']}, this version reads {FORMAT}")
        run, tokens = content["run"], content.get("tokens")
        if not all(isinstance(run[section], dict) for section in ("model", "router")):
            raise TypeError("run: sections model and router must be mappings")
        source = None if tokens is None else TokenSource(**tokens)
        return CheckpointInfo(int(content["step"]), content["consumed_samples"], run, content["data"], source)
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / _META}: not a checkpoint description ({type(error).__name__}: {error})") from error


def format_of(path: Path) -> Format:
    """Who wrote a checkpoint's tensors."""
    return "deepspeed" if (path / DEEPSPEED_FOLDER).is_dir() else "native"


def _write_info(path: Path, info: CheckpointInfo) -> None:
    (path / _META).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(info)}, indent=1))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under their names in a checkpoint."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments under their parameter's name; made as zeros where no step was taken yet."""
    tensors = {}
    muon = {parameter for group in optimizer.param_groups if group.get("muon") for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for moment in ("momentum_buffer",) if parameter in muon else ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(parameter)
            tensors[f"optim.{name}.{moment}"] = state[moment]
    return tensors


def set_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Let AdamW's bias correction count on from `step` optimizer steps done."""
    for state in optimizer.state.values():
        if "exp_avg" in state:
            state["step"] = torch.tensor(float(step), device=state["exp_avg"].device)
    for group in optimizer.param_groups:
        if "step" in group:  # apex counts once for a group
            group["step"] = step


def save(run_dir: Path, tensors: dict[str, Tensor], info: CheckpointInfo) -> Path:
    """Write and commit `run_dir/checkpoints/step_<step>`; every rank calls it.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        tensors: by name, sharded (DTensors) or equal on all ranks.
        info: goes into `checkpoint.json`.

    Returns:
        The committed folder.
    """
    return commit(run_dir, info, lambda folder: write_tensors(folder, tensors))


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors into an existing folder, each rank its shards; every rank calls it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # DCP warns about features that are not used here
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def commit(run_dir: Path, info: CheckpointInfo, write: Callable[[Path], None]) -> Path:
    """Let every rank write into a hidden folder, and give it its name when all are done; every rank calls it.

    Args:
        run_dir: the run folder, on a file system that all ranks share.
        info: goes into `checkpoint.json`.
        write: gets the folder, which exists and is empty.

    Returns:
        The committed folder `run_dir/checkpoints/step_<step>`.

    Raises:
        OSError: on every rank, when one could not write; what was written is removed, earlier checkpoints are as they were.
    """
    target = run_dir / "checkpoints" / f"step_{info.step:08d}"
    partial = target.with_name(f".{target.name}.partial")

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        _write_info(partial, info)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    main = dist.get_rank() == 0
    steps: list[Callable[[], None]] = [prepare if main else _nothing, lambda: write(partial), publish if main else _nothing]
    for step in steps:
        if reason := _failure(step):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise every_rank(OSError(f"{target}: the checkpoint of step {info.step} cannot be written: {reason}"))
    return target


def _nothing() -> None:
    pass


def _failure(step: Callable[[], None]) -> str:
    """Take a step on every rank, and tell every rank the reason of the first one that failed; empty when none did."""
    reason = ""
    try:
        step()
    # DCP's CheckpointException, which wraps what went wrong on some rank, is no Exception.
    except (Exception, CheckpointException) as error:
        reason = _cause(error)
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((found for found in reasons if found), "")


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint into existing tensors, whatever layout wrote it; every rank calls it.

    Args:
        path: a committed checkpoint.
        tensors: by name, filled in place.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    _read(path, tensors, no_dist=False)


def _read(path: Path, tensors: dict[str, Tensor], no_dist: bool) -> None:
    if format_of(path) == "deepspeed":
        raise ValueError(f"{path}: holds DeepSpeed's own files; `megagrin convert-checkpoint` makes a native checkpoint of them")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # DCP wraps whatever went wrong on any rank
        refusal = ValueError(f"{path}: cannot be loaded into this model: {_cause(error)}")
        raise every_rank(refusal) if isinstance(error, CheckpointException) else refusal from error


def _cause(error: BaseException) -> str:
    """The reason in a user's words, on one line: of the first rank's failure where DCP collected them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError):
        return describe(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def load_model(path: Path) -> tuple[Transformer, dict[str, Any]]:
    """Read a checkpoint's weights into a plain fp32 model on the CPU, in one process.

    Args:
        path: a checkpoint or a run folder (its newest checkpoint).

    Returns:
        The model in eval mode and the run's configuration as a dictionary.
    """
    path = find(path)
    info = read_info(path)
    model = Transformer(ModelConfig(**info.run["model"]), RouterConfig(**info.run["router"]))
    _read(path, model_tensors(model), no_dist=True)
    return model.eval(), info.run


def save_model(path: Path, model: Transformer, run: dict[str, Any], tokens: TokenSource | None = None) -> None:
    """Write a weights-only checkpoint of a plain model from one process; `train.init_from` starts from it.

    Args:
        path: the checkpoint folder to create.
        model: weights to write.
        run: sections `model` and `router` at least.
        tokens: what made the tokens of its training, where that is known.

    Raises:
        ValueError: the folder exists.
        OSError: it cannot be written; nothing is left of it.
    """
    if path.exists():
        raise ValueError(f"{path}: exists already")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(model_tensors(model), storage_writer=writer, no_dist=True)
        _write_info(partial, CheckpointInfo(0, 0, run, tokens=tokens))
        partial.rename(path)
    except (Exception, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{path}: the checkpoint cannot be written: {_cause(error)}") from error


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all), and leftovers of interrupted saves; one rank calls it."""
    for leftover in (run_dir / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in checkpoints(run_dir)[:-keep] if keep else []:
        shutil.rmtree(path)


def gather(model: nn.Module, stages: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Copies of the full parameters on every rank's CPU, for tests and small models only.

    Args:
        model: this rank's parameters.
        stages: the pipeline axis, over which the parameters of the other stages are collected.
    """
    held = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu().clone()
        for name, parameter in model.named_parameters()
    }
    if stages is None or dist.get_world_size(stages) == 1:
        return held
    parts: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(parts, held, group=stages)
    return {name: tensor for part in parts for name, tensor in part.items()}
