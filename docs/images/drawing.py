"""Boxes, arrows and colours shared by the pictures of docs/parallelism.md."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

# One colour per rank, told apart by colour-blind readers, too (after Okabe and Ito, lightened).
RANKS = ("#8fc7ea", "#f5c26b", "#8fd3b6", "#e3a5c7", "#b9b4e0", "#d8d38a", "#e59a80", "#b7c4cc")
GREY, DARK, COLLECTIVE = "#eceff1", "#263238", "#cfd8dc"
WIDTH_INCHES, DPI = 10.0, 150

mpl.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": DARK,
        "axes.edgecolor": DARK,
        "axes.labelcolor": DARK,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "xtick.color": DARK,
        "ytick.color": DARK,
    }
)


def canvas(height: float, width: float = 100.0) -> tuple[Any, Axes]:
    """A figure with one axis without frame; x from 0 to `width`, y from 0 at the top to `height`, equal units."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, WIDTH_INCHES * height / width))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    return figure, axes


def box(
    axes: Axes, x: float, y: float, w: float, h: float, text: str = "", color: str = GREY, size: float = 11, **style: Any
) -> None:
    """A filled rectangle with its upper left corner at (x, y) and a centred text."""
    style = {"edgecolor": DARK, "linewidth": 0.8} | style
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, **style))
    if text:
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, linespacing=1.25)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """A thin arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": DARK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0} | style
    axes.add_patch(FancyArrowPatch(start, end, **style))


def note(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """A text, left-aligned and vertically centred unless said otherwise."""
    axes.text(x, y, text, **({"ha": "left", "va": "center", "linespacing": 1.3} | style))


def save(figure: Any, folder: Path, name: str) -> None:
    """Write a PNG without a date, so that the same picture is the same file."""
    figure.savefig(folder / f"parallelism_{name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})
    plt.close(figure)
