"""Expert parallelism: rows on their way to the experts, and experts cut over several ranks."""

from typing import Any

import numpy as np
from draw_tensor import lanes
from drawing import COLLECTIVE, RANKS, arrow, box, canvas, note

EP, EXPERTS, TOKENS, TOP_K = 4, 8, 6, 2


def _rows(axes: Any, x: float, y: float, rows: np.ndarray, height: float) -> None:
    """Small squares, one a row: colour of the rank it came from, number of its expert."""
    for index, (origin, expert) in enumerate(rows):
        box(axes, x + 2.6 * index, y, 2.6, height, str(expert), RANKS[origin], 9.5, linewidth=0.5)


def expert() -> Any:
    """Rows of four ranks, sorted by expert, before and after the all-to-all; choices drawn at random."""
    generator = np.random.default_rng(3)
    choices = [
        (rank, int(chosen))
        for rank in range(EP)
        for _ in range(TOKENS)
        for chosen in generator.choice(EXPERTS, TOP_K, replace=False, p=(0.3, 0.05, 0.2, 0.1, 0.05, 0.05, 0.15, 0.1))
    ]
    home = np.array(sorted(choices))
    figure, axes = canvas(42)
    here, away, lane = 8.0, 50.0, 7.5
    note(axes, here, 2.2, f"{TOKENS} tokens × top-{TOP_K} a rank, sorted by expert", fontsize=11)
    note(axes, away, 2.2, "rows of its experts, from all ranks, sorted by expert", fontsize=11)
    box(axes, 41.5, 4.5, 4, 4 * lane - 2, "", COLLECTIVE)
    axes.text(43.5, 3.5 + 2 * lane, "all-to-all", rotation=90, ha="center", va="center", fontsize=11)
    per_rank = EXPERTS // EP
    for rank in range(EP):
        y = 4.5 + lane * rank
        note(axes, 0.5, y + 2.5, f"rank {rank}", fontsize=11)
        _rows(axes, here, y, home[home[:, 0] == rank], 4.6)
        mine = home[home[:, 1] // per_rank == rank]
        _rows(axes, away, y, mine[np.argsort(mine[:, 1], kind="stable")], 4.6)
        note(axes, away, y + 5.8, f"experts {rank * per_rank}–{(rank + 1) * per_rank - 1}", fontsize=9)
        arrow(axes, (here + 2.6 * TOKENS * TOP_K, y + 2.3), (41.5, y + 2.3))
        arrow(axes, (45.5, y + 2.3), (away, y + 2.3))
    text = "number: the expert; colour: the rank the token lives on. No padding, no dropping: sizes are exact and may be 0."
    note(axes, here, 37.0, text, fontsize=10)
    text = "The outputs travel back the same way and are summed per token; backward repeats both journeys."
    note(axes, here, 40.0, text, fontsize=10)
    return figure


def expert_tensor() -> Any:
    """One etp group of two ranks: the same experts, half of each one's width."""
    figure, axes = canvas(25)
    for rank in range(2):
        note(axes, 0.5, 6.2 + 9 * rank, f"rank {rank}", fontsize=11)
    lanes(
        axes,
        2.5,
        [
            (8, 13, [f"R{rank} rows of\nthese experts" for rank in ("₀", "₁")]),
            (24, 4, "all-gather"),
            (31, 14, ["R₀ + R₁ rows,\nsorted by expert"] * 2),
            (48, 14, [f"all three matrices:\n{half} half\nof the width F" for half in ("first", "second")]),
            (65, 11, ["R₀ + R₁\npartial sums"] * 2),
            (79, 4, "reduce-scatter"),
            (86, 13, [f"R{rank} outputs" for rank in ("₀", "₁")]),
        ],
        9.0,
    )
    note(axes, 8, 22.5, "R₀ ≠ R₁ in general; either may be 0. Backward: the same two collectives, exchanged.", fontsize=10)
    return figure
