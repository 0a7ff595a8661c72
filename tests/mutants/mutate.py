"""The mutants of a source file: mutmut's operators, applied to every expression and assignment that can have an effect.

Left out: annotations, decorators, docstrings, the message of a `raise`, `assert` or log line, strings with a blank (prose), and
arguments whose change no test could see: a device, as all tests of one process run on the default one, and None for False.
mutmut itself mutates functions only and keeps module tables, defaults of dataclasses and class bodies as they are.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

LOGGERS = ("log", "logger", "warnings")


@dataclass(frozen=True)
class Mutant:
    """One changed place.

    Attributes:
        number: place in the order of the file.
        lines: first and last line of the statement that holds it.
        in_function: it is reached by a call, not by the import.
        old: source of the changed node, spaces folded.
        new: what stands in its place.
        statement: source of the statement before, spaces folded; with `new` it names the mutant when lines move.
    """

    number: int
    lines: tuple[int, int]
    in_function: bool
    old: str
    new: str
    statement: str


def _is_equal(node: cst.CSTNode, new: cst.CSTNode) -> bool:
    """Only a device, or False to None, changes among a call's arguments."""
    if not (isinstance(node, cst.Call) and isinstance(new, cst.Call)):
        return False
    pairs = itertools.zip_longest(node.args, new.args)
    old, after = next((pair for pair in pairs if pair[0] is not pair[1] and not _same(*pair)), (None, None))
    if old is None:
        return False
    if old.keyword is not None and old.keyword.value == "device":
        return True
    values = (old.value, None if after is None or len(node.args) != len(new.args) else after.value)
    return [value.value for value in values if isinstance(value, cst.Name)] == ["False", "None"]


def _same(old: cst.Arg | None, new: cst.Arg | None) -> bool:
    return old is not None and new is not None and old.deep_equals(new)


def _folded(code: str) -> str:
    return " ".join(code.split())


class _Collector(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.module, self.found = module, []
        self._depth = 0
        self._statements: list[tuple[tuple[int, int], str]] = []

    def _lines(self, node: cst.CSTNode) -> tuple[int, int] | None:
        position: Any = self.get_metadata(PositionProvider, node, None)
        return None if position is None else (position.start.line, position.end.line)

    def _silent(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Raise | cst.Assert | cst.Import | cst.ImportFrom):
            return True
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString):
            return True
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
            return isinstance(node.func.value, cst.Name) and node.func.value.value in LOGGERS
        return False

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self._silent(node):
            return False
        if isinstance(node, cst.SimpleStatementLine):
            lines = self._lines(node)
            assert lines is not None
            self._statements.append((lines, _folded(self.module.code_for_node(node))))
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                replacements = list(operator(node))
                if isinstance(node, cst.SimpleString):  # other cases of the same letters say nothing new
                    replacements = [] if " " in node.value else replacements[:1]
                for new in replacements:
                    self._add(node, new)
        return super().on_visit(node)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.SimpleStatementLine):
            self._statements.pop()
        super().on_leave(original_node)

    def visit_FunctionDef_body(self, node: cst.FunctionDef) -> None:
        self._depth += 1

    def leave_FunctionDef_body(self, node: cst.FunctionDef) -> None:
        self._depth -= 1

    def _add(self, node: cst.CSTNode, new: cst.CSTNode) -> None:
        if _is_equal(node, new):
            return
        own = self._lines(node) or (1, 1)
        lines, statement = self._statements[-1] if self._statements else (own, "")
        self.found.append((node, new, lines, self._depth > 0, statement))


def mutants(source: str) -> Iterator[tuple[Mutant, Any]]:
    """Every mutant of a file, with a function that makes its source."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    module = wrapper.module
    collector = _Collector(module)
    wrapper.visit(collector)
    for number, (node, new, lines, in_function, statement) in enumerate(collector.found):
        before, after = _folded(module.code_for_node(node)), _folded(module.code_for_node(new))
        if not statement:  # the header of a loop or condition
            statement = _folded(source.splitlines()[lines[0] - 1])
        make = lambda node=node, new=new: module.deep_replace(node, new).code  # noqa: E731
        yield Mutant(number, lines, in_function, before, after, statement), make
