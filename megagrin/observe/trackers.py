"""Where metrics go besides metrics.jsonl: the console, TensorBoard and Weights & Biases.

Each tracker takes rows on rank 0 and has `log(...)` and `close()`. metrics.jsonl is the record of a run; what is here
is for watching it.
"""

import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

log = logging.getLogger(__name__)

# Per-layer lists become one curve each: the worst layer, which is the one to watch.
_WORST = {"load_max": max, "load_entropy": min}
_WANDB_CLOSE_SECONDS = 5.0


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that make curves: scalars, and per-layer lists by their worst layer; no matrices."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
        elif name in _WORST and value:
            flat[name] = _WORST[name](value)
    return flat


def seconds_left(marks: Iterable[tuple[int, float]], total_steps: int) -> float | None:
    """Time to the last step at the pace between the first and the last mark.

    Args:
        marks: (step, seconds) pairs in order, taken when the step ended.
        total_steps: the run's last step.

    Returns:
        Seconds, or None while fewer than two different steps are marked.
    """
    marks = list(marks)
    if not marks or marks[-1][0] == marks[0][0]:
        return None
    (first, start), (last, end) = marks[0], marks[-1]
    return max(total_steps - last, 0) * (end - start) / (last - first)


def format_row(step: int, record: Mapping[str, Any], total_steps: int | None = None, eta: float | None = None) -> str:
    """One line for people: known fields with units, in a fixed order; other numbers by name."""
    flat = scalars(record)
    parts = [f"step {step}" if total_steps is None else f"step {step}/{total_steps}"]
    for name, template in _TEMPLATES.items():
        if name in flat:
            parts.append(template.format(flat[name]))
    parts += [f"{name} {value:.4g}" for name, value in flat.items() if name not in _TEMPLATES and name not in _QUIET]
    if eta is not None:
        parts.append(f"ETA {timedelta(seconds=round(eta))}")
    return " | ".join(parts)


_TEMPLATES = {
    "loss": "loss {:.4f}",
    "valid_loss": "valid loss {:.4f}",
    "lr": "lr {:.3e}",
    "grad_norm": "grad norm {:.3f}",
    "load_max": "max load {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "memory_gib": "{:.1f} GiB",
}
# In metrics.jsonl and the curves, but not worth the width of a terminal.
_QUIET = {"step", "balance_loss", "z_loss", "consumed_samples", "load_entropy"}


class ConsoleTracker:
    """Rows as plain lines; on a terminal also a live bar below them.

    Args:
        total_steps: the run's last step; None leaves out the share done and the time left.
        console: where to write; by default standard output.
    """

    def __init__(self, total_steps: int | None = None, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._marks: deque[tuple[int, float]] = deque(maxlen=100)  # recent steps: the pace changes with the layout
        self._bar: Progress | None = None
        if self._console.is_terminal:
            text = TextColumn("{task.fields[row]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
            # Two redraws a second in rich's own thread, whatever the step time.
            self._bar = Progress(BarColumn(bar_width=20), text, console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task("", total=total_steps, row="waiting for the first step")
            self._bar.start()

    def log(self, step: int, record: Mapping[str, Any], *, row: bool) -> None:
        """Move the bar; with `row` also print the line."""
        if "loss" in record:
            self._marks.append((step, time.monotonic()))
        eta = None if self._total is None else seconds_left(self._marks, self._total)
        line = format_row(step, record, self._total, eta)
        if self._bar is not None and "loss" in record:
            self._bar.update(self._task, completed=step, row=line)
        if row:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()  # gives the cursor back


class TensorBoardTracker:
    """Scalars as TensorBoard events in `folder`; steps after `resume_step` of an earlier attempt are hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("metrics.tensorboard needs tensorboard: pip install 'megagrin[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases, kept away from training: it may be slow, hang, fail or be missing, and nothing else notices.

    Everything that touches wandb runs in one daemon thread behind a bounded queue. A full queue drops rows (counted in
    `dropped`); an error ends the thread with one warning. metrics.jsonl still holds every row.

    Args:
        mode: "offline" writes files to be uploaded later with `wandb sync`; "online" uploads while running, and does as
            "offline" without a key.
        project: wandb's project.
        name: the run's name in wandb.
        run_dir: files go to `run_dir`/wandb; the run id is kept in `run_dir`/wandb/run_id, so that a resumed run
            continues it.
        run_config: the run's resolved configuration.
        queue_size: rows that may wait.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        name: str,
        run_dir: Path,
        run_config: Mapping[str, Any],
        queue_size: int = 1000,
    ) -> None:
        self.dropped = 0
        # One producer, so qsize() is exact enough to bound it, and the end mark always fits, unlike in a bounded Queue.
        self._rows: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._queue_size = queue_size
        self._failed = False
        self._mode, self._project, self._name = mode, project, name
        self._run_dir, self._run_config = run_dir, dict(run_config)
        self._id_file = run_dir / "wandb" / "run_id"
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Hand a row over; returns at once in every case."""
        if self._failed:
            return
        if self._rows.qsize() >= self._queue_size:
            if self.dropped == 0:
                log.warning("wandb does not keep up: rows are dropped there; metrics.jsonl holds all of them")
            self.dropped += 1
            return
        self._rows.put({"step": step, **scalars(record)})

    def close(self, timeout: float = _WANDB_CLOSE_SECONDS) -> None:
        """End the run in wandb; after `timeout` seconds leave it to itself."""
        self._rows.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("wandb did not finish in %g s and is left behind, with %d rows", timeout, self._rows.qsize() - 1)
        if self.dropped:
            log.warning("wandb is missing %d rows of this run; metrics.jsonl holds all of them", self.dropped)

    def _work(self) -> None:
        try:
            run = self._start()
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        # wandb may also leave by SystemExit; in a thread that would end it without a word.
        except BaseException as error:
            self._failed = True
            hint = ": pip install 'megagrin[wandb]'" if isinstance(error, ModuleNotFoundError) else ""
            log.warning("wandb is off for this run: %s: %s%s", type(error).__name__, error, hint)

    def _start(self) -> Any:
        import wandb

        mode = self._mode
        # Without a key wandb.init would ask for one on the terminal, from under the progress bar.
        if mode == "online" and not wandb.login(prompt=False):
            log.warning("wandb has no API key: rows are kept in %s for `wandb sync`", self._run_dir / "wandb")
            mode = "offline"
        # console: wandb must not wrap this process's output. finish_timeout also bounds wandb's own atexit hook, which
        # otherwise holds the process until every upload is through; what is not uploaded stays on disk.
        settings = {"console": "off", "silent": True, "finish_timeout": _WANDB_CLOSE_SECONDS}
        run = wandb.init(
            mode=mode,
            project=self._project,
            name=self._name,
            id=self._run_id(),
            resume="allow",
            dir=str(self._run_dir),
            config=self._run_config,
            settings=settings,
        )
        # A resumed run repeats steps; wandb's own step counter would refuse rows that go back.
        run.define_metric("*", step_metric="step")
        return run

    def _run_id(self) -> str:
        if self._id_file.exists():
            return self._id_file.read_text().strip()
        run_id = secrets.token_hex(4)
        self._id_file.parent.mkdir(parents=True, exist_ok=True)
        self._id_file.write_text(run_id + "\n")
        return run_id
