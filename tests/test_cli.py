"""How the `megagrin` process ends."""

import subprocess
import sys

import pytest

# `last` is dropped when the interpreter clears its modules: its message says that Python was finalized.
PROGRAM = """
import atexit, sys
from megagrin import cli
from megagrin.distributed.runtime import RuntimeConfig, session

class Last:
    def __del__(self):
        print("finalized", file=sys.stderr)

last = Last()
atexit.register(print, "handler ran")

def main():
    if sys.argv[1] == "rank":
        with session(RuntimeConfig(device="cpu")):
            pass
    print("unflushed")
    return 3

cli.main = main
cli.entry()
"""


@pytest.mark.parametrize(("process", "stderr"), [("rank", ""), ("other", "finalized\n")])
def test_a_rank_ends_without_finalizing_python(process: str, stderr: str) -> None:
    """Output, exit handlers and status arrive, and no thread of a process group can meet a finalizing interpreter."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, process], capture_output=True, text=True, timeout=120)
    assert done.stdout == "unflushed\nhandler ran\n"
    assert done.stderr == stderr
    assert done.returncode == 3


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_lost_output_is_an_error() -> None:
    """A full disk behind standard output: one line and a status that says so."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megagrin.cli", "help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == "megagrin: error: standard output: [Errno 28] No space left on device\n"
    assert done.returncode == 2
