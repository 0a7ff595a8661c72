"""The launch scripts' surface: they parse, and they refuse what cannot run in one line, before torchrun is started.

Runs over several ranks, machines and SLURM nodes are in tests/launch/.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/launch/*.sh"), ROOT / ".ci/run"])
STEERING = ("NPROC", "NNODES", "HEAD", "PORT", "RDZV_ID", "LOG_DIR", "MAX_RESTARTS", "SHUTDOWN_TIMEOUT")


def tool(name: str) -> str | None:
    """A program of this environment, or of the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in STEERING}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([str(ROOT / script), *arguments], env=environment, capture_output=True, text=True, timeout=120)


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line, or one line and an indented list; torchrun would add a traceback and end with status 1."""
    assert result.returncode == 2, result.stderr
    first, *rest = result.stderr.splitlines()
    assert "megagrin: error: " in first
    assert all(line.startswith("  ") for line in rest), result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse_and_stop_at_the_first_error(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    if script.name != "common.sh":  # sourced by scripts that have set it
        assert "\nset -euo pipefail\n" in script.read_text()
        assert os.access(script, os.X_OK)


def test_shellcheck_finds_nothing():
    shellcheck = tool("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    checked = subprocess.run([shellcheck, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_a_number_of_ranks_that_does_not_fit_is_refused(tmp_path):
    for nproc in ("0", "two", "-1", "08"):
        assert_refused(run("launch/local.sh", "--nproc", nproc), "--nproc", nproc, "integer of at least 1")
    refused = run("launch/local.sh", "--nproc=3", "--", "--parallel.ep=2", "--data.train", str(tmp_path / "none"))
    assert_refused(refused, "parallel.ep: 2 must divide the number of ranks (3)")


def test_a_misspelt_key_is_refused():
    assert_refused(run("launch/local.sh", "--train.stepz=3"), "train.stepz", "did you mean train.steps?")


def test_missing_data_is_refused_also_where_a_job_manager_has_set_rank(tmp_path):
    arguments = ["--nproc", "2", "--", "--data.train", str(tmp_path / "none")]
    assert_refused(run("launch/local.sh", *arguments, RANK="5", WORLD_SIZE="64"), str(tmp_path / "none"))


def test_environment_variables_are_checked():
    assert_refused(run("launch/local.sh", PYTHON="no-such-python"), "PYTHON", "no-such-python")
    for name in ("JOIN_TIMEOUT", "PORT"):
        refused = run("launch/multinode.sh", "--head", "a", "--nnodes", "2", "--id", "x", **{name: "soon"})
        assert_refused(refused, name.lower() if name == "PORT" else name, "'soon'")


def test_a_question_is_answered_by_one_process(tmp_path):
    answer = run("launch/local.sh", "--nproc", "4", "--", "--help")
    assert answer.returncode == 0
    assert answer.stdout.count("usage: megagrin train") == 1


def test_multinode_names_everything_that_is_missing():
    assert_refused(run("launch/multinode.sh"), "--head", "--nnodes", "--id")
    refused = run("launch/multinode.sh", "--nnodes", "2", HEAD="node0")
    assert_refused(refused, "--id")
    assert "--head" not in refused.stderr
    assert_refused(run("launch/multinode.sh", "--head"), "--head: a value must follow")


def test_multinode_takes_cpu_ranks_only_when_asked():
    result = run("launch/multinode.sh", "--head", "a", "--nnodes", "2", "--id", "x", CUDA_VISIBLE_DEVICES="")
    assert_refused(result, "--nproc", "no GPU that torch sees")


def test_a_node_with_too_few_gpus_is_refused_where_gpus_are_required():
    options = ["--head", "a", "--nnodes", "2", "--id", "x", "--nproc", "8"]
    result = run("launch/multinode.sh", *options, CUDA_VISIBLE_DEVICES="", REQUIRE_GPUS="1")
    assert_refused(result, "torch sees 0 GPUs on this node, but 8 ranks")


def test_slurm_script_outside_its_checkout_says_so(tmp_path):
    result = run("launch/slurm.sbatch", SLURM_SUBMIT_DIR=str(tmp_path), MEGAGRIN_HOME="")
    assert_refused(result, str(tmp_path), "MEGAGRIN_HOME")


def test_every_pip_install_of_the_dockerfile_follows_the_constraints():
    installs = re.findall(r"pip install .*", (ROOT / "Dockerfile").read_text())
    assert len(installs) == 3
    assert all(re.search(r" -c (/tmp/)?constraints\.txt ", install) for install in installs)


def test_hadolint_finds_nothing():
    hadolint = tool("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here")
    checked = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_ci_runs_the_make_targets_and_pre_commit_runs_the_same_tools():
    script = (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^stage .* make(?: \S+=\S+)* (\S+)$", script, re.MULTILINE)
    assert targets == ["setup", "test", "lint", "types", "hooks", "test-slow", "quickstart", "control"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        program = hook["entry"].split()[0].replace(".venv/", "$(VENV)/").replace("$(VENV)/bin", "$(BIN)")
        assert program in makefile, f"{hook['id']}: make has no {program}"
