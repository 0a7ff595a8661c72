"""pytest plugin: which lines of which file each test reaches, then one fork for every mutant of a function."""

import gc
import json
import os
import random
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mutate import Mutant
from patch import Living, in_fork
from ranks import ForkedRanks

SURVIVED, KILLED, KILLED_BY_NEW = 0, 1, 2
Chosen = dict[str, list[tuple[Mutant, Callable[[], str]]]]  # by file, mutants with a function that makes their source


@dataclass(frozen=True)
class Limits:
    """What a mutant and a test may cost.

    Attributes:
        longest: seconds of a test; longer ones are left out.
        budget: seconds of tests for one mutant, the quickest first; what is beyond it is not run.
        margin: seconds a mutant may take beyond three times its tests.
        cases: of each test function that starts ranks, so many cases.
        new: patterns of test files that run after all others: what they kill is counted apart.
    """

    longest: float
    budget: float
    margin: float
    cases: int
    new: tuple[str, ...]


class _Nobody:
    """A next item that shares nothing but the session with the one before: module fixtures end, the session's stay."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session

    def listchain(self) -> list[Any]:
        return [self.session]


def _starts_processes(item: pytest.Item) -> bool:
    names = getattr(getattr(item, "function", None), "__code__", None)
    return names is not None and not {"subprocess", "_torchrun", "torchrun"}.isdisjoint(names.co_names)


def _has_ranks(item: pytest.Item) -> bool:
    return "gloo" in getattr(item, "fixturenames", ())


class Session:
    """Collects, notes what is reached, judges; the outcome of the mutants of functions goes to `results` as JSON."""

    def __init__(self, root: Path, chosen: Chosen, results: Path, limits: Limits) -> None:
        self.root, self.chosen, self.results, self.limits = root, chosen, results, limits
        self.files = {str(root / path): path for path in chosen}
        self.lines: dict[str, set[int]] = {path: set() for path in chosen}
        self.reached: dict[str, dict[str, set[int]]] = {}
        self.seconds: dict[str, float] = {}
        self.is_new: dict[str, bool] = {}
        self.ranks = ForkedRanks(self.lines)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept, cases = [], defaultdict(list)
        for item in items:
            if _starts_processes(item):
                continue
            if _has_ranks(item):
                cases[item.nodeid.split("[")[0]].append(item)
            elif item.get_closest_marker("slow") is None:
                kept.append(item)
        for name, group in cases.items():
            kept += group if len(group) <= self.limits.cases else random.Random(name).sample(group, self.limits.cases)
        places = {item: place for place, item in enumerate(items)}
        items[:] = sorted(kept, key=places.__getitem__)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        import helpers

        helpers.GlooPool.run = lambda pool, *case: self.ranks.run(*case)  # type: ignore[method-assign]
        self.nobody: Any = _Nobody(session)
        self.items = {item.nodeid: item for item in session.items}
        for item in session.items:
            self.is_new[item.nodeid] = any(item.path.match(pattern) for pattern in self.limits.new)
        start = time.monotonic()
        broken = self._baseline()
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:20]
        about = {"tests": len(self.items), "broken": broken, "baseline": time.monotonic() - start, "slowest": slowest}
        self.living = Living(set(self.files))
        gc.collect()
        gc.freeze()
        with self.results.open("w") as out:
            out.write(json.dumps(about) + "\n")
            for path, pairs in self.chosen.items():
                order = self._order({name for name, lines in self.reached.items() if path in lines})
                judged = [pair for pair in pairs if pair[0].in_function and any(order)]
                if not any(order):  # only the import runs it
                    order = self._order(set(self.reached))
                outcome = {mutant.number: self._judge(path, mutant, make) for mutant, make in judged}
                out.write(json.dumps({"file": path, "outcome": outcome, "order": order, "seconds": self._cost(order)}) + "\n")
                out.flush()
        return True

    def _baseline(self) -> list[str]:
        from _pytest.runner import runtestprotocol

        known: dict[str, set[int] | None] = {}

        def local(frame: types.FrameType, event: str, argument: Any) -> Any:
            found = known[frame.f_code.co_filename]
            assert found is not None
            found.add(frame.f_lineno)
            return local

        def tracer(frame: types.FrameType, event: str, argument: Any) -> Any:
            name = frame.f_code.co_filename
            if name not in known:
                path = self.files.get(os.path.realpath(name))
                known[name] = None if path is None else self.lines[path]
            return None if known[name] is None else local(frame, event, argument)

        broken = []
        everything = list(self.items.values())
        for place, item in enumerate(everything):
            for lines in self.lines.values():
                lines.clear()
            start = time.perf_counter()
            after = everything[place + 1] if place + 1 < len(everything) else self.nobody
            threading.settrace(tracer)  # a loader reads ahead in a thread of its own
            sys.settrace(tracer)
            try:
                reports = runtestprotocol(item, log=False, nextitem=after)
            finally:
                sys.settrace(None)
                threading.settrace(None)  # type: ignore[arg-type]
            took = time.perf_counter() - start
            if any(report.failed for report in reports):
                broken.append(item.nodeid)
                continue
            self.seconds[item.nodeid] = took
            if took <= self.limits.longest:
                self.reached[item.nodeid] = {path: set(lines) for path, lines in self.lines.items() if lines}
        return broken

    def _order(self, names: set[str]) -> list[list[str]]:
        """The tests that are not new, quickest first and within the budget, and the new ones likewise."""
        order: list[list[str]] = [[], []]
        for place, chosen in enumerate(order):
            spent = 0.0
            for name in sorted((name for name in names if self.is_new[name] == bool(place)), key=self.seconds.__getitem__):
                spent += self.seconds[name]
                if chosen and spent > self.limits.budget:
                    break
                chosen.append(name)
        return order

    def _cost(self, order: list[list[str]]) -> float:
        return sum(self.seconds[name] for names in order for name in names)

    def _judge(self, path: str, mutant: Mutant, make: Callable[[], str]) -> dict[str, Any]:
        span = set(range(mutant.lines[0], mutant.lines[1] + 1))
        order = self._order({name for name, lines in self.reached.items() if path in lines and lines[path] & span})
        if not any(order):
            return verdict(order, SURVIVED)

        def passes() -> int:
            from _pytest.runner import runtestprotocol

            self.living.patch(str(self.root / path), make())
            for names, status in zip(order, (KILLED, KILLED_BY_NEW), strict=True):
                for name in names:
                    if any(report.failed for report in runtestprotocol(self.items[name], log=False, nextitem=self.nobody)):
                        return status
            return SURVIVED

        return verdict(order, in_fork(passes, self.limits.margin + 3 * self._cost(order)))


def verdict(order: list[list[str]], status: int | None) -> dict[str, Any]:
    """What became of a mutant, by the tests that are not new (`before`) and by all (`after`)."""
    outcomes = {KILLED: ("killed", "killed"), KILLED_BY_NEW: ("survived", "killed"), None: ("timeout", "timeout")}
    before, after = outcomes.get(status, ("killed", "killed") if status else ("survived", "survived"))
    if not order[0]:
        before = "unreached"
    return {"before": before, "after": after if any(order) else "unreached"}
