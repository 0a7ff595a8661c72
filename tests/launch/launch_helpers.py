"""What the launch tests share."""

import json
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# From a cold start of torch on two busy cores to the end of a tiny run, with room.
WAIT_S = 240.0


def wait_until(reached: Callable[[], bool], running: Callable[[], bool], log: Callable[[], str], seconds: float = WAIT_S) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: what should reach it has ended, or the time is up; holds the log.
    """
    deadline = time.monotonic() + seconds
    while not reached():
        assert running() or reached(), f"ended before that\n{log()}"
        assert time.monotonic() < deadline, f"not within {seconds} s\n{log()}"
        time.sleep(0.2)


def last_step(run_dir: Path) -> int:
    """The newest step in a run's metrics."""
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
