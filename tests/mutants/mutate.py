"""The mutants of a source file: mutmut's operators, applied to every expression and assignment that can have an effect.

Left out: annotations, decorators, docstrings, the message of a `raise`, `assert` or log line, and strings with a blank (prose).
mutmut itself mutates functions only and keeps module tables, defaults of dataclasses and class bodies as they are.
"""

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
        before: source of the changed node, spaces folded.
        after: what stands in its place.
        statement: source of the statement before, spaces folded; with `after` it names the mutant when lines move.
    """

    number: int
    lines: tuple[int, int]
    in_function: bool
    before: str
    after: str
    statement: str


def _folded(code: str) -> str:
    return " ".join(code.split())


class _Collector(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.module, self.found = module, []
        self._depth, self._quiet = 0, 0
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
