"""How `make gpu` ends before its time, and what it must leave alone: no process of it lives on, and no file of others goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_probe
import gpu_results
import gpu_run
import pytest
from gpu_stages import DRY_S, Stage

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pids: list[int]) -> bool:
    """Whether all of them end, which takes the system a moment after SIGKILL."""
    for _ in range(50):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Neither it nor its child heeds SIGTERM."""
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = deaf + "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    parent = deaf + f"subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    stage = Stage("hangs", 4, [sys.executable, "-c", parent, str(tmp_path / "pid")])
    begin = time.monotonic()
    assert gpu_run.run_stage(stage, tmp_path / "log.txt", {}) == "FAILED: not done after 4 s"
    assert time.monotonic() - begin < 60
    pid = int((tmp_path / "pid").read_text())
    assert end([pid])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_its_results_and_no_stage(tmp_path: Path, number: signal.Signals) -> None:
    """SIGINT and SIGHUP: a person's Ctrl-C, and a connection that is lost. The signal comes to whom `make` has started."""
    out = tmp_path / "out"
    environment = os.environ | {"MEGAGRIN_GPU_DRY": "1", "HALF": "first", "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "launch" / "gpu.sh")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        children: list[str] = []
        for _ in range(300):
            if (out / "stages" / "environment.json").exists():
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + number
    assert children
    assert not any(alive(int(child)) for child in children)
    (results,) = out.glob("*.md")
    assert said == f"megagrin: error: ended by {number.name}; results up to then: {results}\n"
    assert f"| first | environment | {DRY_S} | 0 | FAILED: the run ended in it | – |" in results.read_text()
    assert "| first | ops | | | not run | |" in results.read_text()


def test_a_probe_that_is_ended_ends_its_ops(tmp_path: Path) -> None:
    program = tmp_path / "planted.py"
    program.write_text(f"import os, sys, time\nopen('{tmp_path}/' + sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_probe.py"), "--out", str(tmp_path), "--program", str(program)]
    assert gpu_run.run_stage(Stage("ops", 8, command), tmp_path / "log.txt", {}) == "FAILED: not done after 8 s"
    pids = [int((tmp_path / op).read_text()) for op in gpu_probe.OPS]
    assert end(pids)


def test_a_log_that_cannot_be_written_costs_no_stage(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    stage = Stage("one", 20, [sys.executable, "-c", "print('line\\n' * (1 << 16))"])  # more than a pipe holds
    assert gpu_run.run_stage(stage, tmp_path / "log.txt", {}) == "ok"


def test_files_of_others_are_neither_removed_nor_mixed_with_a_run_s(tmp_path: Path) -> None:
    notes, results = tmp_path / "2026-01-01-notes.md", tmp_path / "log.txt"
    for path in (notes, results):
        path.write_text("mine")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_run.py"), "--out", str(tmp_path), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"megagrin: error: OUT: {tmp_path} holds files, and none of an earlier run; name a new or an empty folder"
    )
    assert [path.read_text() for path in (notes, results)] == ["mine", "mine"]
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "stages").mkdir()
    gpu_results.write(tmp_path)
    written = gpu_results.path(tmp_path)
    (tmp_path / "environment.json").write_text('{"gpu": "NVIDIA H200"}')
    gpu_results.write(tmp_path)
    assert not written.exists()
    gpu_results.forget(tmp_path)
    assert list(tmp_path.glob("*.md")) == [notes]
