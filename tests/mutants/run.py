"""Mutation testing of megagrin/ and data_prep/, `make mutants`: what the tests of one process cannot see.

    python tests/mutants/run.py [FILE ...] [--sample N] [--seed S] [--new PATTERN] [--output FILE] [--again FILE]

Importing torch takes seconds and a module has hundreds of mutants, so nothing is started anew: one process per group of rooms
collects the tests of the group and runs them once while it notes which lines each test reaches; then it forks for every mutant,
puts the changed code into the functions of the fork and runs the tests that reach the statement, quickest first, until one
fails. Where the change is one of the import (a table, a default), the fork is made before the package is imported: a second more.

Ranks of the gloo pool are forked as well, and so have the changed code; tests that start commands are left out, as their
processes have the code of the disk. A statement that no other test reaches is counted apart as `unreached`.

A survivor that is accepted stands in accepted.yaml with its reason. The exit status is 1 where another one survives.
"""

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from mutate import Mutant, mutants  # noqa: E402
from patch import Finder, in_fork  # noqa: E402
from session import KILLED, KILLED_BY_NEW, SURVIVED, Chosen, Limits, Session, verdict  # noqa: E402


class Group(NamedTuple):
    """Sources, and the tests under tests/ that run their code."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]


STEP = "training/test_run_values.py"  # one step of a whole run against formulas
GROUPS = {  # a source belongs to the first that has it
    "ranks": Group(
        (
            "megagrin/distributed",
            "megagrin/parallel",
            "megagrin/engines",
            "megagrin/optim",
            "megagrin/planning",
            "megagrin/moe/dispatch.py",
        ),
        ("distributed", "parallel", "engines", "optim", "planning", "moe/test_dispatch.py", STEP),
    ),
    "model": Group(
        ("megagrin/moe", "megagrin/nn", "megagrin/models", "megagrin/rng.py"),
        ("moe", "models", "settings/test_config.py", "parallel/test_context.py", "test_rng.py", "test_rng_values.py", STEP),
    ),
    "run": Group(
        ("megagrin/training", "megagrin/settings", "megagrin/checkpoint", "megagrin/cli.py", "megagrin/data"),
        ("training", "settings", "checkpoint", "data", "test_cli.py", "test_wrong_input.py"),
    ),
    "use": Group(
        ("megagrin/hf", "megagrin/inference", "megagrin/observe", "data_prep"),
        ("hf", "inference", "observe", "data_prep", "data", "test_cli.py", "training/test_tokenizer_of_run.py"),
    ),
}

# All that one process can run. Left out: what needs commands, an interpreter or a GPU, kernels (some tests start threads,
# after which a fork hangs), and what compiles C++ for minutes.
LEFT_OUT = ("launch", "kernels_interpret", "gpu", "kernels", "engines/test_deepspeed*.py", "parallel/test_compile.py")
WIDE = ["tests", *(f"--ignore-glob={ROOT}/tests/{pattern}" for pattern in LEFT_OUT)]


def group_of(path: str) -> str:
    """The first group that has the source; KeyError for a room that none has."""
    for name, group in GROUPS.items():
        if any(path == source or path.startswith(f"{source}/") for source in group.sources):
            return name
    raise KeyError(path)


def sources() -> list[str]:
    """Every file that is mutated when none is named."""
    files = [*(ROOT / "megagrin").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    inside = (file.relative_to(ROOT) for file in files if not any(parent.is_symlink() for parent in file.parents))
    return sorted(str(file) for file in inside if file.name != "__init__.py")


def _pytest(arguments: list[str], plugins: list[Any], folder: Path) -> int:
    options = ["-m", "not gpu and not long", "-p", "no:cacheprovider", "-p", "no:terminalreporter", "--capture=sys", "-x"]
    return pytest.main([*options, "--basetemp", str(folder / f"tmp{os.getpid()}"), *arguments], plugins=plugins)


def _calm_hypothesis() -> None:
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutants", database=None, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate), max_examples=30
    )
    settings.load_profile("mutants")


def _of_import(path: str, make: Any, order: list[list[str]], folder: Path) -> int:
    sys.meta_path.insert(0, Finder(path, make()))
    for names, status in zip(order, (KILLED, KILLED_BY_NEW), strict=True):
        if names and _pytest(names, [], folder):
            return status
    return SURVIVED


def judge(tests: Sequence[str], chosen: Chosen, limits: Limits) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    """What the tests say of themselves, and by file and number what became of the mutants."""
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), Path(name) / "results.json"
        in_fork(lambda: int(_pytest(tests, [Session(ROOT, chosen, results, limits)], folder)), 24 * 3600)
        if not results.exists():
            sys.exit(f"mutants: these cannot be collected: python -m pytest --collect-only {' '.join(tests)}")
        about, *lines = [json.loads(line) for line in results.read_text().splitlines()]
        outcomes = {}
        for line in lines:
            path, order = line["file"], line["order"]
            outcomes[path] = {int(number): outcome for number, outcome in line["outcome"].items()}
            limit = limits.margin + 60 + 3 * line["seconds"]
            for mutant, make in chosen[path]:
                if mutant.number not in outcomes[path]:
                    action = functools.partial(_of_import, path, make, order, folder)
                    outcomes[path][mutant.number] = verdict(order, in_fork(action, limit) if any(order) else SURVIVED)
    return about, outcomes


def accepted() -> dict[str, dict[tuple[str, str], str]]:
    """Reasons of accepted survivors by file and (statement, change)."""
    reasons: dict[str, dict[tuple[str, str], str]] = {}
    for path, entries in (yaml.safe_load((HERE / "accepted.yaml").read_text()) or {}).items():
        for entry in entries:
            for change in entry["changes"]:
                reasons.setdefault(path, {})[entry["statement"], change] = entry["reason"]
    return reasons


def mark_accepted(path: str, tried: list[dict[str, Any]]) -> None:
    """Survivors of a file that stand in accepted.yaml become `accepted`."""
    reasons = accepted().get(path, {})
    for entry in tried:
        if entry["after"] == "survived" and (entry["statement"], f"{entry['old']} -> {entry['new']}") in reasons:
            entry["after"] = "accepted"


def key_of(entry: dict[str, Any] | Mutant) -> tuple[str, str, str]:
    """What names a mutant when lines move."""
    about = entry if isinstance(entry, dict) else vars(entry)
    return about["statement"], about["old"], about["new"]


def _alive(output: Path) -> dict[str, set[tuple[str, str, str]]]:
    results = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        result["file"]: {key_of(entry) for entry in result["tried"] if entry["after"] in ("survived", "unreached")}
        for result in results
    }


def _choose(path: str, sample: int, seed: int, again: set[tuple[str, str, str]] | None) -> tuple[int, list[Any]]:
    every = list(mutants((ROOT / path).read_text()))
    if again is not None:
        found = [pair for pair in every if key_of(pair[0]) in again]
        if gone := len(again) - len({key_of(mutant) for mutant, _ in found}):
            print(f"{path}: {gone} of those not killed before are no longer in the source", flush=True)
        return len(every), found
    if 0 < sample < len(every):
        return len(every), random.Random(f"{seed}/{path}").sample(every, sample)
    return len(every), every


def report(path: str, total: int, tried: list[dict[str, Any]], output: Path | None) -> int:
    """Print what survived and the counts of a file; returns how many survived that are not accepted."""
    if output:
        with output.open("a") as out:
            out.write(json.dumps({"file": path, "mutants": total, "tried": tried}) + "\n")
    mark_accepted(path, tried)
    alive = [entry for entry in tried if entry["after"] == "survived"]
    for entry in alive:
        print(f"{path}:{entry['lines'][0]}: {entry['statement']}\n    {entry['old']} -> {entry['new']}")
    for when in ("before", "after"):
        count = Counter(entry[when] for entry in tried)
        figures = ", ".join(f"{count[key]} {key}" for key in ("killed", "timeout", "survived", "accepted", "unreached"))
        print(f"{path}: {len(tried)} of {total} mutants, {when} new tests: {figures}", flush=True)
    return len(alive)


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing, see the top of this file.")
    parser.add_argument("files", nargs="*", help="source files; all of megagrin/ and data_prep/ when none is named")
    parser.add_argument("--group", choices=GROUPS, help="only sources of this group")
    parser.add_argument("--sample", type=int, default=0, help="mutants per file, drawn at random; 0 tries every one")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--new", action="append", default=[], help="pattern of test files that run last: what do they add?")
    parser.add_argument("--again", type=Path, help="--output of an earlier run: those not killed then, once more")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds of a test; longer ones are left out")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for one mutant, quickest first")
    parser.add_argument("--margin", type=float, default=20.0, help="seconds a mutant may take beyond 3 times its tests")
    parser.add_argument("--cases", type=int, default=4, help="cases of each test function that starts ranks")
    parser.add_argument("--wide", action="store_true", help="let all tests judge, not only those of a file's own group")
    parser.add_argument("--output", type=Path, help="a line of JSON for every file")
    options = parser.parse_args()
    limits = Limits(options.longest, options.budget, options.margin, options.cases, tuple(options.new))
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    _calm_hypothesis()
    earlier = _alive(options.again) if options.again else {}
    files, open_ = options.files or list(earlier) or sources(), 0
    groups = {name: [path for path in files if group_of(path) == name and options.group in (None, name)] for name in GROUPS}
    if options.wide:
        groups = {next(iter(GROUPS)): [path for paths in groups.values() for path in paths]}
    for group, mine in groups.items():
        if not mine:
            continue
        start = time.monotonic()
        picked = {path: _choose(path, options.sample, options.seed, earlier.get(path)) for path in mine}
        tests = WIDE if options.wide else [f"tests/{test}" for test in GROUPS[group].tests]
        about, outcomes = judge(tests, {path: pairs for path, (_, pairs) in picked.items()}, limits)
        for path, (total, pairs) in picked.items():
            keys = ("number", "lines", "old", "new", "statement")
            tried = [{key: getattr(mutant, key) for key in keys} | outcomes[path][mutant.number] for mutant, _ in pairs]
            open_ += report(path, total, tried, options.output)
        print(f"{group}: {about['tests']} tests in {about['baseline']:.0f} s, {time.monotonic() - start:.0f} s in all; slowest:")
        print("".join(f"    {seconds:.1f} s {name}\n" for name, seconds in about["slowest"]), end="", flush=True)
        if about["broken"]:
            print(f"{group}: left out, they fail without a mutant: {', '.join(about['broken'])}", flush=True)
    return 1 if open_ else 0


if __name__ == "__main__":
    sys.exit(main())
