"""Runs a Python program under the memory limit of device_memory.py and writes its peaks down, however it ends.

python benchmarks/capped.py PEAKS.json benchmarks/moe_layer.py [ARGUMENTS]
python benchmarks/capped.py PEAKS.json -m megagrin.cli [ARGUMENTS]
"""

import atexit
import json
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

import device_memory


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str]) -> int:
    """Become the program; SIGTERM ends it like an exception, so that the peaks of a program out of time are known."""
    peaks, program, arguments = Path(argv[0]), argv[1], argv[2:]
    signal.signal(signal.SIGTERM, _stop)
    device_memory.cap()
    # Not `finally`: megagrin's command line may end without unwinding, but runs these.
    atexit.register(lambda: peaks.write_text(json.dumps(device_memory.peaks()) + "\n"))
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
