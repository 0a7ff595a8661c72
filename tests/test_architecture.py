"""Floors, sizes and import names: growth in the wrong direction is noticed when it happens."""

import ast
import importlib
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_KERNEL_LINES = 150  # a Triton kernel is one loop nest, and calls cost it readability more than length does

# Imports go down, or sideways inside one folder without cycles. The longest matching name counts.
FLOORS = {
    "megagrin": 0,
    "megagrin.kernels": 0,
    "megagrin.data_prep": 0,
    "megagrin.settings": 0,
    "megagrin.rng": 0,
    "megagrin.distributed": 1,
    "megagrin.nn": 2,
    "megagrin.moe": 2,
    "megagrin.data": 2,
    "megagrin.optim": 2,
    "megagrin.models": 3,
    "megagrin.planning": 4,
    "megagrin.checkpoint": 4,
    "megagrin.parallel": 5,
    "megagrin.observe": 5,
    "megagrin.engines": 6,
    "megagrin.inference": 6,
    "megagrin.hf": 7,
    "megagrin.training": 8,
    "megagrin.cli": 9,
}


def _modules() -> dict[str, Path]:
    modules = {}
    for folder, name in [("megagrin", "megagrin"), ("kernels", "megagrin.kernels"), ("data_prep", "megagrin.data_prep")]:
        for path in (ROOT / folder).rglob("*.py"):
            if not any(part.is_symlink() for part in path.parents):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                modules[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = _modules()


def _floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def _imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, also inside functions and conditions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("megagrin"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megagrin"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def test_every_module_has_a_floor() -> None:
    """A new top-level module must be placed; nothing falls to the floor of the package by accident."""
    packages = {name.rpartition(".")[0] for name in MODULES}
    placed_folders = set(FLOORS) - {"megagrin"}
    modules = [name for name in MODULES if name not in packages]
    unplaced = [name for name in modules if name not in FLOORS and name.rpartition(".")[0] not in placed_folders]
    assert unplaced == []
    gone = [name for name in FLOORS if name not in MODULES and not any(module.startswith(f"{name}.") for module in MODULES)]
    assert gone == []


def test_the_document_shows_these_floors() -> None:
    """docs/architecture.md has every room on its floor."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    shown = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}
    assert shown == {name.partition(".")[2]: floor for name, floor in FLOORS.items() if name != "megagrin"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    """Down, or sideways inside one folder."""
    for imported in _imports(MODULES[module]):
        if imported == "megagrin":
            continue
        same_folder = imported.rpartition(".")[0] == module.rpartition(".")[0]
        assert _floor(imported) < _floor(module) or (same_folder and _floor(imported) == _floor(module)), (
            f"{module} (floor {_floor(module)}) imports {imported} (floor {_floor(imported)})"
        )


def test_no_import_cycles() -> None:
    """Also not sideways."""
    graph = {module: {name for name in _imports(path) if name in MODULES} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_know_nothing_of_the_rest() -> None:
    """Kernels can be lifted out: torch, triton and each other."""
    for module, path in MODULES.items():
        if module.startswith("megagrin.kernels."):
            assert all(name.startswith("megagrin.kernels.") for name in _imports(path)), module


def _sources() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in tracked.splitlines() if not (ROOT / name).is_symlink() and (ROOT / name).exists()]


def _is_triton_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_sizes() -> None:
    """Files under 400 lines, functions under 60, Triton kernels under 150."""
    too_long = []
    for path in _sources():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > (MAX_KERNEL_LINES if _is_triton_kernel(node) else MAX_FUNCTION_LINES):
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert too_long == []


def test_import_names() -> None:
    """The two folders are reached through symlinks and never as top-level packages: `kernels` is somebody else's name."""
    for name in ("kernels", "data_prep"):
        link = ROOT / "megagrin" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
    module = importlib.import_module("megagrin.kernels.grouped_gemm")
    assert Path(str(module.__file__)).resolve() == ROOT / "kernels" / "grouped_gemm.py"
    setup = (ROOT / "setup.py").read_text()
    assert "package_dir" not in setup


def _outer_imports(path: Path) -> set[str]:
    """Every module that a file imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return names


def test_optional_packages_are_imported_late() -> None:
    """The core imports without any extra, and without Triton: files of kernels import it, and others import those late."""
    extras = {"transformers", "wandb", "matplotlib", "tensorboard", "deepspeed", "apex", "tokenizers"}
    for module, path in MODULES.items():
        outer = _outer_imports(path)
        assert not extras & {name.split(".")[0] for name in outer}, module
        if not module.endswith("_triton"):
            assert not any(name.split(".")[0] == "triton" or name.endswith("_triton") for name in outer), module
