"""README's table of combinations, made from the parameters of the tests that compare a layout with one process.

A cell is ticked when there is a case for every option of its row with its column and of its column with its row; a stage of ZeRO
with recomputation: for every stage with every mode and part. Cases that are skipped or expected to fail do not count.

    make combinations                                      # runs every case, and writes the table from those that passed
    python tests/parallel/combinations.py ran.xml more.xml # the same from reports of runs that there were
"""

import importlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Run

from megagrin.engines.base import EngineConfig
from megagrin.parallel.recompute import RecomputePart

README = Path(__file__).parents[2] / "README.md"
MODES = ("full", "selective", "budget", *get_args(RecomputePart))  # selective: the parts of one who names none
ZERO3, ZERO12, DEEPSPEED = ("zero3",), ("zero1", "zero2"), ("deepspeed1", "deepspeed2", "deepspeed3")
COLUMNS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "pp": ("pp-1f1b", "pp-interleaved_1f1b", "pp-zero_bubble"),
    "cp": ("cp-all_gather", "cp-ulysses"),
    "ep": ("ep", "ep-chunks"),
    "etp": ("etp",),
    "dp_replicate": ("dp_replicate",),
    "recompute": MODES,
    "compile": ("compile",),
}
ROWS: dict[str, tuple[str, ...]] = {
    "tensor and sequence parallel, `parallel.tp`": COLUMNS["tp"],
    "pipeline, `parallel.pp`: 1F1B, interleaved, zero bubble": COLUMNS["pp"],
    "context parallel, `parallel.cp`: all-gather, Ulysses": COLUMNS["cp"],
    "expert parallel, `parallel.ep`; overlapped, `ep_chunks`": COLUMNS["ep"],
    "expert tensor parallel, `parallel.etp`": COLUMNS["etp"],
    "FSDP2, `engine.zero` 3": ZERO3,
    "FSDP2, `engine.zero` 1 and 2": ZERO12,
    "hybrid sharding, `parallel.dp_replicate`": COLUMNS["dp_replicate"],
    "DeepSpeed ZeRO 1, 2, 3, `engine.kind: deepspeed`": DEEPSPEED,
    "Muon, `optim.kind: muon`": ("muon",),
    "dense models (no experts)": ("dense",),
}
# What is refused, with the footnote that says why; (row's option, column's option): None for all of the column.
FOOTNOTES = {
    ("pp", "recompute"): " ¹",
    ("pp", "compile"): " ¹",
    ("zero", "pp"): " ²",
    ("dense", "ep"): " ³",
    ("dense", "etp"): " ³",
    ("deepspeed", "pp"): " ⁴",
    ("deepspeed", "dp_replicate"): " ⁴",
    ("deepspeed", "compile"): " ⁴",
}
REFUSED = {
    *(("pp-zero_bubble", option) for option in ("full", "budget", "compile")),
    *((stage, option) for stage in (*ZERO3, *ZERO12, *DEEPSPEED) for option in COLUMNS["pp"]),
    *(("dense", option) for option in (*COLUMNS["ep"], *COLUMNS["etp"], "expert_mlp", "router")),
    *((stage, "dp_replicate") for stage in DEEPSPEED),
    ("deepspeed3", "compile"),
}


MODULES = (
    *(f"parallel.test_{name}" for name in ("options", "pairs", "recompute", "compile")),
    "engines.test_zero",
    "engines.test_deepspeed",
    "engines.test_deepspeed_recompute",
)


class Case(NamedTuple):
    """A case of a test: where pytest finds it, and the options that its run uses."""

    node: tuple[str, str]  # module, name with id
    options: frozenset[str]


def options_of(ranks: int, run: Run, deepspeed: bool) -> frozenset[str]:
    """The options of a run that the table has."""
    parallel, engine = run.parallel, EngineConfig(**run.engine)
    held = {name for name in ("tp", "etp", "ep", "dp_replicate") if getattr(parallel, name) > 1}
    held |= {f"pp-{parallel.pp_schedule}"} if parallel.pp > 1 else set()
    held |= {f"cp-{parallel.cp_method}"} if parallel.cp > 1 else set()
    held |= {"ep-chunks"} if parallel.ep > 1 and parallel.ep_chunks > 1 else set()
    if deepspeed or (parallel.pp == 1 and ranks > parallel.tp):
        held.add(f"{'deepspeed' if deepspeed else 'zero'}{engine.zero}")
    if engine.recompute == "selective":
        held |= {"selective"} if engine.recompute_parts == EngineConfig().recompute_parts else set()
        held |= {engine.recompute_parts[0]} if len(engine.recompute_parts) == 1 else set()
    elif engine.recompute != "none":
        held.add(engine.recompute)
    held |= {"compile"} if engine.compile else set()
    held |= {"muon"} if run.optim.kind == "muon" else set()
    held |= set() if run.model.is_moe else {"dense"}
    return frozenset(held)


