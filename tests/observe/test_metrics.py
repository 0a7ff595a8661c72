"""metrics.jsonl, expert load, and the console. FLOPs are in test_flops.py, the trackers in test_trackers.py."""

import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megagrin.observe.metrics import MetricsConfig, MetricsLogger, expert_load, read_metrics
from megagrin.observe.trackers import ConsoleTracker, format_row, scalars, seconds_left

QUIET = MetricsConfig(console=False)


def train_row(step: int) -> dict[str, object]:
    return {"loss": 10.0 / step, "grad_norm": 0.1 + step, "load": [[0.25, 0.75]], "load_max": [0.75]}


def write_rows(run_dir: Path, steps: range, resume_step: int = 0, config: MetricsConfig = QUIET) -> Path:
    with MetricsLogger(config, run_dir, {}, resume_step) as logger:
        for step in steps:
            logger.log(step, train_row(step))
    return run_dir / "metrics.jsonl"


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def test_rows_read_back_bit_equal(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**-1074, math.pi * 1e-20, 12345678.9]
    single = torch.tensor([0.1, 1 / 3], dtype=torch.float32)
    with MetricsLogger(QUIET, tmp_path, {}, 0) as logger:
        for step, value in enumerate(values, start=1):
            logger.log(step, {"loss": value, "load_max": single, "grad_norm": np.float32(value % 1), "lr": single[0]})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [bits(row["loss"]) for row in rows] == [bits(value) for value in values]
    for row, value in zip(rows, values, strict=True):
        assert torch.equal(torch.tensor(row["load_max"], dtype=torch.float32), single)
        assert np.float32(row["grad_norm"]) == np.float32(value % 1)
        assert bits(row["lr"]) == bits(float(single[0]))


def test_rows_that_are_not_finite_stay_json_and_come_back(tmp_path: Path) -> None:
    with MetricsLogger(QUIET, tmp_path, {}, 0) as logger:
        logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "load_max": [0.5, -math.inf]})
        logger.log(2, {"loss": torch.tensor(math.nan), "grad_norm": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    raw = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert raw[0] == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "load_max": [0.5, "-Infinity"]}
    first, second = read_metrics(path)
    assert math.isnan(first["loss"])
    assert first["grad_norm"] == math.inf
    assert first["load_max"] == [0.5, -math.inf]
    assert math.isnan(second["loss"])


def test_resume_drops_later_rows_and_appends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path, range(1, 11))
    with MetricsLogger(QUIET, tmp_path, {}, 10) as logger:
        logger.log(10, {"valid_loss": 3.0})
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        write_rows(tmp_path, range(7, 9), resume_step=6)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    kept = b"".join(before.splitlines(keepends=True)[:6])
    assert path.read_bytes().startswith(kept), "rows before the resume point change"
    assert "dropped 5 rows after step 6" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


def test_evaluation_row_of_the_resume_step_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path, range(1, 5))
    with MetricsLogger(QUIET, tmp_path, {}, 4) as logger:
        logger.log(4, {"valid_loss": 3.0})
    write_rows(tmp_path, range(5, 6), resume_step=4)
    assert steps_in(path) == [1, 2, 3, 4, 4, 5]
    assert read_metrics(path)[4] == {"step": 4, "valid_loss": 3.0}


@pytest.mark.parametrize("tail", [b'{"step": 4, "loss": 2.', b'{"step": 4, "loss": 2.5', b"\0\0\0\0", b'"', b"4\n"])
def test_last_line_torn_by_a_kill_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = write_rows(tmp_path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert steps_in(path) == [1, 2, 3]
    write_rows(tmp_path, range(4, 5), resume_step=3)
    assert path.read_bytes().startswith(whole)
    assert steps_in(path) == [1, 2, 3, 4]


def test_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path, range(1, 4))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write_rows(tmp_path, range(4, 5), resume_step=3)
    assert steps_in(path) == [1, 2, 3, 4]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path, range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"loss": 1}\n' + lines[2])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a row"):
        read_metrics(path)
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        MetricsLogger(QUIET, tmp_path, {}, 2)
    assert path.read_bytes() == damaged


def test_every_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    with MetricsLogger(QUIET, tmp_path, {}, 0) as logger:
        for step in range(1, 4):
            logger.log(step, train_row(step))
            assert steps_in(tmp_path / "metrics.jsonl")[-1] == step


