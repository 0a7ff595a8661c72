"""`make gpu` without a GPU: refused in one line; as a dry run every stage is walked, and a failing one does not stop the next."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["tests", "benchmark", "model", "training", "tune", "tuned", "profile", "sanitizer"]
# What a machine for `make gpu` has, beside what these bring.
BARE = {"torch", "triton", "numpy", "pytest"}
# Installed here, not there: sitecustomize of the dry run hides them.
ABSENT = ("sentencepiece", "safetensors", "jsonargparse", "docstring_parser", "yaml", "rich", "transformers", "tokenizers")
ABSENT += ("matplotlib", "tensorboard", "wandb", "hypothesis", "pytest_timeout", "deepspeed", "megatron")
HIDE = f"""
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def found(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT!r} else find_spec(name, path, target)
PathFinder.find_spec = classmethod(found)
"""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run `make gpu`")


def run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | variables
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == ["megagrin: error: make gpu: torch sees no GPU here; MEGAGRIN_GPU_DRY=1 walks the stages on the CPU"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("compiler", "headers", "message"),
    [(False, True, "no C compiler"), (True, False, "has no Python.h"), (True, True, "OUT: cannot create")],
)
def test_what_triton_builds_with_is_asked_for_first(tmp_path: Path, compiler: bool, headers: bool, message: str) -> None:
    """On a machine whose Python, a stand-in, says that it has a GPU."""
    for name in ("bash", "env", "dirname", "mkdir"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n[[ $2 != *Python.h* ]] || exit {int(not headers)}\n")
    python.chmod(0o755)
    if compiler:
        (tmp_path / "gcc").symlink_to("/bin/true")
    environment = {"PATH": str(tmp_path), "PYTHON": str(python), "OUT": "/dev/null/out"}
    script = str(ROOT / "launch" / "gpu.sh")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_dry_run_walks_all_stages(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a bare machine: every package that is not promised there cannot be imported."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(HIDE)
    done = run(tmp_path, MEGAGRIN_GPU_DRY="1", PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [(words[0], words[3]) for words in summary] == [(stage, "ok") for stage in STAGES]
    written = {path.name for path in tmp_path.iterdir()}
    expected = {
        "environment.txt",
        "log.txt",
        "summary.txt",
        "junit.xml",
        "moe_layer.json",
        "moe_layer.md",
        "model_step.json",
        "tuned",
    }
    assert written == expected
    log = (tmp_path / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("== ")] == STAGES
    assert "skipped" in log
    assert "failed" not in log.lower().replace("failed:", "")


def _loaded_imports(nodes: list[ast.stmt]) -> Iterator[str]:
    """Names that are imported when a module is loaded: not those inside functions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _loaded_imports([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def _foreign_imports(path: Path, seen: set[Path]) -> Iterator[str]:
    """Packages, neither ours nor the standard library's, that come with a file of ours, through all that it imports."""
    seen.add(path)
    for name in _loaded_imports(ast.parse(path.read_text()).body):
        folders = (ROOT, path.parent)
        ours = [file for folder in folders if (file := folder / f"{name.replace('.', '/')}.py").exists()]
        if ours and ours[0] not in seen:
            yield from _foreign_imports(ours[0], seen)
        first = name.partition(".")[0]
        if not ours and first != "megagrin" and first not in sys.stdlib_module_names:
            yield f"{first} in {path.relative_to(ROOT)}"


def test_a_bare_machine_has_all_that_is_imported() -> None:
    entries = [
        ROOT / "megagrin" / "planning" / "kernel_tuning.py",
        ROOT / "megagrin" / "cli.py",
        *(ROOT / "tests" / "gpu").rglob("*.py"),
    ]
    entries += [ROOT / "benchmarks" / name for name in ("moe_layer.py", "model_step.py", "tiny_training.py")]
    beside = {path.stem for folder in ("tests/gpu", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    seen: set[Path] = set()
    found = {use for entry in entries for use in _foreign_imports(entry, seen)}
    assert len(seen) > 40
    assert {use for use in found if use.split()[0] not in BARE | beside} == set()


def gpu_tests_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tests_program", ROOT / "tests" / "gpu" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_a_test_file_that_crashes_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access can end the process by a signal: its status is negative, and no test is reported as failed."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    mark = "import os, pytest\n@pytest.mark.gpu\ndef test_it():\n    "
    (folder / "test_dies.py").write_text(mark + "os.kill(os.getpid(), 9)\n")
    (folder / "test_lives.py").write_text(mark + "pass\n")
    program = gpu_tests_program()
    monkeypatch.setattr(program, "HERE", folder)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(sys, "argv", ["run.py", "--limit", "60"])
    assert program.main() == 128 + 9
    (folder / "test_dies.py").unlink()
    assert program.main() == 0


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


def test_limits_of_each_half_together_stay_under_nine_minutes() -> None:
    """Each half is one command on a machine whose commands end after ten."""
    script = (ROOT / "launch" / "gpu.sh").read_text()
    halves = [script.split(f"\n{name}() {{\n")[1].split("\n}\n")[0] for name in ("first", "second")]
    limits = [[int(line.split()[1]) for line in half.splitlines() if line.strip().startswith("stage ")] for half in halves]
    assert sum(map(len, limits)) == len(STAGES)
    for half in limits:
        assert sum(half) <= 9 * 60 - 15  # the environment, and the first import of torch
