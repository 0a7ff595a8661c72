"""`megagrin train` as a user runs it: from token files to metrics and checkpoints, killed, continued, refused."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagrin.checkpoint import store
from megagrin.cli import main
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance
from megagrin.observe.metrics import read_metrics
from megagrin.training import preflight

VOCAB = 97
TINY = [
    "--model.preset=grin_tiny",
    f"--model.vocab_size={VOCAB}",
    "--model.n_layers=2",
    "--model.d_model=32",
    "--model.n_heads=4",
    "--model.head_dim=8",
    "--model.d_ff=16",
    "--model.n_experts=4",
    "--router.mask_eps=0.3",
    "--train.seq_len=32",
    "--train.global_batch_size=4",
    "--train.micro_batch_size=1",
    "--train.eval_interval=4",
    "--train.eval_samples=4",
    "--optim.lr=0.003",
    "--optim.warmup_steps=1",
    "--engine.dtype=fp32",
    "--metrics.log_interval=100",
    "--runtime.device=cpu",
]
MEASURED = {"tokens_per_second", "mfu", "memory_gib"}
WAIT_S = 120


def write_tokens(prefix: Path, seed: int = 0, documents: int = 40) -> str:
    """A token file of random documents with some structure; returns its prefix."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, Provenance(vocab_size=VOCAB)) as writer:
        for length in generator.integers(5, 120, documents):
            writer.add(np.cumsum(generator.integers(0, 3, length)) % VOCAB)
    return str(prefix)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token file for all tests of this file."""
    return write_tokens(tmp_path_factory.mktemp("tokens") / "text")


def train(run_dir: Path, tokens: str, *extra: str) -> int:
    """`megagrin train` in this process."""
    return main(["train", *TINY, f"--train.run_dir={run_dir}", f"--data.train={tokens}", f"--data.valid={tokens}", *extra])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured by the clock."""
    kept = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in kept]


def test_interrupted_run_equals_uninterrupted_one(tmp_path: Path, tokens: str) -> None:
    """Every recorded number, bit for bit; the last checkpoint is the same run's."""
    assert train(tmp_path / "whole", tokens, "--train.steps=9", "--checkpoint.interval=3") == 0
    assert train(tmp_path / "parts", tokens, "--train.steps=9", "--checkpoint.interval=3", "--optim.schedule=cosine") == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for path in store.checkpoints(tmp_path / "parts")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert [path.name for path in store.checkpoints(tmp_path / "parts")] == ["step_00000003"]
    assert train(tmp_path / "parts", tokens, "--train.steps=9", "--checkpoint.interval=3") == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    steps = [row["step"] for row in rows(tmp_path / "parts") if "loss" in row]
    assert steps == list(range(1, 10))


def test_optimizer_state_matters_to_this_test(tmp_path: Path, tokens: str) -> None:
    """Weights alone do not continue a run exactly: the equality above is not for free."""
    assert train(tmp_path / "whole", tokens, "--train.steps=6", "--checkpoint.interval=3", "--checkpoint.keep=0") == 0
    middle = tmp_path / "whole" / "checkpoints" / "step_00000003"
    assert train(tmp_path / "other", tokens, "--train.steps=3", f"--train.init_from={middle}") == 0
    first = [row["loss"] for row in rows(tmp_path / "whole") if "loss" in row]
    second = [row["loss"] for row in rows(tmp_path / "other") if "loss" in row]
    assert second[0] < first[0]
    assert second != first[3:]


