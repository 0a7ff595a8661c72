"""Writes down what a run of `make gpu` stands on: hardware, versions, code.

    python benchmarks/gpu_environment.py --out FOLDER [--dry]

Leaves environment.json, without anything that differs between two runs on one machine, and prints nvidia-smi's page.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from moe_report import environment

ROOT = Path(__file__).resolve().parents[1]


def _output(*command: str) -> str:
    """What a program prints; empty where it is absent or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=8, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def code() -> dict[str, str]:
    """The commit, and a digest of the kernels: a copy of a checkout may have another history, or none."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    commit = _output("git", "log", "-1", "--format=%H") or "unknown"
    if _output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {"commit": commit, "kernels": digest.hexdigest()[:16]}


def main(argv: list[str]) -> int:
    """Write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="a dry run, which measures nothing")
    options = parser.parse_args(argv)
    found = {**environment(), **code(), "gpu": "dry run"}
    if not options.dry:
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = found["driver"].partition(",")[0]  # clocks and power change from call to call
    (options.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(_output("nvidia-smi") or "no nvidia-smi")
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
