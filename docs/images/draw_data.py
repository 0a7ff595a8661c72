"""Who is in which group, and what data parallelism keeps and gathers."""

from typing import Any

import numpy as np
from drawing import DARK, GREY, RANKS, WIDTH_INCHES, arrow, box, canvas, note
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

DENSE = {"pp": 2, "dp": 2, "cp": 2, "tp": 2}
REDUCE = "#b5533c"
EXPERT = {"pp": 2, "edp": 2, "ep": 4, "etp": 1}


def folding() -> Any:
    """Coordinates of 16 ranks along the axes of both views."""
    ranks = np.arange(16)
    figure, axes = canvas(47)
    left, cell = 15.0, 5.2
    y = 6.0
    dense = dict(zip(DENSE, np.unravel_index(ranks, tuple(DENSE.values())), strict=True))
    expert = dict(zip(EXPERT, np.unravel_index(ranks, tuple(EXPERT.values())), strict=True))
    rows = [(name, dense[name]) for name in DENSE] + [("rank", ranks)] + [(name, expert[name]) for name in reversed(EXPERT)]
    note(axes, 0.5, 2.5, "dense view: attention, norms, embedding, head   (pp 2 × dp 2 × cp 2 × tp 2)", fontsize=12)
    for name, values in rows:
        note(axes, left - 1.5, y + 1.9, name, ha="right", fontsize=12, weight="bold" if name == "rank" else "normal")
        start = 0
        for end in range(1, 17):
            if end < 16 and values[end] == values[start] and name != "rank":
                continue
            color = "white" if name == "rank" else RANKS[int(values[start])]
            box(axes, left + start * cell, y, (end - start) * cell, 3.8, str(values[start]), color)
            start = end
        y += 3.8 + (1.2 if name in ("tp", "rank") else 0)
    note(axes, 0.5, y + 2.0, "expert view: experts on the same ranks   (pp 2 × edp 2 × ep 4 × etp 1)", fontsize=12)
    return figure


def _gathered(axes: Any, title: str, zero: int) -> None:
    """Which layers' parameters are whole on a rank at each moment of a step of two micro-batches."""
    layers, micro_batches = 4, 2
    pass_ = 2 * layers
    for layer in range(layers):
        axes.add_patch(Rectangle((0, layer), micro_batches * pass_, 0.86, facecolor=GREY))
        uses = [(m * pass_ + layer, m * pass_ + pass_ - 1 - layer) for m in range(micro_batches)]
        spans = [(start, start + 1) for use in uses for start in use] if zero == 3 else [(uses[0][0], uses[-1][1] + 1)]
        for start, end in spans:
            axes.add_patch(Rectangle((start, layer), end - start, 0.86, facecolor=RANKS[0]))
            axes.plot(start + 0.35, layer + 0.43, marker=">", color=DARK, markersize=6, clip_on=False)
        for _, backward in uses[-1:] if zero == 1 else uses:
            axes.plot(backward + 1, layer + 0.43, marker="s", color=REDUCE, markersize=6, clip_on=False)
    for edge in range(layers, micro_batches * pass_, layers):
        axes.axvline(edge, color=DARK, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.3, micro_batches * pass_ + 0.3), ylim=(layers, -0.1), yticks=[i + 0.43 for i in range(layers)])
    axes.set_yticklabels([f"layer {i}" for i in range(layers)])
    axes.set_xticks([layers / 2 + layers * i for i in range(2 * micro_batches)], ["forward", "backward"] * micro_batches)
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _copies(axes: Any) -> None:
    """Hybrid sharding: two copies of four shards."""
    axes.set(xlim=(0, 42), ylim=(27, 0))
    axes.axis("off")
    axes.set_title("dp_replicate: 2, on 8 ranks")
    for copy, (top, caption) in enumerate(((0.0, 1.6), (16.0, 8.6))):
        box(axes, 0.2, top, 41.6, 10, "", "white", linestyle="--")
        note(axes, 21, top + caption, "all-gather, reduce-scatter in here", fontsize=10, ha="center")
        for shard in range(4):
            x = 1.2 + 10 * shard
            box(axes, x, top + (3.2 if copy == 0 else 1.0), 9.4, 6, f"rank {4 * copy + shard}\nshard {shard}", RANKS[shard], 9.5)
            if copy:
                arrow(axes, (x + 4.7, 9.4), (x + 4.7, 16.8), arrowstyle="<|-|>")
    note(axes, 21, 13.1, "all-reduce of the shards of gradients", fontsize=10, ha="center", backgroundcolor="white")


def data() -> Any:
    """What is gathered and reduced under engine.zero 1, 2, 3, and hybrid sharding."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH_INCHES, 6.2), width_ratios=(1.15, 1))
    for axes, zero, title in (
        (panels[0, 0], 3, "zero: 3 frees after each use"),
        (panels[1, 0], 2, "zero: 2 keeps parameters"),
        (panels[0, 1], 1, "zero: 1 keeps gradients, too"),
    ):
        _gathered(axes, title, zero)
    panels[0, 1].set_yticklabels([])
    _copies(panels[1, 1])
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=RANKS[0], label="whole on this rank"),
        Rectangle((0, 0), 1, 1, facecolor=GREY, label="this rank's shard only"),
        *plt.plot([], [], ">", color=DARK, label="all-gather"),
        *plt.plot([], [], "s", color=REDUCE, label="reduce-scatter of the gradient"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1), h_pad=1.5)
    return figure
