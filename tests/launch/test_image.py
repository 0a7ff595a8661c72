"""The Dockerfile's CPU image without a docker engine: its commands, in order, in a fresh virtual environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import ROOT

INSTRUCTION = re.compile(r"^([A-Z]+) +(.*)$", re.DOTALL)


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of one build stage as (keyword, rest), continuation lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    instructions = [INSTRUCTION.match(text) for text in "\n".join(lines).replace("\\\n", " ").splitlines()]
    found: list[tuple[str, str]] = []
    inside = False
    for instruction in instructions:
        assert instruction is not None
        if instruction[1] == "FROM":
            inside = instruction[2].endswith(f" AS {name}")
        elif inside:
            found.append((instruction[1], instruction[2]))
    return found


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="downloads and installs packages; set CI=true to run it")
@pytest.mark.timeout(1200)
def test_the_cpu_stage_installs_a_megagrin_that_runs(tmp_path):
    context, workspace, venv = tmp_path / "context", tmp_path / "workspace", tmp_path / "venv"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split("\0")[:-1]:
        if (ROOT / name).exists():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{venv}/bin:{environment['PATH']}"

    instructions = stage("cpu")
    assert [keyword for keyword, _ in instructions if keyword == "ENTRYPOINT"], "no such stage, or the stage is not parsed"
    for keyword, rest in instructions:
        rest = rest.replace("/opt/megagrin", str(context)).replace("/workspace", str(workspace))
        if keyword == "ARG":
            environment.setdefault(*rest.split("=", 1))
        elif keyword == "ENV":
            environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif keyword == "RUN":
            subprocess.run(["bash", "-o", "pipefail", "-c", rest], cwd=context, env=environment, check=True, timeout=900)

    assert ("ENTRYPOINT", '["megagrin"]') in instructions
    for arguments in (["--help"], ["train", "--help"]):
        shown = subprocess.run(
            ["megagrin", *arguments], cwd=workspace, env=environment, capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        assert "megagrin" in shown.stdout
    refused = subprocess.run(["megagrin", "train"], cwd=workspace, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.startswith("megagrin: error: data.train")
    where = "import megagrin.kernels.permute as m, torch; print(m.__file__, torch.__version__)"
    found = subprocess.run(
        [f"{venv}/bin/python", "-c", where], cwd=workspace, env=environment, capture_output=True, text=True, timeout=120
    )
    path, version = found.stdout.split()
    assert Path(path).is_relative_to(context)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert version.split("+")[0] == pinned[1]
