"""compute-sanitizer over a small layer: accesses out of bounds, races in shared memory. Slow to start, so apart from the rest."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")


def sanitizer() -> str | None:
    """The tool, where it is installed."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


TOOLS = ("memcheck", "racecheck")
# Of both together: the stage of `make gpu` ends soon after, and would leave no report.
LIMIT_S = 36


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path, float]]]:
    """Both tools at once, each with its output: most of their time is the start of torch under them."""
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer here")
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    deadline = time.monotonic() + LIMIT_S
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(HERE.parents[2])}
    running = {}
    for tool in TOOLS:
        path = tmp_path_factory.mktemp("sanitizer") / f"{tool}.txt"
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "small_layer.py")]
        with path.open("wb") as output:
            running[tool] = (subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT), path, deadline)
    yield running
    for process, *_ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("tool", TOOLS)
def test_no_errors(tool: str, started: dict[str, tuple[subprocess.Popen[bytes], Path, float]]) -> None:
    process, path, deadline = started[tool]
    status = process.wait(max(0.1, deadline - time.monotonic()))
    text = path.read_text(errors="replace")
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this machine")
    assert status == 0, text[-6000:]
    assert "loss" in text
