"""`make gpu` without a GPU: refused in one line; as a dry run every stage is walked, and a failing one does not stop the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["tests", "tune", "benchmark", "model", "sanitizer", "training"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run `make gpu`")


def run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | variables
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == ["megagrin: error: make gpu: torch sees no GPU here; MEGAGRIN_GPU_DRY=1 walks the stages on the CPU"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_walks_all_stages(tmp_path: Path) -> None:
    done = run(tmp_path, MEGAGRIN_GPU_DRY="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [(words[0], words[3]) for words in summary] == [(stage, "ok") for stage in STAGES]
    written = {path.name for path in tmp_path.iterdir()}
    expected = {"environment.txt", "log.txt", "summary.txt", "junit.xml", "moe_layer.json", "moe_layer.md", "model_step.json"}
    assert written == expected
    log = (tmp_path / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("== ")] == STAGES
    assert "skipped" in log
    assert "failed" not in log.lower().replace("failed:", "")


@pytest.mark.slow
def test_a_failing_stage_does_not_stop_the_next(tmp_path: Path) -> None:
    """A folder is in the way of the JSON file of the benchmark."""
    (tmp_path / "moe_layer.json").mkdir()
    done = run(tmp_path, MEGAGRIN_GPU_DRY="1")
    assert done.returncode != 0
    summary = {line.split()[0]: line for line in (tmp_path / "summary.txt").read_text().splitlines()}
    assert list(summary) == STAGES
    assert "FAILED: status 1" in summary["benchmark"]
    assert all(line.endswith("ok") for name, line in summary.items() if name != "benchmark")


def test_limits_of_all_stages_together_stay_under_nine_minutes() -> None:
    lines = (ROOT / "launch" / "gpu.sh").read_text().split("\nelse\n")[1].splitlines()
    limits = [int(line.split()[1]) for line in lines if line.strip().startswith("stage ")]
    assert len(limits) == len(STAGES)
    assert sum(limits) <= 9 * 60 - 15  # the environment, and the first import of torch
