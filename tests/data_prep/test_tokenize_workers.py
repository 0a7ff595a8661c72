"""Workers that are killed, frozen, orphaned or cannot be started: the run ends, says why and leaves nothing behind."""

import multiprocessing
import multiprocessing.popen_spawn_posix
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megagrin.data_prep.tokenize import TokenizeReport


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def strike(number: int, count: int) -> threading.Thread:
    """A thread that sends a signal to the first `count` worker processes as soon as they exist."""
    before = set(multiprocessing.active_children())

    def run() -> None:
        deadline = time.monotonic() + 60
        workers: list[multiprocessing.process.BaseProcess] = []
        while len(workers) < count and time.monotonic() < deadline:
            time.sleep(0.002)
            workers = [child for child in multiprocessing.active_children() if child not in before]
        for worker in workers[:count]:
            os.kill(worker.pid or 0, number)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "count", "timeout", "message"), [
    (signal.SIGKILL, 1, 60.0, r"near line \d+: a worker process died"),
    (signal.SIGSTOP, 2, 2.0, r"near line \d+: no answer from the worker within timeout=2 s"),
])  # fmt: skip
def test_killed_or_frozen_workers_are_an_error(
    run: Callable[..., TokenizeReport],
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    count: int,
    timeout: float,
    message: str,
) -> None:
    monkeypatch.setattr("megagrin.data_prep.tokenize._SHUTDOWN_SECONDS", 0.5)
    before = set(multiprocessing.active_children())
    thread = strike(number, count)
    with pytest.raises(ValueError, match=message):
        run(corpus, workers=2, block_bytes=500, timeout=timeout)
    thread.join(60)
    assert set(multiprocessing.active_children()) == before
    assert outputs(tmp_path) == []


def test_a_worker_frozen_without_work_does_not_hold_up_the_end(
    run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have taken a block before it froze: then the run ends with an error, but it always ends."""
    monkeypatch.setattr("megagrin.data_prep.tokenize._SHUTDOWN_SECONDS", 0.5)
    before = set(multiprocessing.active_children())
    thread = strike(signal.SIGSTOP, 1)
    with suppress(ValueError):
        run(corpus, workers=2, block_bytes=20_000, timeout=2)
    thread.join(60)
    assert set(multiprocessing.active_children()) == before


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, corpus: Path, tokenizer_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_bytes(corpus.read_bytes() * 200)  # far more than is done before the kill
    command = [sys.executable, "-m", "megagrin.cli", "data", "tokenize", str(many), "--output", str(tmp_path / "out")]
    parent = subprocess.Popen([*command, "--tokenizer", str(tokenizer_path), "--workers=2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    workers: list[int] = []
    while len(workers) < 3 and time.monotonic() < deadline:  # two workers and multiprocessing's resource tracker
        time.sleep(0.02)
        workers = children(parent.pid)
    parent.kill()
    parent.wait(60)
    alive = set(workers)
    while alive and time.monotonic() < deadline:
        time.sleep(0.02)
        for pid in list(alive):
            with suppress(ProcessLookupError):
                os.kill(pid, 0)
                continue
            alive.remove(pid)
    assert len(workers) == 3
    assert not alive
    assert outputs(tmp_path) in ([], ["out.bin.tmp"])


@pytest.mark.parametrize("noted", [False, True])
def test_a_worker_that_dies_while_the_next_one_starts_is_the_same_error(
    run: Callable[..., TokenizeReport], corpus: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    """The pool closes its pipes in another thread, before or after the next worker's start has noted their numbers.

    Before, the start finds one closed; after, a pipe made next gets its number, which would be handed on twice.
    """
    before = set(multiprocessing.active_children())
    note = multiprocessing.popen_spawn_posix.set_spawning_popen
    starting: list[multiprocessing.popen_spawn_posix.Popen] = []
    pipes, closed = list[int](), list[bool]()
    low = os.open(os.devnull, os.O_RDONLY)

    def struck(popen: multiprocessing.popen_spawn_posix.Popen | None) -> None:
        note(popen)
        if popen is not None:
            starting.append(popen)
        if len(starting) == 1:
            pipes[:] = starting[0]._fds
        elif noted == (popen is None) and not closed:
            (worker,) = set(multiprocessing.active_children()) - before
            worker.kill()
            deadline = time.monotonic() + 10
            while all(map(is_open, pipes)) and time.monotonic() < deadline:
                time.sleep(0.002)
            closed.append(not all(map(is_open, pipes)))
            os.close(low)  # for the parent's end of the first pipe, which is not handed on; the next end gets the pool's number

    monkeypatch.setattr("multiprocessing.popen_spawn_posix.set_spawning_popen", struck)
    with pytest.raises(ValueError, match=r"near line \d+: a worker process died"):
        run(corpus, workers=2, block_bytes=500, timeout=60)
    assert len(closed) == 1  # closed, or kept from it by a lock, as in Python 3.12


def is_open(descriptor: int) -> bool:
    with suppress(OSError):
        return bool(os.fstat(descriptor))
    return False


def test_a_worker_that_cannot_be_started_is_not_called_dead(
    run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", refuse)
    with pytest.raises(ValueError, match=r"workers: .*Resource temporarily unavailable"):
        run(corpus, workers=2)
    assert outputs(tmp_path) == []
