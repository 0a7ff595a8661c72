"""What a run measures, and its record: metrics.jsonl, one JSON object per line.

Shape suffixes: L = MoE layers, E = experts.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import torch
from torch import Tensor

from megagrin.observe.trackers import ConsoleTracker, TensorBoardTracker, WandbTracker

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsConfig:
    """What is logged, how often and where to. metrics.jsonl is always written, one row per optimizer step.

    Args:
        log_interval: optimizer steps between rows on the console, in TensorBoard and in wandb.
        load_interval: optimizer steps between rows of metrics.jsonl that hold the load of every expert (layers ×
            experts numbers); the maximum and the entropy of each layer are in every row. Raise it for long runs of
            large models: 32 layers of 16 experts take 10 kB a row.
        console: print rows, and on a terminal a live bar.
        tensorboard: write TensorBoard events to the run's folder `tensorboard/`.
        wandb: Weights & Biases mode: offline writes files to upload later with `wandb sync`, online uploads while
            running.
        wandb_project: wandb's project.
        wandb_name: the run's name in wandb; by default the name of the run's folder.
        peak_tflops: dense peak of one device in the compute dtype, in TFLOP/s, for MFU; by default from a
            table by the device's name, else measured once by a matrix product.
    """

    log_interval: int = 10
    load_interval: int = 1
    console: bool = True
    tensorboard: bool = False
    # wandb's own word for "no": YAML reads a bare `off` as the boolean False.
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "megagrin"
    wandb_name: str | None = None
    peak_tflops: float | None = None

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = [
            f"metrics.{name}: {value} must be at least 1"
            for name, value in (("log_interval", self.log_interval), ("load_interval", self.load_interval))
            if value < 1
        ]
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            broken.append("metrics.tensorboard: true needs tensorboard: pip install 'megagrin[tensorboard]'")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            broken.append(f"metrics.peak_tflops: {self.peak_tflops} must be a positive number")
        return broken


def expert_load(counts_LE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How evenly tokens are spread over the experts of each layer.

    Args:
        counts_LE: tokens sent to each expert, any real dtype.

    Returns:
        fp64 tensors on the same device: fractions (L, E), each row summing to 1; the largest of each layer (L,), 1/E
        when balanced; the entropy of each layer over ln E (L,), 1 when balanced and 0 when one expert gets everything.
        A layer without tokens has zeros; with a single expert the entropy is 1.

    Raises:
        ValueError: counts_LE is not a matrix.
    """
    if counts_LE.ndim != 2:
        raise ValueError(f"counts_LE: shape {tuple(counts_LE.shape)} must be (layers, experts)")
    counts_LE = counts_LE.double()
    load_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
    entropy_L = torch.special.entr(load_LE).sum(dim=1)
    experts = counts_LE.shape[1]
    entropy_L = entropy_L / math.log(experts) if experts > 1 else torch.ones_like(entropy_L)
    return load_LE, load_LE.amax(dim=1), entropy_L


def _plain(value: Any) -> Any:
    """A value as JSON has it: tensors and arrays as lists; floats that JSON lacks as "NaN", "Infinity", "-Infinity"."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _from_plain(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    return value


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line without its newline, and its row as JSON holds it. A last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not a row.
    """
    torn: int | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise ValueError(f"{path}: line {torn} is not a row of metrics (a JSON object with an integer step)")
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line.rstrip(b"\n"), row
            else:
                torn = number


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; floats are bit-equal to those logged. A last line cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not a row.
    """
    return [_from_plain(row) for _, row in _lines(Path(path))]


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows that a run resumed after `step` makes anew, and a torn last line; atomically.

    A run that starts at 0 evaluates before its first step, too: none of its rows stay.
    """
    temporary = path.with_name(path.name + ".tmp")
    dropped = 0
    with temporary.open("wb") as file:
        for line, row in _lines(path):
            if step and row["step"] <= step:
                file.write(line + b"\n")
            else:
                dropped += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if dropped:
        log.warning("%s: dropped %d rows after step %d, where the run resumes", path, dropped, step)


class MetricsLogger:
    """Writes the run's metrics; on rank 0 only. A context manager, so that the terminal is given back on errors.

    Args:
        config: what goes where.
        run_dir: the run's folder, made if missing; metrics.jsonl, tensorboard/ and wandb/ go there.
        run_config: the run's resolved configuration, for wandb.
        resume_step: optimizer steps that the loaded checkpoint had finished, 0 for a new run; rows of later
            steps are dropped.
        total_steps: the run's last step, for the time left; None when unknown.

    Raises:
        OSError: a file cannot be written.
        ValueError: metrics.jsonl has a line, before the last, that is not a row.
        ImportError: tensorboard is configured and not installed. (wandb never raises: see WandbTracker.)
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: str | os.PathLike[str],
        run_config: Mapping[str, Any],
        resume_step: int,
        total_steps: int | None = None,
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        if path.exists():
            _keep_until(path, resume_step)
        self._config = config
        self._first_step, self._total_steps = resume_step + 1, total_steps
        # Unbuffered: each row is one write to the file, so a kill can tear the last line only.
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._console = ConsoleTracker(total_steps) if config.console else None
        self._curves: list[TensorBoardTracker | WandbTracker] = []
        if config.tensorboard:
            self._curves.append(TensorBoardTracker(folder / "tensorboard", resume_step))
        if config.wandb != "disabled":
            name = config.wandb_name or folder.resolve().name
            self._curves.append(WandbTracker(config.wandb, config.wandb_project, name, folder, run_config))

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write a row.

        Args:
            step: optimizer steps finished, from 1.
            record: numbers, lists of numbers, tensors or arrays by name (docs/metrics.md). A row of training has
                `loss` and goes to the console and the trackers every `log_interval` steps; any other row (evaluation)
                always does.

        Raises:
            OSError: the row cannot be written.
        """
        row = {"step": step, **{name: _plain(value) for name, value in record.items() if name != "step"}}
        if step % self._config.load_interval:
            row.pop("load", None)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            where = f"{self._file.name}, step {step}"
            raise OSError(f"{where}: wrote {written} of {len(line)} bytes of the row; is the disk full?")

        training = "loss" in row
        due = not training or step % self._config.log_interval == 0 or step in (self._first_step, self._total_steps)
        numbers = _from_plain(row)
        if self._console is not None:
            self._console.log(step, numbers, row=due)
        if due:
            for tracker in self._curves:
                tracker.log(step, numbers)

    def close(self) -> None:
        """Close every tracker and the file; waits a few seconds at most. May be called twice."""
        if self._file.closed:
            return
        if self._console is not None:
            self._console.close()
        for tracker in self._curves:
            tracker.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
