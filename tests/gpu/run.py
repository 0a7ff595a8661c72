"""Runs the test files of this folder side by side, one process each: most of their time is compilation, which is CPU work.

python tests/gpu/run.py --limit 95 --junit junit.xml
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_TESTS, OUT_OF_TIME = 5, 124


def verdict(returncode: int) -> int:
    """0 where all is well; a process that a signal ended (negative) has failed, as the shell counts it."""
    return 0 if returncode == NO_TESTS else returncode if returncode >= 0 else 128 - returncode


def start(file: Path, folder: Path) -> subprocess.Popen[bytes]:
    """pytest on one file; its output and results go to files in `folder`. Not tests/conftest.py: it needs more packages."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        f"--confcutdir={HERE}",
        "-p",
        "no:cacheprovider",
        "-rs",
        "--durations=3",
    ]
    with (folder / f"{file.stem}.txt").open("wb") as output:
        command += [f"--junitxml={folder / file.stem}.xml", str(file)]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parents[1])


def merge(parts: list[Path], junit: Path) -> None:
    """One junit file of several."""
    root = ElementTree.Element("testsuites")
    for part in parts:
        if part.exists():
            root.extend(ElementTree.parse(part).getroot())
    ElementTree.ElementTree(root).write(junit, encoding="utf-8", xml_declaration=True)


def main() -> int:
    """Start all, wait, print one after the other; the worst status counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds until what still runs is stopped")
    parser.add_argument("--junit", type=Path, help="file for the results of all")
    options = parser.parse_args()
    deadline, worst = time.monotonic() + options.limit, 0
    files = sorted(HERE.glob("test_*.py"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {file: start(file, folder) for file in files}
        for file, process in running.items():
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = OUT_OF_TIME
            print((folder / f"{file.stem}.txt").read_text(errors="replace"))
            print(f"{file.name}: {'not done in time' if status == OUT_OF_TIME else f'status {status}'}", flush=True)
            worst = max(worst, verdict(status))
        if options.junit is not None:
            merge([folder / f"{file.stem}.xml" for file in files], options.junit)
    return worst


if __name__ == "__main__":
    sys.exit(main())
