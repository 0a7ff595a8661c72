"""Mutation testing of megagrin/ and data_prep/, `make mutants`: what the fast tests cannot see.

    python tests/mutants/run.py [FILE ...] [--sample N] [--seed S] [--without PATTERN] [--output FILE] [--again FILE]

Importing torch takes seconds and a module has hundreds of mutants, so nothing is started anew: one process per module collects
the tests of its room and runs them once while it notes which lines each test reaches; then it forks for every mutant, puts the
changed code into the functions of the fork and runs the tests that reach the statement, quickest first, until one fails. Where
the change is one of the import (a table, a default), the fork is made before the package is imported: a second more.

Tests that start ranks or commands are left out: their processes have the code of the disk. A statement that no other fast test
reaches is counted apart as `unreached`: ranks, commands in processes of their own, and slow tests may reach it.

A survivor that is accepted stands in accepted.yaml with its reason. The exit status is 1 where another one survives.
"""

import argparse
import functools
import gc
import importlib.machinery
import json
import os
import random
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from mutate import Mutant, mutants  # noqa: E402

IGNORED: list[str] = []  # of --without
LONGEST: list[float] = []  # of --longest
# What runs a room's code beside the tests of its own folder.
STEP = "tests/training/test_run_values.py"  # one step of a whole run against formulas
TESTS = {
    "megagrin/rng.py": ["tests/test_rng.py", "tests/test_rng_values.py", "tests/moe/test_router.py"],
    "megagrin/moe/balance.py": ["tests/moe/test_balance.py", "tests/moe/test_moe_values.py", STEP],
    "megagrin/nn/rope.py": ["tests/models/test_model.py", "tests/models/test_rope_values.py"],
    "megagrin/planning/flops.py": ["tests/planning/test_flops.py", "tests/planning/test_flops_values.py", STEP],
    "megagrin/cli.py": ["tests/test_cli.py", "tests/settings", "tests/test_wrong_input.py"],
    "megagrin/settings": ["tests/settings", "tests/test_cli.py", "tests/test_wrong_input.py"],
    "megagrin/data": ["tests/data", "tests/data_prep/test_indexed.py"],
    "megagrin/distributed": ["tests/distributed", "tests/parallel"],
    "megagrin/nn": ["tests/nn", "tests/models"],
    "megagrin/optim": ["tests/optim", STEP],
    "megagrin/training": ["tests/training", "tests/settings"],
    "megagrin/training/rules.py": ["tests/settings", "tests/test_wrong_input.py"],
    "megagrin/models": ["tests/models", "tests/settings", "tests/planning"],
    "megagrin/moe": ["tests/moe", STEP],
    "megagrin/engines": ["tests/engines", "tests/training"],
    "megagrin/checkpoint": ["tests/checkpoint", "tests/training"],
    "data_prep": ["tests/data_prep"],
    "data_prep/indexed.py": ["tests/data_prep/test_indexed.py", "tests/data_prep/test_indexed_values.py", "tests/data"],
    "kernels": ["tests/kernels", "tests/moe"],
}
TRITON = "_triton.py"


def tests_of(path: str) -> list[str]:
    """Test files and folders for a source file."""
    room = path if path in TESTS else str(Path(path).parent)
    named = TESTS.get(room, [room.replace("megagrin", "tests", 1)])
    left_out = (any(Path(test).match(pattern) for pattern in IGNORED) for test in named)
    return [test for test, out in zip(named, left_out, strict=True) if not out and (ROOT / test).exists()]


def import_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts if parts[0] == "megagrin" else ("megagrin", *parts))


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    found = {(code.co_qualname, code.co_firstlineno): code}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _codes(constant)
    return found


class _Living:
    """The functions and caches of a file that exist now; looked for once, as a look at every object costs a fork its memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        everything = gc.get_objects()
        self.functions = [thing for thing in everything if isinstance(thing, types.FunctionType) and self._ours(thing)]
        caches = (thing for thing in everything if isinstance(thing, functools._lru_cache_wrapper))
        self.caches = [thing for thing in caches if self._ours(getattr(thing, "__wrapped__", None))]

    def _ours(self, thing: Any) -> bool:
        return isinstance(thing, types.FunctionType) and os.path.realpath(thing.__code__.co_filename) == str(self.path)

    def patch(self, source: str) -> None:
        """Put changed code into every function, and forget what the caches hold."""
        codes = _codes(compile(source, str(self.path), "exec"))
        for function in self.functions:
            new = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if new is not None and len(new.co_freevars) == len(function.__code__.co_freevars):
                function.__code__ = new
        for cache in self.caches:
            cache.cache_clear()


class _Loader(importlib.machinery.SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.source, self.path, "exec")


class _Finder:
    """Gives one module a changed source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.source = self.source
        spec.loader = loader
        return spec


