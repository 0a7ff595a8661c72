"""Changed code in a process that runs already, or in one that has still to import it; and the fork in which that happens."""

import functools
import gc
import importlib.machinery
import os
import signal
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    found = {(code.co_qualname, code.co_firstlineno): code}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _codes(constant)
    return found


class Living:
    """The functions and caches that exist now, by file; looked for once, as a look at every object costs a fork its memory."""

    def __init__(self, files: set[str]) -> None:
        self.functions: dict[str, list[types.FunctionType]] = defaultdict(list)
        self.caches: dict[str, list[Any]] = defaultdict(list)
        real = {}  # a path may pass through the link of the package

        def file_of(thing: Any) -> str:
            if not isinstance(thing, types.FunctionType):
                return ""
            name = thing.__code__.co_filename
            if name not in real:
                real[name] = os.path.realpath(name)
            return real[name] if real[name] in files else ""

        for thing in gc.get_objects():
            if file := file_of(thing):
                self.functions[file].append(thing)
            elif isinstance(thing, functools._lru_cache_wrapper) and (file := file_of(getattr(thing, "__wrapped__", None))):
                self.caches[file].append(thing)

    def patch(self, file: str, source: str) -> None:
        """Put changed code into every function of `file`, and forget what its caches hold."""
        codes = _codes(compile(source, file, "exec"))
        for function in self.functions[file]:
            new = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if new is not None and len(new.co_freevars) == len(function.__code__.co_freevars):
                function.__code__ = new
        for cache in self.caches[file]:
            cache.cache_clear()


class _Loader(importlib.machinery.SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.source, self.path, "exec")


class Finder:
    """For `sys.meta_path`: gives one module a changed source."""

    def __init__(self, path: str, source: str) -> None:
        parts = Path(path).with_suffix("").parts
        self.name = ".".join(parts if parts[0] == "megagrin" else ("megagrin", *parts))
        self.source = source

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


def in_fork(action: Callable[[], int], limit: float) -> int | None:
    """The status that `action()` returned in a child (9 where it raised), None after `limit` seconds; its output is dropped."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 9
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
                code = action()
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 9
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
