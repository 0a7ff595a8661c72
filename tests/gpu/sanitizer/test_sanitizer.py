"""compute-sanitizer over a small layer: accesses out of bounds, races in shared memory. Slow to start, so apart from the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")


def sanitizer() -> str | None:
    """The tool, where it is installed."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_errors(tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer here")
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(HERE.parents[2])}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "small_layer.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=70)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "loss" in done.stdout
