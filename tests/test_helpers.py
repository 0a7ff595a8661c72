"""The pool of gloo processes itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist
from common import Run, run_steps
from helpers import KEPT_THREADS, GlooPool, gloo_threads

from megagrin.distributed.mesh import ParallelConfig

KEPT: list[dist.ProcessGroup] = []


def keep_groups(count: int) -> None:
    KEPT.extend(dist.new_group([0]) for _ in range(count))


def test_workers_that_keep_groups_are_replaced() -> None:
    """Their threads wake every 10 ms: a thousand of them starve the cases that follow."""
    pool = GlooPool()
    try:
        first = pool.run(1, os.getpid)
        pool.run(1, keep_groups, 1)
        assert pool.run(1, os.getpid) == first
        pool.run(1, keep_groups, KEPT_THREADS)
        assert pool.run(1, os.getpid) != first
    finally:
        pool.close()


def test_a_case_leaves_no_threads_behind() -> None:
    """A pool that replaces its workers would hide it: of a case that leaves its groups, 36 threads a round."""
    run, pool = Run(ParallelConfig(ep=2), dtype="fp32"), GlooPool()
    try:
        workers, counts = set(), []
        for _ in range(4):
            pool.run(2, run_steps, run)
            workers |= {tuple(pool.run(2, os.getpid))}
            counts.append(max(pool.run(2, gloo_threads)))
        assert len(workers) == 1
        # A thread more or less at the moment of counting says nothing.
        assert counts[-1] < counts[0] + 36, counts
    finally:
        pool.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_a_session_that_is_killed() -> None:
    code = "from helpers import GlooPool; import os; print(*GlooPool().run(1, os.getpid), flush=True); input()"
    session = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert session.stdout is not None
    workers = [int(pid) for pid in session.stdout.readline().split()]
    session.send_signal(signal.SIGKILL)
    session.wait(30)
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 1
    assert not left
