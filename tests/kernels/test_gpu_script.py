"""`make gpu` without a GPU: refused in one line; as a dry run every stage is walked, and a failing one does not stop the next.

The dry runs have a Python of their own, which holds what a machine with a GPU is promised to hold.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bare_machine
import gpu_stages
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["environment", "ops", "tests", "layer", "step", "quickstart"]
SECOND = ["environment", "ops", "tune", "tuned", "profile", "long", "sanitizer"]
# What a machine for `make gpu` has, beside what these bring.
BARE = {"torch", "triton", "numpy", "pytest"}
# What is installed here and must not be there.
HERE_ONLY = ("pytest", "yaml", "jsonargparse", "rich", "safetensors", "sentencepiece", "transformers", "megagrin")
PROGRAMS = ("moe_layer.py", "model_step.py", "quickstart_model.py", "capped.py", "gpu_run.py", "gpu_op.py", "gpu_environment.py")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run `make gpu`")


def run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | variables
    for name in ("TRITON_INTERPRET", "MEGAGRIN_KERNELS", "HALF"):
        if name not in variables:
            environment.pop(name, None)
    return subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)


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


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HALF": "third"}, "HALF: 'third' must be first, second or both"),
        ({"MEGAGRIN_GPU_DRY": "yes"}, "MEGAGRIN_GPU_DRY: 'yes' must be 0 or 1"),
        ({"MEGAGRIN_GPU_DRY": "1", "OUT": "/dev/null/out"}, "OUT: cannot create /dev/null/out, or not write into it"),
        (
            {"MEGAGRIN_GPU_DRY": "1", "MEGAGRIN_KERNELS": "auto,-all"},
            "MEGAGRIN_KERNELS: 'auto,-all' must be auto, torch, or auto",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_refused_in_one_line(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    done = run(tmp_path / "out", **variables)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert lines[0].startswith(f"megagrin: error: {message}")
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that name the bare Python and the wheels it is given."""
    folder = tmp_path_factory.mktemp("machine")
    python = bare_machine.python(folder / "python")
    code = f"import importlib.util as i; print([n for n in {HERE_ONLY!r} if i.find_spec(n)])"
    assert subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    return {"PYTHON": str(python), "WHEELS": str(bare_machine.wheels(folder / "wheels")), "MEGAGRIN_GPU_DRY": "1"}


def summary(out: Path) -> dict[str, str]:
    """Stage to how it ended, in order."""
    lines = (out / "summary.txt").read_text().splitlines()
    return {line.split()[0]: line.split(maxsplit=3)[3] for line in lines}


@pytest.mark.slow
def test_a_dry_run_walks_the_first_half(tmp_path: Path, machine: dict[str, str]) -> None:
    done = run(tmp_path, HALF="first", **machine)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert summary(tmp_path) == dict.fromkeys(FIRST, "ok")
    (results,) = tmp_path.glob("*-dry-run.md")
    written = {path.name for path in tmp_path.iterdir()} - {results.name}
    expected = {"environment.json", "log.txt", "summary.txt", "junit.xml", "moe_layer.json", "moe_layer.md", "model_step.json"}
    assert written == expected | {"ops.json", "quickstart.json", "stages", "tuned", "long"}
    log = (tmp_path / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("== ")] == FIRST
    assert "skipped" in log
    assert "failed" not in log.lower().replace("failed:", "")
    text = results.read_text()
    assert text.startswith("# A dry run of `make gpu`: it measured nothing\n")
    assert "0 met, 0 missed" in text
    assert "| second | tune | | | not run | |" in text


