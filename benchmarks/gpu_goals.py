"""What a run of `make gpu` found about each goal: with the blocks that were there, with tuned blocks, and the verdict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_limit import LIMIT_GIB
from gpu_predictions import GOALS, Goal
from gpu_probe import read

OURS = "megagrin"


@dataclass(frozen=True)
class Outcome:
    """A goal and its figures; None where there is none.

    Attributes:
        plain: with the blocks that were there.
        tuned: with those that were tuned in the run.
    """

    goal: Goal
    plain: float | None
    tuned: float | None

    @property
    def verdict(self) -> str:
        """Of tuned blocks where they were measured."""
        value = self.plain if self.tuned is None else self.tuned
        if value is None:
            return "unmeasured"
        return "met" if (value <= self.goal.wanted if self.goal.at_most else value >= self.goal.wanted) else "missed"


def _of_layer(record: Any, goal: Goal) -> float | None:
    for case in (record or {}).get("cases", []):
        if case["shape"]["name"] == goal.where and case["routing"] == "learned":
            found = case if goal.quantity == "overhead_share" else case["contestants"][OURS]
            value: float | None = found.get(goal.quantity)
            return value
    return None


def _of_step(record: Any, goal: Goal) -> float | None:
    rates = {result["routing"]: result["tflops"] for result in (record or {}).get("results", [])}
    learned, forced = rates.get("learned"), rates.get("forced balance")
    if goal.quantity == "learned_tflops" or learned is None or forced is None:
        return learned if goal.quantity == "learned_tflops" else None
    return 1 - float(learned) / float(forced)


def memory(out: Path) -> dict[str, dict[str, float]]:
    """Peaks of the stages that noted them: GiB allocated and reserved."""
    paths = sorted((out / "stages").glob("*.memory.json"))
    found = {path.name.removesuffix(".memory.json"): read(path) for path in paths}
    return {name: peaks for name, peaks in found.items() if peaks}


def above_the_limit(out: Path) -> list[str]:
    """Stages that took more memory than they may, in words."""
    return [
        f"{name}: {peaks['reserved']:.1f} GiB reserved at its peak, allowed {LIMIT_GIB:.0f}"
        for name, peaks in memory(out).items()
        if peaks["reserved"] > LIMIT_GIB
    ]


def outcomes(out: Path, measured: bool) -> list[Outcome]:
    """One for each goal, in order; without figures where nothing was `measured` (a dry run)."""
    found = []
    for goal in GOALS:
        plain = tuned = None
        if measured and goal.where == "memory":
            plain = max((peaks["reserved"] for peaks in memory(out).values()), default=None)
        elif measured:
            name, look_up = ("model_step.json", _of_step) if goal.where == "step" else ("moe_layer.json", _of_layer)
            plain, tuned = (look_up(read(folder / name), goal) for folder in (out, out / "tuned"))
        found.append(Outcome(goal, plain, tuned))
    return found
