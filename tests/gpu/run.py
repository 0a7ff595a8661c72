"""Runs the test files of this folder side by side, some processes each: most of their time is compilation, which is CPU work.

python tests/gpu/run.py --limit 52 --shards 4 --junit junit.xml --peaks peaks.json
"""

import argparse
import json
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


def start(file: Path, folder: Path, shard: int, shards: int, peaks: bool) -> subprocess.Popen[bytes]:
    """pytest on every `shards`-th test of a file; its output and results go to files in `folder`.

    Not tests/conftest.py: it needs more packages.
    """
    name = f"{file.stem}.{shard}"
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
    if shards > 1:
        command += ["--shard", str(shard), "--shards", str(shards)]
    if peaks:
        command += ["--peaks", str(folder / f"{name}.json")]
    with (folder / f"{name}.txt").open("wb") as output:
        command += [f"--junitxml={folder / name}.xml", str(file)]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=HERE.parents[1])


def merge(parts: list[Path], junit: Path) -> None:
    """One junit file of several."""
    root = ElementTree.Element("testsuites")
    for part in parts:
        if part.exists():
            root.extend(ElementTree.parse(part).getroot())
    ElementTree.ElementTree(root).write(junit, encoding="utf-8", xml_declaration=True)


def add_up(parts: list[Path], peaks: Path) -> None:
    """The sum of the processes' memory peaks: no more than that was taken at any time. null where none was noted."""
    found = [json.loads(part.read_text()) for part in parts if part.exists()]
    noted = [peak for peak in found if peak is not None]
    total = {name: sum(peak[name] for peak in noted) for name in ("allocated", "reserved")}
    peaks.write_text(json.dumps(total if noted else None) + "\n")


def main() -> int:
    """Start all, wait, print one after the other; the worst status counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds until what still runs is stopped")
    parser.add_argument("--shards", type=int, default=1, help="processes for each file")
    parser.add_argument("--junit", type=Path, help="file for the results of all")
    parser.add_argument("--peaks", type=Path, help="file for the memory peaks of all")
    options = parser.parse_args()
    deadline, worst = time.monotonic() + options.limit, 0
    files = sorted(HERE.glob("test_*.py"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = [(file, shard) for file in files for shard in range(options.shards)]
        running = {key: start(key[0], folder, key[1], options.shards, options.peaks is not None) for key in keys}
        for (file, shard), process in running.items():
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = OUT_OF_TIME
            print((folder / f"{file.stem}.{shard}.txt").read_text(errors="replace"))
            part = f", part {shard + 1} of {options.shards}" if options.shards > 1 else ""
            print(f"{file.name}{part}: {'not done in time' if status == OUT_OF_TIME else f'status {status}'}", flush=True)
            worst = max(worst, verdict(status))
        names = [f"{file.stem}.{shard}" for file, shard in keys]
        if options.junit is not None:
            merge([folder / f"{name}.xml" for name in names], options.junit)
        if options.peaks is not None:
            add_up([folder / f"{name}.json" for name in names], options.peaks)
    return worst


if __name__ == "__main__":
    sys.exit(main())
