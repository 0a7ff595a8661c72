"""Shares of mutants that live, before and after the new tests, by room: a Markdown table of one or more outputs of run.py.

    python tests/mutants/tally.py FIRST.jsonl [AGAIN.jsonl ...]

A mutant that was tried in several outputs is killed where one of them killed it.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from run import key_of, mark_accepted

ORDER = ("killed", "timeout", "survived", "unreached")


def merged(outputs: list[Path]) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """By file: its number of mutants in the first output, and every mutant of that output with its best outcomes."""
    first, *later = [[json.loads(line) for line in output.read_text().splitlines()] for output in outputs]
    files = {result["file"]: (result["mutants"], {key_of(entry): entry for entry in result["tried"]}) for result in first}
    for result in (result for results in later for result in results):
        for entry in result["tried"]:
            known = files.setdefault(result["file"], (result["mutants"], {}))[1].setdefault(key_of(entry), entry)
            for when in ("before", "after"):
                known[when] = min(known[when], entry[when], key=ORDER.index)
    return {path: (total, list(entries.values())) for path, (total, entries) in files.items()}


def main() -> None:
    """Print the table."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for path, (total, entries) in sorted(merged([Path(name) for name in sys.argv[1:]]).items()):
        room = str(Path(path).parent)
        mark_accepted(path, entries)
        for entry in entries:
            for when in ("before", "after"):
                rooms[room][f"{when} {entry[when]}"] += 1
        rooms[room]["tried"] += len(entries)
        rooms[room]["mutants"] += total
    print("| room | mutants | tried | before: killed / survived / unreached | after: killed / survived / accepted / unreached |")
    print("|---|---|---|---|---|")
    rooms["**all**"] = sum(rooms.values(), Counter())
    for room, count in rooms.items():
        before = [count["before killed"] + count["before timeout"], count["before survived"], count["before unreached"]]
        after = [
            count["after killed"] + count["after timeout"],
            *(count[f"after {what}"] for what in ("survived", "accepted", "unreached")),
        ]
        print(
            f"| {room} | {count['mutants']} | {count['tried']} | {' / '.join(map(str, before))} | {' / '.join(map(str, after))} |"
        )


if __name__ == "__main__":
    main()