def _parameters(module: str) -> Iterator[tuple[str, Any]]:
    """Each case of a module whose test has the arguments world_size and run, with its function's name; none that is skipped."""
    for name, function in vars(importlib.import_module(module)).items():
        marks = getattr(function, "pytestmark", []) if name.startswith("test_") else []
        tables = [mark.args for mark in marks if mark.name == "parametrize"]
        if (
            len(tables) != 1
            or tuple(tables[0][0]) != ("world_size", "run")
            or {m.name for m in marks} & {"skip", "skipif", "xfail"}
        ):
            continue
        for parameter in tables[0][1]:
            if not {mark.name for mark in parameter.marks} & {"skip", "skipif", "xfail"}:
                yield f"{name}[{parameter.id}]", parameter


def cases() -> list[Case]:
    """All of them."""
    matrix = importlib.import_module("parallel.test_matrix")
    found = []
    for name in matrix.LAYOUTS:
        test = (
            "test_layout" if name in matrix.FAST else "test_small_layout" if name in matrix.SMALL else "test_layout_over_20_steps"
        )
        held = options_of(*matrix.run_of(name, "fp64", 3), False)
        node = f"{test}[{name}-fp64]" if test == "test_layout_over_20_steps" else f"{test}[{name}]"
        found.append(Case(("parallel.test_matrix", node), held))
    for module in MODULES:
        for node, parameter in _parameters(module):
            found.append(Case((module, node), options_of(*parameter.values, module.startswith("engines.test_deepspeed"))))
    return found


def missing(row: tuple[str, ...], column: str, held: list[frozenset[str]]) -> list[tuple[str, str]]:
    """Pairs of options that a tick promises and no case has; an empty name is any option."""
    options = COLUMNS[column]
    if row == options:  # the diagonal: each alone
        return [(option, "") for option in row if not any(option in case for case in held)]
    zero = row in (ZERO3, ZERO12, DEEPSPEED) and column == "recompute"
    wanted = {
        (ours, theirs) for ours in row for theirs in options if (ours, theirs) not in REFUSED and (theirs, ours) not in REFUSED
    }
    if zero:
        return sorted(pair for pair in wanted if not any(set(pair) <= case for case in held))
    met = {pair for pair in wanted if any(set(pair) <= case for case in held)}
    rows, columns = {ours for ours, _ in met}, {theirs for _, theirs in met}
    return [(ours, "") for ours, _ in sorted(wanted) if ours not in rows] + [
        ("", t) for _, t in sorted(wanted) if t not in columns
    ]


def table(held: list[frozenset[str]]) -> str:
    """README's table; a cell that is neither refused nor has all its cases stays empty."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, row in ROWS.items():
        cells = []
        for column, options in COLUMNS.items():
            refused = all((ours, theirs) in REFUSED for ours in row for theirs in options)
            note = FOOTNOTES.get((re.split(r"[-\d]", row[0])[0], column), "")
            cells.append(("–" if refused else "" if missing(row, column, held) else "✓") + note)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_readme() -> str:
    """The table as it stands there, between its markers."""
    found = re.search(r"<!-- combinations -->\n(.*?)\n<!-- end -->", README.read_text(), re.DOTALL)
    assert found is not None, "README has no table between <!-- combinations --> and <!-- end -->"
    return found[1]


def main(reports: list[str]) -> None:
    """Write the table from the cases that passed in runs of pytest; those that they had not stay out."""
    passed = set()
    for test in (test for report in reports for test in ElementTree.parse(report).iter("testcase")):
        if not {child.tag for child in test} & {"failure", "error", "skipped"}:
            passed.add((test.attrib["classname"].removeprefix("tests."), test.attrib["name"]))
    ran = [case for case in cases() if case.node in passed]
    README.write_text(README.read_text().replace(in_readme(), table([case.options for case in ran])))
    print(f"{len(ran)} of {len(cases())} cases passed")


if __name__ == "__main__":
    main(sys.argv[1:])
