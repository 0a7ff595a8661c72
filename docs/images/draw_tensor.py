"""Tensor parallelism: lanes of ranks with the collectives between their computations, and a vocabulary cut in rows."""

from collections.abc import Sequence
from typing import Any

from drawing import COLLECTIVE, RANKS, arrow, box, canvas, note


def lanes(axes: Any, top: float, columns: Sequence[tuple[float, float, Sequence[str] | str]], lane: float = 8.0) -> None:
    """A lane per rank: a sequence of texts is a box in each lane, one text is a collective across all lanes.

    Args:
        axes: canvas.
        top: upper edge.
        columns: (left edge, width, texts).
        lane: height of a lane.
    """
    ranks = max(len(texts) for _, _, texts in columns if not isinstance(texts, str))
    for index, (x, width, texts) in enumerate(columns):
        if isinstance(texts, str):
            box(axes, x, top, width, ranks * lane - 1.5, "", COLLECTIVE)
            axes.text(x + width / 2, top + (ranks * lane - 1.5) / 2, texts, rotation=90, ha="center", va="center", fontsize=11)
        else:
            for rank, text in enumerate(texts):
                box(axes, x, top + rank * lane, width, lane - 1.5, text, RANKS[rank], 10)
        if index:
            before = columns[index - 1]
            for rank in range(ranks):
                y = top + rank * lane + (lane - 1.5) / 2
                arrow(axes, (before[0] + before[1], y), (x, y))


def tensor() -> Any:
    """One attention sublayer over two ranks."""
    figure, axes = canvas(25)
    for rank in range(2):
        note(axes, 0.5, 6.2 + 9 * rank, f"rank {rank}", fontsize=11)
    texts = [
        (8, 13, [f"positions\n{span}\nB × S/2 × D" for span in ("0 … S/2", "S/2 … S")]),
        (24, 4, "all-gather"),
        (31, 14, [f"q, k, v: columns of\nheads {span}\nall S positions" for span in ("0 … H/2", "H/2 … H")]),
        (48, 12, [f"attention of\nheads {span}" for span in ("0 … H/2", "H/2 … H")]),
        (63, 13, ["rows of o for\nthese heads:\na partial sum"] * 2),
        (79, 4, "reduce-scatter"),
        (86, 13, [f"positions\n{span}\nB × S/2 × D" for span in ("0 … S/2", "S/2 … S")]),
    ]
    lanes(axes, 2.5, texts, 9.0)
    text = "Norms, router and dispatch work on the slices. q, k and v share one gathered copy. Backward: the same, reversed."
    note(axes, 8, 22.5, text, fontsize=10)
    return figure


def vocabulary() -> Any:
    """67 pieces over four ranks: uneven rows, one number each way per token."""
    pieces, ranks = 67, 4
    block = -(-pieces // ranks)
    edges = [min(pieces, rank * block) for rank in range(ranks + 1)]
    figure, axes = canvas(37)
    rows = [f"rows {edges[r]}–{edges[r + 1] - 1}\n({edges[r + 1] - edges[r]} of {pieces})" for r in range(ranks)]
    for rank in range(ranks):
        note(axes, 0.5, 5.2 + 7.5 * rank, f"rank {rank}", fontsize=11)
    lanes(
        axes,
        2.2,
        [
            (8, 12, ["hidden states\nB × S/4 × D"] * ranks),
            (23, 4, "all-gather"),
            (30, 11, rows),
            (44, 16, ["per token: largest\nlogit, Σ exp, label's"] * ranks),
            (63, 4, "all-gather of 4 numbers a token"),
            (70, 13, ["loss, equal on\nall ranks"] * ranks),
            (86, 13, ["gradient of own\nrows; part of dx"] * ranks),
        ],
        7.5,
    )
    text = "Backward: the parts of dx are summed by the reduce-scatter that reverses the first all-gather. Logits never travel."
    note(axes, 8, 34.5, text, fontsize=10)
    return figure
