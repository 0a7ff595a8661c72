"""The pictures of a run: what is drawn, from which rows, and what is refused."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib import pyplot as plt

from megagrin.observe.metrics import MetricsConfig, MetricsLogger
from megagrin.observe.plot import centred_mean, column, main, plot_expert_load, plot_loss

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    plt.close("all")


def write_run(run_dir: Path, steps: int = 20, hot: float = 0.4, moe: bool = True, broken: tuple[int, ...] = ()) -> Path:
    """A run of 3 layers of 4 experts; the last layer sends the share `hot` to expert 1."""
    rest = (1 - hot) / 3
    load = [[0.25] * 4, [0.25] * 4, [rest, hot, rest, rest]]
    with MetricsLogger(MetricsConfig(console=False), run_dir, {}, 0) as logger:
        for step in range(1, steps + 1):
            row = {
                "loss": math.nan if step in broken else 8.0 / math.sqrt(step),
                "lr": 1e-3,
                "grad_norm": 1.0 + 8.0 / step,
            }
            if moe:
                row |= {"load": load, "load_max": [max(layer) for layer in load]}
            logger.log(step, row)
            if step % 5 == 0:
                logger.log(step, {"valid_loss": 8.0 / math.sqrt(step) + 0.1})
    return run_dir


def pixels(path: Path) -> np.ndarray:
    return plt.imread(path)


def test_pictures_of_a_moe_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "plots" / name) for name in ("loss.png", "expert_load.png")]
    for name in ("loss.png", "expert_load.png"):
        assert len(np.unique(pixels(run / "plots" / name).reshape(-1, 4), axis=0)) > 20


def test_expert_load_picture_shows_the_load(tmp_path: Path) -> None:
    out = []
    for name, hot in (("first", 0.4), ("same", 0.4), ("other", 0.26)):
        run = write_run(tmp_path / name / "run", hot=hot)
        main(["--run", str(run), "--out", str(tmp_path / "out" / name)])
        out.append(pixels(tmp_path / "out" / name / "expert_load.png"))
    assert np.array_equal(out[0], out[1])
    assert not np.array_equal(out[0], out[2])


def test_heat_map_averages_the_last_rows_only() -> None:
    rows = [{"step": step, "load": [[share, 1 - share]], "load_max": [share]} for step, share in ((1, 1.0), (2, 0.75), (3, 0.5))]
    heat_map = plot_expert_load(rows, "run", last=2).axes[0].images[0]
    assert np.asarray(heat_map.get_array()).tolist() == [[0.625, 0.375]]
    assert heat_map.norm.vcenter == 0.5
    assert (heat_map.norm.vmin, heat_map.norm.vmax) == (0.0, 1.0)


def test_lines_of_the_largest_load_and_of_balance() -> None:
    """A line for each layer through its own values, in a colour of its own, and one at 1/E."""
    rows = [{"step": step, "load": [[0.5, 0.5], [0.7, 0.3]], "load_max": [0.5, 0.6 + step / 10]} for step in (1, 2, 3)]
    lines = plot_expert_load(rows, "run", last=2).axes[1].get_lines()
    first, second, balance = lines
    assert first.get_xdata().tolist() == second.get_xdata().tolist() == [1, 2, 3]
    assert first.get_ydata().tolist() == [0.5] * 3
    assert second.get_ydata().tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert first.get_color() != second.get_color()
    assert list(balance.get_ydata()) == [0.5, 0.5]


def test_dense_run_has_a_loss_picture_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", moe=False)
    assert main(["--run", str(run)]) == 0
    assert [path.name for path in (run / "plots").iterdir()] == ["loss.png"]


def test_loss_picture_shows_steps_validation_and_what_is_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", broken=(7, 9))
    assert main(["--run", str(run)]) == 0
    rows = [{"step": step, "loss": math.inf if step == 2 else 1.0, "grad_norm": 1.0} for step in range(1, 5)]
    figure = plot_loss([*rows, {"step": 4, "valid_loss": 1.5}], "night run")
    curves = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert curves["validation"].tolist() == [[4.0, 1.5]]
    assert curves["training, not finite"][:, 0].tolist() == [2.0]
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss (nats per token)", "gradient norm"]
    assert figure.axes[0].get_title(loc="left") == "night run"


def test_a_long_run_leaves_the_start_out_and_keeps_a_late_divergence() -> None:
    rows = [{"step": step, "loss": 2.0 + 8.0 * math.exp(-step / 10)} for step in range(1, 1001)]
    assert plot_loss(rows, "run").axes[0].get_ylim()[1] < 3.0
    diverged = rows[:900] + [{"step": row["step"], "loss": 6.0} for row in rows[900:]]
    assert plot_loss(diverged, "run").axes[0].get_ylim()[1] > 6.0


def test_centred_mean_skips_what_is_not_finite() -> None:
    value_N = np.array([1.0, 2.0, math.nan, 6.0, math.inf, math.nan, math.nan])
    assert centred_mean(value_N, 3).tolist()[:6] == [1.5, 1.5, 4.0, 6.0, 6.0, pytest.approx(math.nan, nan_ok=True)]
    assert centred_mean(np.arange(5.0), 1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(centred_mean(np.empty(0), 3)) == 0


def test_column_takes_the_rows_that_have_the_field() -> None:
    step_N, value_N = column([{"step": 1, "loss": 3.0}, {"step": 1, "valid_loss": 2.0}, {"step": 2, "loss": 1}], "loss")
    assert (step_N.tolist(), value_N.tolist()) == ([1.0, 2.0], [3.0, 1.0])


def test_missing_run_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run: .*nowhere/metrics\.jsonl"):
        main(["--run", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("content", ["", '{"step": 1, "lo'])
def test_run_without_rows_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no row with a loss"):
        main(["--run", str(tmp_path)])


def test_last_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--last: 0"):
        main(["--run", str(write_run(tmp_path)), "--last", "0"])


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'megagrin\[plot\]'"):
        main(["--run", str(write_run(tmp_path))])