def _in_fork(action: Any, limit: float) -> str:
    """killed, survived or timeout: `action()` returns whether the tests passed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
                code = 0 if action() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "survived" if status == 0 else "killed"
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _starts_processes(item: pytest.Item) -> bool:
    names = getattr(getattr(item, "function", None), "__code__", None)
    return names is not None and not {"subprocess", "_torchrun"}.isdisjoint(names.co_names)


class Session:
    """pytest plugin: coverage of one file by test, then its mutants of functions, one fork each."""

    def __init__(self, path: Path, chosen: list[tuple[Mutant, Any]], results: Path, limit: float) -> None:
        self.path, self.chosen, self.results, self.limit = path, chosen, results, limit
        self.reached: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if "gloo" not in getattr(item, "fixturenames", ()) and not _starts_processes(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        broken = self._baseline(list(items.values()))
        self.living = _Living(self.path)
        gc.collect()
        gc.freeze()
        outcome = {}
        for mutant, make in self.chosen:
            if mutant.in_function:
                outcome[mutant.number] = self._judge(mutant, make, items)
        order = sorted((name for name in self.reached if self.reached[name]), key=self.seconds.__getitem__)
        report = {"outcome": outcome, "order": order, "broken": broken, "tests": len(items), "seconds": self.seconds}
        self.results.write_text(json.dumps(report))
        return True

    def _baseline(self, items: list[pytest.Item]) -> list[str]:
        from _pytest.runner import runtestprotocol

        known: dict[str, bool] = {}
        lines: set[int] = set()

        def local(frame: types.FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        def tracer(frame: types.FrameType, event: str, argument: Any) -> Any:
            name = frame.f_code.co_filename
            ours = known.get(name)
            if ours is None:
                ours = known[name] = os.path.realpath(name) == str(self.path)
            return local(frame, event, argument) if ours else None

        broken = []
        for place, item in enumerate(items):
            lines.clear()
            start, used = time.perf_counter(), time.process_time()
            sys.settrace(tracer)
            try:
                reports = runtestprotocol(item, log=False, nextitem=items[place + 1] if place + 1 < len(items) else None)
            finally:
                sys.settrace(None)
            if any(report.failed for report in reports):
                broken.append(item.nodeid)
            elif lines and time.process_time() - used <= LONGEST[0]:
                self.reached[item.nodeid], self.seconds[item.nodeid] = set(lines), time.perf_counter() - start
        return broken

    def _judge(self, mutant: Mutant, make: Any, items: dict[str, pytest.Item]) -> str:
        span = set(range(mutant.lines[0], mutant.lines[1] + 1))
        order = sorted((name for name, lines in self.reached.items() if lines & span), key=self.seconds.__getitem__)
        if not order:
            return "unreached"
        limit = self.limit + 5 * sum(self.seconds[name] for name in order)

        def passes() -> bool:
            from _pytest.runner import runtestprotocol

            self.living.patch(make())
            return not any(report.failed for name in order for report in runtestprotocol(items[name], log=False, nextitem=None))

        return _in_fork(passes, limit)


def _pytest(arguments: list[str], plugins: list[Any], folder: Path) -> int:
    options = ["-m", "not slow and not gpu", "-p", "no:cacheprovider", "-p", "no:terminalreporter", "--capture=sys", "-x"]
    options += [f"--ignore-glob={pattern}" for pattern in IGNORED]
    return pytest.main([*options, "--basetemp", str(folder / f"tmp{os.getpid()}"), *arguments], plugins=plugins)


def _calm_hypothesis() -> None:
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutants", database=None, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate), max_examples=30
    )
    settings.load_profile("mutants")


def judge(path: str, sample: int, seed: int, limit: float, again: set[int] | None = None) -> dict[str, Any]:
    """All, `sample` randomly chosen or the numbered mutants of a file and what became of them."""
    file = ROOT / path
    every = list(mutants(file.read_text()))
    chosen = every if again is None else [pair for pair in every if pair[0].number in again]
    if again is None and 0 < sample < len(every):
        chosen = random.Random(f"{seed}/{path}").sample(every, sample)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = folder / "results.json"
        start = time.monotonic()
        _in_fork(lambda: _pytest(tests_of(path), [Session(file, chosen, results, limit)], folder) == 0, 24 * 3600)
        report = json.loads(results.read_text())
        outcome = {int(number): what for number, what in report["outcome"].items()}
        for mutant, make in chosen:
            if not mutant.in_function:

                def passes(make: Any = make) -> bool:
                    sys.meta_path.insert(0, _Finder(import_name(path), make()))
                    return _pytest(report["order"], [], folder) == 0

                every_test = 5 * sum(report["seconds"].values())
                outcome[mutant.number] = _in_fork(passes, limit + 60 + every_test) if report["order"] else "unreached"
    keys = ("number", "lines", "before", "after", "statement")
    listed = [{key: getattr(mutant, key) for key in keys} | {"outcome": outcome[mutant.number]} for mutant, _ in chosen]
    return {
        "file": path,
        "mutants": len(every),
        "seconds": round(time.monotonic() - start),
        "tests": report["tests"],
        "broken": report["broken"],
        "tried": listed,
    }


def accepted() -> dict[str, dict[tuple[str, str], str]]:
    """Reasons of accepted survivors by file and (statement, change)."""
    reasons: dict[str, dict[tuple[str, str], str]] = {}
    for path, entries in (yaml.safe_load((HERE / "accepted.yaml").read_text()) or {}).items():
        for entry in entries:
            for change in entry["changes"]:
                reasons.setdefault(path, {})[entry["statement"], change] = entry["reason"]
    return reasons


def sources() -> list[str]:
    """Every file that is mutated when none is named."""
    files = [*(ROOT / "megagrin").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    inside = (file.relative_to(ROOT) for file in files if not any(parent.is_symlink() for parent in file.parents))
    return sorted(str(file) for file in inside if file.name != "__init__.py" and not file.name.endswith(TRITON))


def _alive(output: Path) -> dict[str, set[int]]:
    results = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        result["file"]: {entry["number"] for entry in result["tried"] if entry["outcome"] in ("survived", "unreached")}
        for result in results
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing, see the top of this file.")
    parser.add_argument("files", nargs="*", help="source files; all of megagrin/ and data_prep/ when none is named")
    parser.add_argument("--sample", type=int, default=0, help="mutants per file, drawn at random; 0 tries every one")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a mutant may take beyond 5 times its tests")
    parser.add_argument("--again", type=Path, help="--output of an earlier run on the same sources: those not killed once more")
    parser.add_argument("--longest", type=float, default=1e9, help="seconds of CPU time of a test; longer ones are left out")
    parser.add_argument("--without", action="append", default=[], help="pattern of test files to leave out: what do they add?")
    parser.add_argument("--output", type=Path, help="a line of JSON for every file")
    options = parser.parse_args()
    IGNORED.extend(options.without)
    LONGEST.append(options.longest)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    _calm_hypothesis()
    reasons, open_ = accepted(), 0
    earlier = _alive(options.again) if options.again else {}
    for path in options.files or list(earlier) or sources():
        result = judge(path, options.sample, options.seed, options.limit, earlier.get(path))
        if options.output:
            with options.output.open("a") as out:
                out.write(json.dumps(result) + "\n")
        for entry in result["tried"]:
            change = f"{entry['before']} -> {entry['after']}"
            if entry["outcome"] == "survived":
                if (entry["statement"], change) in reasons.get(path, {}):
                    entry["outcome"] = "accepted"
                else:
                    open_ += 1
                    print(f"{path}:{entry['lines'][0]}: {entry['statement']}\n    {change}")
        count = Counter(entry["outcome"] for entry in result["tried"])
        figures = ", ".join(f"{count[key]} {key}" for key in ("killed", "timeout", "survived", "accepted", "unreached"))
        print(f"{path}: {len(result['tried'])} of {result['mutants']} mutants, {result['tests']} tests: {figures}", flush=True)
        if result["broken"]:
            print(f"{path}: left out, they fail without a mutant: {', '.join(result['broken'])}", flush=True)
    return 1 if open_ else 0


if __name__ == "__main__":
    sys.exit(main())
