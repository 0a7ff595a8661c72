"""Pipeline schedules as Gantt charts: the library's own order of actions; forward, input and weight gradient take 1 each."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from drawing import RANKS, WIDTH_INCHES
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.testing._internal.distributed.fake_pg import FakeStore

STAGES, MICRO_BATCHES = 4, 8
DURATION = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
COLOR = {"F": (RANKS[0], "#5b9fcf"), "B": (RANKS[1], "#d99b3c"), "I": (RANKS[1], "#d99b3c"), "W": (RANKS[2], "#5fb08e")}


@dataclass(frozen=True)
class Cell:
    """One action of a rank."""

    kind: str
    stage: int
    micro: int
    start: float
    end: float


def order(schedule: type, per_rank: int) -> dict[int, list[Any]]:
    """Each rank's actions in order, as torch.distributed.pipelining runs them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=STAGES)
    try:
        one = torch.empty(1, 1, device="meta")
        stages = [
            PipelineStage(
                nn.Linear(1, 1, device="meta"),
                local * STAGES,
                STAGES * per_rank,
                torch.device("cpu"),
                input_args=(one,) if local else (),
                output_args=(one,),
            )
            for local in range(per_rank)
        ]
        built = schedule(stages[0] if schedule is Schedule1F1B else stages, MICRO_BATCHES, loss_fn=lambda out, _: out)
        return {rank: [action for action in actions if action is not None] for rank, actions in built.pipeline_order.items()}
    finally:
        dist.destroy_process_group()


def computations(actions: list[Any], per_rank: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of every computation."""
    found = [
        (a.computation_type.value, a.stage_index, a.microbatch_index) for a in actions if a.computation_type.value in DURATION
    ]
    if per_rank > 1:
        return found
    # torch 2.13 lists the forwards of 1F1B's last rank as 1 to m instead of 0 to m − 1 (what it runs is right).
    counts: Counter[str] = Counter()
    numbered = []
    for kind, stage, _ in found:
        numbered.append((kind, stage, counts[kind]))
        counts[kind] += 1
    return numbered


def timed(actions: dict[int, list[Any]], per_rank: int) -> dict[int, list[Cell]]:
    """Start every action as soon as its rank is free and what it needs has been computed; sending takes no time."""
    last = STAGES * per_rank - 1
    done: dict[tuple[str, int, int], float] = {}
    cells: dict[int, list[Cell]] = {rank: [] for rank in actions}
    waiting = {rank: computations(todo, per_rank) for rank, todo in actions.items()}
    while any(waiting.values()):
        before = len(done)
        for rank, todo in waiting.items():
            while todo:
                kind, stage, micro = todo[0]
                needs = {
                    "F": [("F", stage - 1, micro)] if stage else [],
                    "W": [("I", stage, micro)],
                }.get(kind, [("F", stage, micro)] + ([("grad", stage + 1, micro)] if stage < last else []))
                if any(need not in done for need in needs):
                    break
                free = cells[rank][-1].end if cells[rank] else 0.0
                start = max([free, *(done[need] for need in needs)])
                end = start + DURATION[kind] / per_rank
                cells[rank].append(Cell(kind, stage, micro, start, end))
                done[kind, stage, micro] = end
                if kind in "BI":
                    done["grad", stage, micro] = end
                todo.pop(0)
        assert len(done) > before, "the schedule waits for itself"
    return cells


def bubble(cells: dict[int, list[Cell]]) -> float:
    """Waiting over working time, of all ranks between the first start and the last end."""
    length = max(cell.end for row in cells.values() for cell in row)
    work = sum(cell.end - cell.start for row in cells.values() for cell in row)
    return (length * len(cells) - work) / work


SCHEDULES = (  # knob, stages a rank, schedule, what to call it
    ("1f1b", 1, Schedule1F1B, "one stage a rank"),
    ("interleaved_1f1b", 2, ScheduleInterleaved1F1B, "two stages a rank"),
    ("zero_bubble", 1, ScheduleInterleavedZeroBubble, "weight gradients apart, one stage a rank"),
)


def draw() -> Any:
    """The three schedules one below the other, on one time axis."""
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
    timelines = [(name, text, timed(order(schedule, per_rank), per_rank)) for name, per_rank, schedule, text in SCHEDULES]
    length = max(cell.end for _, _, cells in timelines for row in cells.values() for cell in row)
    figure, panels = plt.subplots(len(timelines), 1, figsize=(WIDTH_INCHES, 7.6), sharex=True)
    for axes, (name, text, cells) in zip(panels, timelines, strict=True):
        for rank, row in cells.items():
            for cell in row:
                width, color = cell.end - cell.start, COLOR[cell.kind][cell.stage // STAGES]
                axes.add_patch(Rectangle((cell.start, rank), width, 0.9, facecolor=color, edgecolor="white", linewidth=0.8))
                axes.text(cell.start + width / 2, rank + 0.45, cell.micro + 1, ha="center", va="center", fontsize=8)
        end = max(cell.end for row in cells.values() for cell in row)
        axes.set(xlim=(0, length), ylim=(STAGES, -0.1), yticks=[rank + 0.45 for rank in range(STAGES)])
        axes.set_yticklabels([f"rank {rank}" for rank in range(STAGES)])
        axes.set_title(f"{name}: {text}; ends at {end:g}, waiting ÷ work = {bubble(cells):.3f}")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("time, in forward passes of a rank's whole share")
    kinds = (
        ("F", 0, "forward"),
        ("B", 0, "backward; zero_bubble: of inputs only"),
        ("W", 0, "gradients of weights"),
        ("F", 1, "darker: the rank's second stage"),
    )
    handles = [Rectangle((0, 0), 1, 1, facecolor=COLOR[kind][stage], label=label) for kind, stage, label in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=10.5)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