def test_a_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    script = """
import resource, sys
from megagrin.observe.metrics import MetricsConfig, MetricsLogger
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with MetricsLogger(MetricsConfig(console=False), sys.argv[1], {}, 0) as logger:
    for step in range(1, 100):
        logger.log(step, {"loss": 0.125})
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert "metrics.jsonl, step 4: wrote 19 of 27 bytes" in ended.stderr
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_load_interval_thins_the_matrix_only(tmp_path: Path) -> None:
    path = write_rows(tmp_path, range(1, 7), config=MetricsConfig(console=False, load_interval=3))
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "load" in row] == [3, 6]
    assert all(row["load_max"] == [0.75] for row in rows)


def test_config_names_every_violation() -> None:
    assert MetricsConfig(log_interval=1, load_interval=1, peak_tflops=0.5).violations() == []
    broken = "; ".join(MetricsConfig(log_interval=0, load_interval=-1, peak_tflops=0.0).violations())
    assert re.search(r"log_interval: 0 .*load_interval: -1 .*peak_tflops: 0", broken)
    assert not MetricsConfig().violations()


def test_expert_load_of_balanced_and_one_sided_layers() -> None:
    counts_LE = torch.tensor([[5, 5, 5, 5], [0, 12, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    load_LE, max_L, entropy_L = expert_load(counts_LE)
    assert load_LE.dtype == torch.float64
    assert load_LE[0].tolist() == [0.25] * 4
    assert load_LE[3].tolist() == [0.0] * 4
    assert max_L.tolist() == [0.25, 1.0, 0.5, 0.0]
    assert entropy_L[:2].tolist() == pytest.approx([1.0, 0.0], abs=1e-15)
    # ln of the halves and quarters: (1/2·ln 2 + 2·1/4·ln 4) / ln 4 = 3/4
    assert entropy_L[2].item() == pytest.approx(0.75, abs=1e-15)
    assert entropy_L[3].item() == 0.0


def test_expert_load_of_counts_beyond_fp32() -> None:
    counts_LE = torch.tensor([[2**24 + 1, 2**24 + 3]])
    assert expert_load(counts_LE)[0].tolist() == [[(2**24 + 1) / (2**25 + 4), (2**24 + 3) / (2**25 + 4)]]


def test_expert_load_with_a_single_expert_is_balanced() -> None:
    assert expert_load(torch.tensor([[7]]))[2].tolist() == [1.0]


def test_expert_load_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"counts_LE: shape \(4,\)"):
        expert_load(torch.ones(4))


def test_scalars_take_the_worst_layer() -> None:
    record = {
        "step": 3,
        "loss": 2.0,
        "load_max": [0.1, 0.4],
        "load_entropy": [0.9, 0.5],
        "load": [[0.6, 0.4]],
        "note": "x",
    }
    assert scalars(record) == {"step": 3, "loss": 2.0, "load_max": 0.4, "load_entropy": 0.5}


def test_seconds_left_extrapolates_recent_pace() -> None:
    assert seconds_left([(10, 100.0), (11, 103.0), (14, 112.0)], total_steps=20) == pytest.approx(18.0)
    assert seconds_left([(10, 100.0)], total_steps=20) is None
    assert seconds_left([], total_steps=20) is None


def test_row_format() -> None:
    record = {
        "loss": 2.34567,
        "lr": 3e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 12345.6,
        "load_max": [0.1, 0.25],
        "mfu": 0.4,
    }
    assert format_row(3, record, 10, 3661.2) == (
        "step 3/10 | loss 2.3457 | lr 3.000e-04 | grad norm 1.000 | max load 0.250 | 12,346 tokens/s | MFU 40.0% | ETA 1:01:01"
    )
    assert format_row(3, {"valid_loss": 2.0, "accuracy": 0.5}) == "step 3 | valid loss 2.0000 | accuracy 0.5"


def test_console_without_a_terminal_prints_plain_lines_at_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLogger(MetricsConfig(log_interval=4), tmp_path, {}, 0, total_steps=10) as logger:
        for step in range(1, 11):
            logger.log(step, {**train_row(step), "tokens_per_second": 1e6, "lr": 1e-3, "mfu": 0.4, "memory_gib": 70.0})
            if step == 6:
                logger.log(step, {"valid_loss": 2.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1/10",
        "step 4/10",
        "step 6/10",
        "step 8/10",
        "step 10/10",
    ]
    assert "valid loss 2.5" in lines[2]
    assert lines[-1].endswith("ETA 0:00:00")
    assert "\x1b" not in "".join(lines)


def test_console_on_a_terminal_keeps_a_bar_and_gives_the_cursor_back() -> None:
    screen = StringIO()
    tracker = ConsoleTracker(total_steps=5, console=Console(file=screen, force_terminal=True, width=120))
    for step in range(1, 6):
        tracker.log(step, {"loss": 1.5, "note": "[red]"}, row=step == 3)
    tracker.close()
    text = screen.getvalue()
    assert "step 3/5 | loss 1.5000" in text
    assert "step 5/5 | loss 1.5000" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