# Dies before anything is imported, as a kernel with an illegal access may end its process.
PLANTED = """
import os, signal, sys
if [part.rpartition("/")[2] for part in sys.orig_argv[1:3]] == ["gpu_op.py", "permute"]:
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.slow
def test_a_second_half_survives_a_kernel_and_a_stage_that_fail(tmp_path: Path, machine: dict[str, str]) -> None:
    """An op whose process dies, a folder in the way of a stage's JSON file, no wheels: each is named, and the rest goes on."""
    planted, out = tmp_path / "planted", tmp_path / "out"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED)
    (out / "tuned" / "moe_layer.json").mkdir(parents=True)
    (out / "stages").mkdir()  # of a first half
    done = run(out, HALF="second", **(machine | {"WHEELS": str(tmp_path / "none")}), PYTHONPATH=str(planted))
    assert done.returncode != 0
    ends = summary(out)
    assert list(ends) == SECOND
    assert ends.pop("ops") == ends.pop("tuned") == "FAILED: status 1"
    assert ends.pop("sanitizer").startswith("NOT RUN: no pytest; `make gpu-wheels`")
    assert done.stdout.count("\nNOT RUN: no pytest") == 1
    assert set(ends.values()) == {"ok"}
    (results,) = out.glob("*-dry-run.md")
    text = results.read_text()
    assert "- **Kernels:** `MEGAGRIN_KERNELS=auto,-permute`." in text
    failures = text.partition("## What failed")[2].partition("## Not measured")[0]
    for line in (
        "stage ops: FAILED",
        "stage tuned: FAILED: status 1",
        "stage sanitizer: NOT RUN",
        "kernel permute: ended by SIGSEGV",
    ):
        assert f"- {line}" in failures
    step, long = (json.loads((out / folder / "model_step.json").read_text()) for folder in ("tuned", "long"))
    assert (step["tokens"], long["tokens"]) == (4 * 64, 512)
    assert [result["routing"] for result in step["results"]] == ["learned", "forced balance"]
    assert step["profile"][0]["ms"] >= step["profile"][-1]["ms"] >= 0
    assert "torch sees no CUDA device; block sizes can only be measured on a GPU" in (out / "log.txt").read_text()


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
    entries += [ROOT / "benchmarks" / name for name in PROGRAMS]
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


@pytest.mark.parametrize("half", ["first", "second"])
def test_limits_of_each_half_together_fit_one_command(half: str) -> None:
    """Also where every stage hangs and has to be killed."""
    stages = {"first": gpu_stages.first, "second": gpu_stages.second}[half](Path("out"), False)
    assert [stage.name for stage in stages] == {"first": FIRST, "second": SECOND}[half]
    assert gpu_stages.MOST_S == {"first": 300, "second": 360}
    worst = gpu_stages.START_S + sum(stage.limit_s + gpu_stages.KILL_S for stage in stages)
    assert worst <= gpu_stages.MOST_S[half]
    for stage in stages:  # a budget that is no shorter than the limit would never be used
        for option in ("--seconds", "--limit"):
            if option in stage.command:
                assert float(stage.command[stage.command.index(option) + 1]) <= stage.limit_s - 3


def test_limits_in_the_documentation_are_those_of_the_stages() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    stages = {stage.name: stage for half in (gpu_stages.first, gpu_stages.second) for stage in half(Path("out"), False)}
    for name, stage in stages.items():
        assert f"| {name} | {stage.limit_s} s |" in text


def test_wheels_are_for_a_version_of_python() -> None:
    environment = os.environ | {"PYTHON_VERSION": "three"}
    done = subprocess.run(["make", "gpu-wheels"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "megagrin: error: PYTHON_VERSION: 'three' must look like 3.12"


def test_shards_deal_every_test_once() -> None:
    """tests/gpu/conftest.py, whose hook is given the tests of one file."""
    spec = importlib.util.spec_from_file_location("gpu_conftest", ROOT / "tests" / "gpu" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    dealt: list[Any] = []
    for shard in range(3):
        options = {"--shard": shard, "--shards": 3}
        items = [SimpleNamespace(path=Path("/elsewhere/test_x.py"), number=number) for number in range(7)]
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=options.get), items)
        assert len(items) in (2, 3)
        dealt += items
    assert sorted(item.number for item in dealt) == list(range(7))


def test_memory_peaks_of_the_tests_are_added_up(tmp_path: Path) -> None:
    program = gpu_tests_program()
    for name, text in (("a", '{"allocated": 1.5, "reserved": 2.0}'), ("b", '{"allocated": 3.0, "reserved": 4.0}'), ("c", "null")):
        (tmp_path / name).write_text(text)
    program.add_up([tmp_path / name for name in "abcd"], tmp_path / "sum")
    assert (tmp_path / "sum").read_text() == '{"allocated": 4.5, "reserved": 6.0}\n'
    program.add_up([tmp_path / "c"], tmp_path / "sum")
    assert (tmp_path / "sum").read_text() == "null\n"
