"""TensorBoard, and wandb in every way it can go wrong. No test depends on how long anything takes, only on bounds."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megagrin.observe.metrics import MetricsConfig, MetricsLogger, read_metrics
from megagrin.observe.trackers import WandbTracker

CONFIG = MetricsConfig(console=False, wandb="offline", log_interval=1)


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    """Put a stand-in for the third party in place of wandb."""
    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def run_steps(run_dir: Path, first: int = 1, last: int = 5) -> None:
    with MetricsLogger(CONFIG, run_dir, {"lr": 0.1}, first - 1) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"loss": 1.0 / step, "load": [[1.0]], "load_max": [0.5, 0.7]})


def assert_all_rows(run_dir: Path, last: int = 5) -> None:
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, last + 1))


def test_wandb_gets_scalars_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**arguments: Any) -> FakeRun:
        runs.append((arguments, FakeRun()))
        return runs[-1][1]

    install(monkeypatch, init)
    run_steps(tmp_path / "night", 1, 3)
    run_steps(tmp_path / "night", 3, 4)
    (first, first_run), (second, second_run) = runs
    assert first_run.rows == [{"step": step, "loss": 1.0 / step, "load_max": 0.7} for step in (1, 2, 3)]
    assert [row["step"] for row in second_run.rows] == [3, 4]
    assert first_run.finished
    assert first["id"] == second["id"] == (tmp_path / "night" / "wandb" / "run_id").read_text().strip()
    assert (first["mode"], first["name"], first["resume"]) == ("offline", "night", "allow")
    assert first["config"] == {"lr": 0.1}


def test_wandb_that_raises_is_named_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: Any) -> FakeRun:
        raise ConnectionError("no route to host")

    install(monkeypatch, init)
    with caplog.at_level(logging.WARNING):
        run_steps(tmp_path)
    assert_all_rows(tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["wandb is off for this run: ConnectionError: no route to host"]


@pytest.mark.parametrize("error", [RuntimeError("socket closed"), SystemExit(1)])
def test_wandb_that_fails_later_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    class Breaks(FakeRun):
        def log(self, row: dict[str, float]) -> None:
            super().log(row)
            if row["step"] == 2:
                raise error

    run = Breaks()
    install(monkeypatch, lambda **_: run)
    with caplog.at_level(logging.WARNING):
        run_steps(tmp_path)
    assert_all_rows(tmp_path)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert [record.name for record in caplog.records] == ["megagrin.observe.trackers"]


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        run_steps(tmp_path)
    assert_all_rows(tmp_path)
    assert "pip install 'megagrin[wandb]'" in caplog.text


def test_hanging_wandb_fills_its_queue_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entered, never = threading.Event(), threading.Event()

    class Hangs(FakeRun):
        def log(self, row: dict[str, float]) -> None:
            entered.set()
            never.wait()

    install(monkeypatch, lambda **_: Hangs())
    tracker = WandbTracker("offline", "project", "name", tmp_path, {}, queue_size=3)
    tracker.log(1, {"loss": 1.0})
    assert entered.wait(60)  # the thread now holds row 1 and never comes back
    with caplog.at_level(logging.WARNING):
        for step in range(2, 12):
            tracker.log(step, {"loss": 1.0})
        assert tracker.dropped == 10 - 3
        tracker.close(timeout=0.05)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "does not keep up" in messages[0]
    assert "left behind, with 3 rows" in messages[1]
    assert "missing 7 rows" in messages[2]
    never.set()


def test_process_with_a_hanging_wandb_ends(tmp_path: Path) -> None:
    script = """
import sys, threading, types
from pathlib import Path
from megagrin.observe.trackers import WandbTracker
def hang(**_):
    threading.Event().wait()
sys.modules["wandb"] = types.ModuleType("wandb")
sys.modules["wandb"].init = hang
tracker = WandbTracker("offline", "project", "name", Path(sys.argv[1]), {})
tracker.log(1, {"loss": 1.0})
tracker.close(timeout=0.05)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120, env=environment)


def test_real_wandb_keeps_files_offline_and_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of whoever runs the test
    ids = set()
    for mode, first in (("online", 1), ("offline", 3)):
        tracker = WandbTracker(mode, "project", "name", tmp_path, {"lr": 0.1})
        with caplog.at_level(logging.WARNING):
            for step in range(first, first + 3):
                tracker.log(step, {"loss": 1.0 / step})
            tracker.close(timeout=60)
        ids.add((tmp_path / "wandb" / "run_id").read_text().strip())
    assert len(caplog.records) == 1
    assert "wandb has no API key" in caplog.text
    (run_id,) = ids
    wandb.teardown()  # ends the process wandb keeps for its runs
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)


def test_tensorboard_holds_the_scalars_and_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = MetricsConfig(console=False, tensorboard=True, log_interval=2)
    for resume_step, last in ((0, 6), (4, 8)):
        with MetricsLogger(config, tmp_path, {}, resume_step) as logger:
            for step in range(resume_step + 1, last + 1):
                logger.log(step, {"loss": float(step + resume_step), "load_max": [0.25, 0.5]})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (4, 4.0),
        (5, 9.0),
        (6, 10.0),
        (8, 12.0),
    ]
    assert {event.value for event in events.Scalars("load_max")} == {0.5}


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"megagrin\[tensorboard\]"):
        MetricsLogger(MetricsConfig(console=False, tensorboard=True), tmp_path, {}, 0)
