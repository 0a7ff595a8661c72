"""Walks the stages of `make gpu`, each in its own process: one that fails, crashes or hangs does not stop the next.

    python benchmarks/gpu_run.py --out FOLDER [--half first|second|both] [--dry]

Before and after each stage the results file is written anew, so that a run that is ended from outside leaves one. Called by
launch/gpu.sh, which looks after Python, compiler and packages. Imports nothing beyond the standard library.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import gpu_results
from gpu_probe import OPS, read
from gpu_stages import KILL_S, Stage, first, second

ROOT = Path(__file__).resolve().parents[1]
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NO_PYTEST = "NOT RUN: no pytest; `make gpu-wheels` puts it into wheels/, which must travel along"


def _append(path: Path, line: bytes) -> None:
    """A disk that is full must not cost the measurements that follow."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as sink:
        sink.write(line)


def _copy(source: IO[bytes], log: Path) -> None:
    """A stage's output, to the terminal and the log as it comes; a stage must not wait for either of them."""
    for line in iter(source.readline, b""):
        _append(log, line)
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all that it started."""
    for number, grace in ((signal.SIGTERM, KILL_S - 1), (signal.SIGKILL, 1)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    # A child that outlived its parent's end.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _verdict(status: int | None, stage: Stage) -> str:
    if status is None:
        return f"FAILED: not done after {stage.limit_s} s"
    if status == stage.expected:
        return "ok"
    return f"FAILED: status {status}" if status >= 0 else f"FAILED: ended by {signal.Signals(-status).name}"


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Ends from outside come after the with block: in the middle of a start they would leave a process that nobody knows."""
    before, came = [signal.getsignal(number) for number in ENDS], list[int]()
    for held in ENDS:
        signal.signal(held, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for held, handler in zip(ENDS, before, strict=True):
            signal.signal(held, handler)
        for number in came:
            os.kill(os.getpid(), number)


def _start(stage: Stage, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | variables | stage.variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_stage(stage: Stage, log: Path, variables: dict[str, str]) -> str:
    """Run one stage and say how it ended."""
    if stage.needs is not None and importlib.util.find_spec(stage.needs) is None:
        return NO_PYTEST
    process: subprocess.Popen[bytes] | None = None
    status: int | None = None
    try:
        with _held_back():
            process = _start(stage, variables)
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
        reader.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(stage.limit_s)
    finally:
        if process is not None:
            _end(process)
    reader.join(2)
    return _verdict(status, stage)


def both(own: str, probed: str) -> str:
    """MEGAGRIN_KERNELS with what the user and the probe have switched off."""
    return own if own == "torch" else ",".join(dict.fromkeys([*own.split(","), *probed.split(",")]))


def kernels() -> str:
    """The user's MEGAGRIN_KERNELS, by the rules of kernels/backend.py.

    Raises:
        ValueError: another value than these.
    """
    own = os.environ.get("MEGAGRIN_KERNELS", "auto")
    first_part, *rest = own.split(",")
    if own != "torch" and (first_part != "auto" or not set(rest) <= {f"-{op}" for op in OPS}):
        allowed = " ".join(f",-{op}" for op in OPS)
        raise ValueError(f"MEGAGRIN_KERNELS: {own!r} must be auto, torch, or auto followed by any of {allowed}")
    return own


class Run:
    """One run: its folder, and what became of its stages."""

    def __init__(self, out: Path, command: str, dry: bool) -> None:
        self.out, self.command, self.dry, self.kernels = out, command, dry, kernels()
        self.log, self.summary = out / "log.txt", out / "summary.txt"
        self.date, self.words = datetime.datetime.now(datetime.UTC).date().isoformat(), list[str]()
        self.lines = list[str]()

    def say(self, text: str) -> None:
        """To the terminal, which may be gone, and the log."""
        with contextlib.suppress(OSError):
            print(text, flush=True)
        _append(self.log, f"{text}\n".encode())

    def note(self, stage: Stage, half: str, word: str, seconds: float) -> None:
        """Write down how a stage ended, and the results so far."""
        record: dict[str, Any] = {"name": stage.name, "half": half, "limit_s": stage.limit_s, "seconds": seconds}
        record |= {"word": word, "command": shlex.join(stage.command), "date": self.date, "dry": self.dry, "run": self.command}
        try:
            (self.out / "stages" / f"{stage.name}.json").write_text(json.dumps(record, indent=1) + "\n")
            gpu_results.write(self.out)
        except Exception:  # a report that cannot be written must not cost the measurements that follow
            traceback.print_exc()
            self.words.append("FAILED: no results file")

    def stage(self, stage: Stage, half: str) -> None:
        """Run one, under the kernels that the probe left on."""
        self.say(f"\n== {stage.name} (limit {stage.limit_s} s): {shlex.join(stage.command)}")
        (self.out / "stages" / f"{stage.name}.memory.json").unlink(missing_ok=True)
        self.note(stage, half, "FAILED: the run ended in it", 0.0)
        probed = read(self.out / "ops.json") if stage.name not in ("environment", "ops") else None
        variables = {"MEGAGRIN_KERNELS": both(self.kernels, probed["kernels"])} if probed else {}
        begin = time.monotonic()
        word = run_stage(stage, self.log, variables)
        if word == NO_PYTEST:
            self.say(word)
        self.words.append(word)
        self.lines.append(f"{stage.name:<12} {time.monotonic() - begin:4.0f} s  {word}")
        _append(self.summary, f"{self.lines[-1]}\n".encode())
        self.note(stage, half, word, time.monotonic() - begin)


class _Ended(BaseException):
    """By a signal from outside; no Exception, as what looks after a report that cannot be written would take it for that."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Once: a second Ctrl-C would come in the middle of ending the stage."""
    for other in ENDS:
        signal.signal(other, signal.SIG_IGN)
    raise _Ended(signal.Signals(number))


def main(argv: list[str]) -> int:
    """Status 1 where a stage failed or was not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--half", choices=("first", "second", "both"), default="both")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: measures nothing")
    parser.add_argument("--scratch", type=Path, help="folder that is removed at the end")
    options = parser.parse_args(argv)
    try:
        return _walk(options)
    finally:
        if options.scratch is not None:
            shutil.rmtree(options.scratch, ignore_errors=True)


def _walk(options: argparse.Namespace) -> int:
    out, start = options.out.resolve(), time.monotonic()
    own = f"MEGAGRIN_KERNELS={kernels()} " * (kernels() != "auto")
    command = f"{'MEGAGRIN_GPU_DRY=1 ' * options.dry}{own}make gpu{f' HALF={options.half}' * (options.half != 'both')}"
    gpu_results.check_folder(out)
    run, done = Run(out, command, options.dry), set[str]()
    for folder in ("stages", "tuned", "long"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    halves = {"first": first(out, options.dry), "second": second(out, options.dry)}
    wanted = [name for name in halves if options.half in (name, "both")]
    if "first" in wanted:  # a new run: what an older one left in this folder is none of its results
        gpu_results.forget(out)
    run.say(command)
    for number in ENDS:
        signal.signal(number, _stop)  # the stage that runs ends with it
    try:
        for half in wanted:
            for stage in halves[half]:
                if stage.name not in done:
                    run.stage(stage, half)
                done.add(stage.name)
    except _Ended as end:
        (number,) = end.args
        with contextlib.suppress(OSError):  # with SIGHUP the terminal is gone
            print(f"megagrin: error: ended by {number.name}; results up to then: {gpu_results.path(out)}", file=sys.stderr)
        return 128 + number
    print(f"\n== summary ({time.monotonic() - start:.0f} s, in {out})", *run.lines, sep="\n")
    print(f"results: {gpu_results.path(out)}")
    return 0 if set(run.words) <= {"ok"} else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as problem:
        print(f"megagrin: error: {problem}", file=sys.stderr)
        sys.exit(2)
