"""Context parallelism: who computes which part of the causal mask, and heads exchanged for positions."""

from typing import Any

import numpy as np
from drawing import GREY, RANKS, WIDTH_INCHES, arrow, box, canvas, note
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

CP, POSITIONS = 4, 64


def _work(rank_of_position: np.ndarray, window: int) -> np.ndarray:
    """Keys that each rank's queries see, summed over its queries."""
    keys = np.minimum(np.arange(POSITIONS) + 1, window)
    return np.bincount(rank_of_position, weights=keys, minlength=CP)


def context() -> Any:
    """The causal mask by the rank that computes it, and the work of each rank."""
    chunk = np.arange(POSITIONS) // (POSITIONS // (2 * CP))
    balanced = np.minimum(chunk, 2 * CP - 1 - chunk)
    consecutive = np.arange(POSITIONS) // (POSITIONS // CP)
    place = np.arange(POSITIONS)
    seen = place[None, :] <= place[:, None]
    figure, (mask, bars) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 4.2), width_ratios=(1, 1.15))
    colors = ListedColormap([GREY, *RANKS[:CP]])
    mask.imshow(np.where(seen, balanced[:, None] + 1, 0), cmap=colors, vmin=-0.5, vmax=CP + 0.5, interpolation="none")
    step = POSITIONS // (2 * CP)
    ticks = np.arange(2 * CP) * step + step / 2 - 0.5
    mask.set_yticks(ticks, [f"chunk {c}: rank {min(c, 2 * CP - 1 - c)}" for c in range(2 * CP)])
    mask.set_xticks(ticks, range(2 * CP))
    mask.tick_params(length=0)
    mask.set_xlabel("keys, gathered from all ranks, by chunk")
    mask.set_title("queries of one sequence, cp 4")
    for edge in range(1, 2 * CP):
        mask.axhline(edge * step - 0.5, color="white", linewidth=0.8)
    cases = (
        ("consecutive\nslices", consecutive, POSITIONS),
        ("early +\nlate chunk", balanced, POSITIONS),
        ("early + late,\nwindow S/4", balanced, POSITIONS // 4),
    )
    for index, (_, owner, window) in enumerate(cases):
        share = _work(owner, window) / _work(owner, window).sum()
        for rank in range(CP):
            bars.bar(index + 0.2 * (rank - 1.5), share[rank], 0.18, color=RANKS[rank])
            bars.text(index + 0.2 * (rank - 1.5), share[rank] + 0.008, f"{100 * share[rank]:.0f}", ha="center", fontsize=10)
    bars.set_xticks(range(len(cases)), [name for name, _, _ in cases])
    bars.set_title("attention's work by rank, % (computed)")
    bars.set(ylim=(0, 0.5), yticks=[])
    bars.spines[["top", "right", "left"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=RANKS[rank], label=f"rank {rank}") for rank in range(CP)]
    bars.legend(handles=handles, frameon=False, fontsize=10, loc="upper right")
    figure.tight_layout()
    return figure


def _grid(axes: Any, x: float, y: float, by_rows: bool) -> None:
    """8 chunks of positions × 4 groups of heads, coloured by the rank that holds them."""
    for chunk in range(2 * CP):
        for heads in range(CP):
            owner = min(chunk, 2 * CP - 1 - chunk) if by_rows else heads
            box(axes, x + heads * 5, y + chunk * 3, 5, 3, "", RANKS[owner], linewidth=0.4)


def ulysses() -> Any:
    """Positions of a rank with all heads become heads of a rank with all positions."""
    figure, axes = canvas(37)
    states = ((8, True, "own positions, all heads"), (43, False, "attention: all positions, own heads"), (78, True, "as before"))
    for x, by_rows, title in states:
        _grid(axes, x, 6, by_rows)
        note(axes, x + 10, 3.3, title, ha="center", fontsize=11)
        note(axes, x + 10, 32, "heads →", ha="center", fontsize=10)
    note(axes, 5.5, 18, "positions →", ha="center", rotation=-90, fontsize=10)
    for x in (29, 64):
        arrow(axes, (x + 0.5, 18), (x + 12.5, 18), linewidth=1.6, mutation_scale=16)
    note(axes, 35.5, 15, "all-to-all\nof q, k, v", ha="center", fontsize=10.5)
    note(axes, 70.5, 15, "all-to-all\nof the output", ha="center", fontsize=10.5)
    for rank in range(CP):
        box(axes, 30 + 11 * rank, 34, 2, 2, "", RANKS[rank], linewidth=0.4)
        note(axes, 32.7 + 11 * rank, 35.1, f"rank {rank}", fontsize=10)
    return figure