def _processes(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if marker in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
    return found


def _torchrun(run_dir: Path, tokens: str, *extra: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megagrin.cli"]
    arguments = ["train", *TINY, f"--train.run_dir={run_dir}", f"--data.train={tokens}", "--parallel.ep=2", *extra]
    return subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [0]
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            steps.append(json.loads(line)["step"])
    return max(steps)


def test_killed_run_continues_bit_for_bit(tmp_path: Path, tokens: str) -> None:
    """Two ranks with expert parallelism, SIGKILL to all of them at a random step, and the same command again."""
    settings = ["--train.steps=40", "--checkpoint.interval=6"]
    whole = _torchrun(tmp_path / "whole", tokens, *settings)
    output, _ = whole.communicate(timeout=WAIT_S)
    assert whole.returncode == 0, output

    killed = tmp_path / "killed"
    at_step = random.randint(7, 35)
    process = _torchrun(killed, tokens, *settings)
    deadline = time.monotonic() + WAIT_S
    while _last_step(killed) < at_step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    for pid in _processes(str(killed)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=WAIT_S)
    assert process.returncode != 0
    reached = _last_step(killed)
    assert at_step <= reached < 40, f"the run was at step {reached} when it was killed"

    again = _torchrun(killed, tokens, *settings)
    output, _ = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, output
    assert "resumed" in output
    assert rows(killed) == rows(tmp_path / "whole"), f"killed at step {reached}"


def test_refuses_to_resume_another_run(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Changed model, seed, batch or data are named; nothing is overwritten."""
    run = tmp_path / "run"
    assert train(run, tokens, "--train.steps=2") == 0
    before = (run / "metrics.jsonl").read_bytes()
    for change, message in [
        ("--model.d_ff=24", "model.d_ff: 16 -> 24"),
        ("--router.kind=gshard", "router.kind: sparsemixer_v2 -> gshard"),
        ("--train.seed=1", "train.seed: 0 -> 1"),
        ("--train.global_batch_size=8", "train.global_batch_size: 4 -> 8"),
        (f"--data.train={write_tokens(tmp_path / 'other', seed=5)}", "has other contents"),
    ]:
        assert train(run, tokens, "--train.steps=4", change) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(run, tokens, "--train.steps=4", "--optim.weight_decay=0.2") == 0


def test_init_from_another_model(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of another shape are refused by field."""
    assert train(tmp_path / "run", tokens, "--train.steps=1") == 0
    assert train(tmp_path / "new", tokens, f"--train.init_from={tmp_path / 'run'}", "--model.n_layers=3") == 2
    assert "holds another model: n_layers: 2 -> 3" in capsys.readouterr().err
    assert train(tmp_path / "new", tokens, f"--train.init_from={tmp_path / 'nowhere'}") == 2
    assert "neither a checkpoint" in capsys.readouterr().err


def test_data_errors(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing and truncated token files, and a vocabulary that does not fit the model, in one line each."""
    truncated = write_tokens(tmp_path / "cut")
    with open(f"{truncated}.bin", "r+b") as file:
        file.truncate(100)
    for dry in ([], ["--dry_run"]):
        for data, extra, message in [
            (str(tmp_path / "none"), [], "none.idx: no such file"),
            (truncated, [], "cut.bin: 100 bytes"),
            (tokens, ["--model.vocab_size=50"], "50"),
        ]:
            assert main(["train", *TINY, f"--train.run_dir={tmp_path / 'run'}", f"--data.train={data}", *extra, *dry]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_dry_run_describes(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The layout for any number of ranks, without starting one."""
    arguments = ["train", *TINY, f"--data.train={tokens}", "--train.global_batch_size=64", "--parallel.ep=2"]
    assert main([*arguments, "--dry_run", "--world_size=8"]) == 0
    assert "8 ranks: dp 8; experts edp 4 × ep 2" in capsys.readouterr().out
    assert main([*arguments, "--dry_run", "--world_size=5"]) == 2
    assert "parallel.ep: 2 must divide the number of ranks (5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "multiplies", "warned"),
    [("bf16", False, True), ("bf16", True, False), ("fp32", False, False), ("fp32", True, False)],
)
def test_slow_products_are_said_beforehand(
    tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    dtype: str, multiplies: bool, warned: bool,
) -> None:  # fmt: skip
    """bf16 is the default, and on a CPU without instructions for it a step takes ten times as long; a dry run says so, too."""
    monkeypatch.setattr(preflight, "multiplies_bf16", lambda: multiplies)
    run = [
        "train",
        *TINY,
        f"--data.train={tokens}",
        f"--train.run_dir={tmp_path}/run",
        f"--engine.dtype={dtype}",
        "--train.steps=1",
    ]
    for more in (["--dry_run"], []):
        assert main([*run, *more, "--runtime.device=cpu"]) == 0
        assert ("warning  engine.dtype: bf16 is many times slower than fp32" in capsys.readouterr().out) == warned


def test_not_finite_stops_before_the_update(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that overflows ends with its step and writes no checkpoint of what it became."""
    assert (
        train(tmp_path / "run", tokens, "--train.steps=30", "--optim.lr=1e30", "--optim.clip_norm=0", "--checkpoint.interval=1")
        == 2
    )
    assert "gradient norm is" in capsys.readouterr().err
    saved = store.checkpoints(tmp_path / "run")
    assert saved, "the first steps are finite: without a checkpoint there is nothing to look at"
    assert store.read_info(saved[-1]).step < 30
    for path in saved:
        model, _ = store.load_model(path)
        assert all(parameter.isfinite().all() for parameter in model.parameters()), path


def test_retention_and_leftovers(tmp_path: Path, tokens: str) -> None:
    """The newest `keep` checkpoints stay; a half-written one is not a checkpoint and is cleaned up."""
    run = tmp_path / "run"
    half = run / "checkpoints" / ".step_00000001.partial"
    half.mkdir(parents=True)
    marker_less = run / "checkpoints" / "step_00000099"
    marker_less.mkdir()
    assert train(run, tokens, "--train.steps=4", "--checkpoint.interval=1", "--checkpoint.keep=2") == 0
    assert [path.name for path in store.checkpoints(run)] == ["step_00000003", "step_00000004"]
    assert not half.exists()
