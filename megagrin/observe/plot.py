"""`megagrin plot`: the pictures of a run, from its metrics.jsonl.

Array suffixes: N rows, L layers, E experts.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megagrin.observe.metrics import FILE_NAME, read_metrics
from megagrin.settings.arguments import about, require_folder
from megagrin.settings.commands import CommandParser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
Floats = NDArray[np.float64]

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f5fa8", "#d1690e", "#2c8a4b", "#c22f2f", "#5a5a5a"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# Points of a curve over steps: more than the picture has pixels only costs time.
_MAX_POINTS = 2000
_ROUND_STEPS = [1, 2, 5, 10]  # distances between ticks


def column(rows: Rows, name: str) -> tuple[Floats, Floats]:
    """Steps (N,) and values (N,) of the rows that have the field."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    if not pairs:
        return np.empty(0), np.empty(0)
    step_N, value_N = zip(*pairs, strict=True)
    return np.asarray(step_N, dtype=np.float64), np.asarray(value_N, dtype=np.float64)


def centred_mean(value_N: Floats, width: int) -> Floats:
    """Mean of the finite values within `width` // 2 rows to either side; NaN where there is none.

    Centred, unlike a running average: the curve then does not lag behind a steep start.
    """
    finite_N = np.isfinite(value_N)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite_N, value_N, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite_N)))
    row_N = np.arange(len(value_N))
    low_N, high_N = np.maximum(row_N - width // 2, 0), np.minimum(row_N + width // 2 + 1, len(value_N))
    sum_N, count_N = sums[high_N] - sums[low_N], counts[high_N] - counts[low_N]
    return np.divide(sum_N, count_N, out=np.full(len(value_N), np.nan), where=count_N > 0)


def plot_loss(rows: Rows, title: str) -> "Figure":
    """Training and validation loss over steps; below, the learning rate and the gradient norm where they were logged.

    Args:
        rows: from `read_metrics`; at least one has `loss` or `valid_loss`.
        title: name of the run.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    below = [name for name in ("lr", "grad_norm") if np.isfinite(column(rows, name)[1]).any()]
    heights = [3.4] + [1.15] * len(below)
    size = (8.0, 1.0 + sum(heights))
    figure, axes = plt.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights, figsize=size, layout="constrained"
    )
    _loss_panel(axes[0, 0], rows, title)
    for axis, name in zip(axes[1:, 0], below, strict=True):
        step_N, value_N = column(rows, name)
        axis.plot(step_N, value_N, _dots(value_N), color=_GREY if name == "lr" else _GREEN, linewidth=0.9)
        if name == "lr":
            axis.set_ylabel("learning rate")
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND_STEPS))
            axis.yaxis.set_major_formatter("{x:.3g}")
        else:
            axis.set_ylabel("gradient norm")
            positive_N = value_N[np.isfinite(value_N) & (value_N > 0)]
            if len(positive_N) and positive_N.max() > 5 * positive_N.min():
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def _dots(value_N: Floats) -> str:
    """Line style: a single point has no line, so it gets a dot."""
    return "-" if len(value_N) > 1 else "o"


def _loss_panel(axis: "Axes", rows: Rows, title: str) -> None:
    step_N, loss_N = column(rows, "loss")
    valid_step_N, valid_N = column(rows, "valid_loss")
    width = min(100, len(step_N) // 50)
    mean_N = centred_mean(loss_N, width)
    if width > 1:
        axis.plot(step_N, loss_N, color=_BLUE, alpha=0.3, linewidth=0.7, label="training, each step")
        axis.plot(step_N, mean_N, color=_BLUE, linewidth=1.6, label=f"training, mean of {width} steps")
    elif len(step_N):
        axis.plot(step_N, loss_N, _dots(loss_N), color=_BLUE, linewidth=1.3, label="training")
    if len(valid_step_N):
        axis.plot(valid_step_N, valid_N, "o-", color=_ORANGE, markersize=4, linewidth=0.9, label="validation")
    broken_N = step_N[~np.isfinite(loss_N)]
    if len(broken_N):
        height_N = np.full(len(broken_N), 0.03)
        axis.plot(broken_N, height_N, "x", color=_RED, transform=axis.get_xaxis_transform(), label="training, not finite")
    _leave_out_start(axis, loss_N, mean_N, valid_N)
    axis.set_ylabel("loss (nats per token)")
    axis.set_title(title, loc="left", fontweight="bold")
    axis.legend(loc="upper right")


def _leave_out_start(axis: "Axes", loss_N: Floats, mean_N: Floats, valid_N: Floats) -> None:
    """In long runs let the first 5 % of the steps, which fall from ln(vocabulary), leave the picture at the top."""
    skip = len(loss_N) // 20
    later_N = mean_N[skip:][np.isfinite(mean_N[skip:])]
    shown_N = np.concatenate((later_N, valid_N[np.isfinite(valid_N)]))
    if len(loss_N) < 500 or not len(shown_N) or not loss_N[0] > shown_N.max():
        return
    low, high = min(shown_N.min(), np.nanmin(np.where(np.isfinite(loss_N), loss_N, np.nan))), shown_N.max()
    margin = 0.08 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.set_title(f"first step: loss {loss_N[0]:.2f}", loc="right", color=_GREY, fontsize=8)


def plot_expert_load(rows: Rows, title: str, last: int) -> "Figure":
    """Load of each expert in each layer, averaged over the last rows, and the largest load of each layer over steps.

    Args:
        rows: from `read_metrics`; at least one has `load`.
        title: name of the run.
        last: rows with `load` to average, counted from the end.
    """
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    loads = [row for row in rows if "load" in row][-last:]
    load_LE = np.mean([row["load"] for row in loads], axis=0)
    layers = load_LE.shape[0]
    height = float(np.clip(1.6 + 0.13 * layers, 3.6, 9.0))
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(1, 1.1), layout=layout)
    _heat_map(left, load_LE)
    span = f"steps {loads[0]['step']} to {loads[-1]['step']}" if len(loads) > 1 else f"step {loads[0]['step']}"
    left.set_title(f"Load of each expert, {span}", loc="left")
    _max_load_panel(right, rows, experts=load_LE.shape[1])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _heat_map(axis: "Axes", load_LE: Floats) -> None:
    layers, experts = load_LE.shape
    balanced = 1.0 / experts
    # Two slopes meet in white at the balanced load, so that colour says over or under at a glance.
    from matplotlib.colors import TwoSlopeNorm

    # At least twice the balanced load: the colours of runs compare, and a good balance looks pale.
    top = max(float(load_LE.max()), 2 * balanced)
    image = axis.imshow(load_LE, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(balanced, vmin=0.0, vmax=top))
    axis.grid(False)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_xticks(_ticks(experts))
    axis.set_yticks(_ticks(layers))
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("share of the layer's tokens")
    ticks = [0.0, balanced / 2, balanced, (balanced + top) / 2, top]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" + ("\nbalanced" if tick == balanced else "") for tick in ticks])
    bar.ax.axhline(balanced, color="black", linewidth=1.2)


def _ticks(count: int) -> list[int]:
    """Every index, or every 2nd, 4th, 8th, … so that at most 16 are labelled."""
    stride = next(2**power for power in itertools.count() if count <= 16 * 2**power)
    return list(range(0, count, stride))


def _max_load_panel(axis: "Axes", rows: Rows, experts: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    pairs = [(row["step"], row["load_max"]) for row in rows if "load_max" in row]
    stride = math.ceil(len(pairs) / _MAX_POINTS)
    step_N = np.array([step for step, _ in pairs], dtype=np.float64)
    max_NL = np.array([maxima for _, maxima in pairs], dtype=np.float64)
    layers = max_NL.shape[1]
    norm, colours = Normalize(0, max(layers - 1, 1)), colormaps["viridis"]
    width = min(100, len(pairs) // 50)
    for layer in range(layers):
        mean_N = centred_mean(max_NL[:, layer], width)
        axis.plot(step_N[::stride], mean_N[::stride], _dots(step_N), color=colours(norm(layer)), linewidth=0.9)
    axis.axhline(1.0 / experts, color="black", linestyle="--", linewidth=1.0)
    axis.annotate(
        f"balanced: 1/{experts}",
        (1.0, 1.0 / experts),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -11),
        textcoords="offset points",
        ha="right",
    )
    axis.set_ylim(0, 1.06 * max(float(np.nanmax(max_NL)), 1.0 / experts))
    axis.set_xlabel("optimizer step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS, min_n_ticks=1))
    axis.set_ylabel("largest share of one expert")
    smoothing = f", mean of {width} steps" if width > 1 else ""
    axis.set_title(f"Largest load in each layer{smoothing}", loc="left")
    if layers > 1:
        bar = axis.figure.colorbar(ScalarMappable(norm, colours), ax=axis, pad=0.02)
        bar.set_label("layer")
        bar.set_ticks(_ticks(layers))


def _load_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("megagrin plot needs matplotlib: pip install 'megagrin[plot]'") from error
    matplotlib.use("Agg")  # no display on a training machine


def main(argv: Sequence[str]) -> int:
    """`megagrin plot --run DIR [--out DIR] [--last N]`: write loss.png, and expert_load.png for runs with experts.

    Raises:
        FileNotFoundError: the run has no metrics.jsonl.
        ValueError: metrics.jsonl holds no losses or is damaged, or --last is below 1.
        ImportError: matplotlib is not installed.
    """
    parser = CommandParser(prog="megagrin plot", description="Draw a run's loss curves and expert load.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--out", type=Path | None, default=None, metavar="DIR", help="folder of the pictures (default: RUN/plots)"
    )
    parser.add_argument(
        "--last", type=int, default=100, metavar="N", help="rows averaged in the map of expert load (default: 100)"
    )
    arguments = parser.parse_args(argv)
    if arguments.last < 1:
        raise ValueError(f"--last: {arguments.last} must be at least 1")
    source = arguments.run / FILE_NAME
    with about("--run"):
        rows = read_metrics(source)
    if not any("loss" in row or "valid_loss" in row for row in rows):
        raise ValueError(f"--run: {source}: holds no row with a loss; has the run finished its first step?")
    out = arguments.out or arguments.run / "plots"
    require_folder("--out", out)
    _load_matplotlib()
    from matplotlib import pyplot as plt

    title = arguments.run.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        pictures = {"loss.png": plot_loss(rows, title)}
        if any("load" in row and "load_max" in row for row in rows):
            pictures["expert_load.png"] = plot_expert_load(rows, title, arguments.last)
        for name, figure in pictures.items():
            figure.savefig(out / name)
            plt.close(figure)
            print(out / name)
    return 0
