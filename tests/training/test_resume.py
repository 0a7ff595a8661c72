"""What a run says of where it starts, and what it refuses to train on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Run, build_engine, micro_batches
from helpers import GlooPool

from megagrin.cli import main
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance
from megagrin.observe.metrics import read_metrics

VOCAB = 29
TINY = [
    "--model.preset=grin_tiny",
    f"--model.vocab_size={VOCAB}",
    "--model.n_layers=1",
    "--model.d_model=16",
    "--model.n_heads=2",
    "--model.head_dim=8",
    "--model.d_ff=8",
    "--model.n_experts=2",
    "--train.seq_len=8",
    "--train.global_batch_size=2",
    "--train.micro_batch_size=1",
    "--train.eval_samples=2",
    "--optim.lr=0.001",
    "--optim.warmup_steps=1",
    "--engine.dtype=fp32",
    "--runtime.device=cpu",
]


def write_tokens(prefix: Path, length: int, documents: int = 100) -> str:
    """Documents of `length` tokens."""
    with IndexedDatasetWriter(prefix, Provenance(vocab_size=VOCAB)) as writer:
        for document in range(documents):
            writer.add(np.full(length, document % VOCAB))
    return str(prefix)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents long enough to learn from."""
    return write_tokens(tmp_path_factory.mktemp("tokens") / "text", 20)


def train(run_dir: Path, tokens: str, steps: int, *extra: str) -> int:
    """`megagrin train` in this process."""
    return main(["train", *TINY, f"--train.run_dir={run_dir}", f"--data.train={tokens}", f"--train.steps={steps}", *extra])


def rows(run_dir: Path) -> list[tuple[int, str]]:
    """Step and kind of every row."""
    return [(row["step"], "loss" if "loss" in row else "valid") for row in read_metrics(run_dir / "metrics.jsonl")]


def rates(run_dir: Path) -> list[float]:
    """Learning rates by step."""
    return [row["lr"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def test_restart_before_the_first_checkpoint(tmp_path: Path, tokens: str) -> None:
    """One evaluation of step 0, however often a run starts there; TensorBoard forgets the earlier attempts, too."""
    for _ in range(2):
        run = tmp_path / "run"
        assert train(run, tokens, 2, f"--data.valid={tokens}", "--metrics.tensorboard=true") == 0
        for path in (run / "checkpoints").rglob("*"):
            if path.is_file():
                path.unlink()
        assert rows(run) == [(0, "valid"), (1, "loss"), (2, "loss"), (2, "valid")]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("valid_loss")] == [0, 2]


def test_fewer_steps_than_done(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer are refused with both numbers, as many are nothing to do; neither changes a file."""
    run = tmp_path / "run"
    assert train(run, tokens, 3) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(run, tokens, 2) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"train\.steps: 2 is less than the 3 steps that .*step_00000003 has done", error)
    assert train(run, tokens, 3, "--optim.lr=0.5") == 0
    output = capsys.readouterr().out
    assert "nothing to do: train.steps is 3" in output
    assert "checkpoint of step" not in output
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_changed_settings_are_named_and_kept(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A longer cosine with another peak: every change, the jump of the learning rate, and the settings of both starts."""
    run = tmp_path / "run"
    assert train(run, tokens, 3) == 0
    assert rates(run) == pytest.approx([1e-3, 5.5e-4, 1e-4], rel=1e-12)
    assert "changed  " not in capsys.readouterr().out
    assert train(run, tokens, 5, "--optim.lr=0.002") == 0
    output = capsys.readouterr().out.splitlines()
    changed = [line.removeprefix("changed  ") for line in output if line.startswith("changed")]
    assert changed == ["optim.lr: 0.001 -> 0.002", "train.steps: 3 -> 5"]
    after = rates(run)[3]
    warning = [line for line in output if line.startswith("warning")]
    assert warning == [f"warning  the learning rate of step 4 is {after:.3e}; with the earlier settings it was to be 1.000e-04"]
    assert "lr: 0.001\n" in (run / "config.step_00000000.yaml").read_text()
    assert "lr: 0.002\n" in (run / "config.step_00000003.yaml").read_text()
    assert (run / "config.yaml").read_text() == (run / "config.step_00000003.yaml").read_text()


def test_unchanged_settings_say_nothing(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A constant rate does not jump when the run is made longer, whatever else is changed."""
    run = tmp_path / "run"
    assert train(run, tokens, 2, "--optim.schedule=constant") == 0
    capsys.readouterr()
    assert train(run, tokens, 3, "--optim.schedule=constant", "--optim.beta2=0.9") == 0
    output = capsys.readouterr().out
    assert "changed  optim.beta2: 0.95 -> 0.9\n" in output
    assert "warning" not in output
    assert output.count("changed  ") == 2


def test_nothing_to_learn(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents of one token have no label: neither trained on nor evaluated."""
    single = write_tokens(tmp_path / "single", 1, 1000)
    with IndexedDatasetWriter(tmp_path / "late", Provenance(vocab_size=VOCAB)) as writer:
        for length in [1] * 500 + [20]:
            writer.add(np.full(length, 1))
    attention = "--data.document_attention=true"
    run = tmp_path / "run"
    for given, message in (
        ([run, single, 2], f"data.train: {single}: with data.document_attention none of its first 1000 tokens has a label"),
        (
            [run, tokens, 2, f"--data.valid={single}", "--train.eval_samples=1"],
            f"data.valid: {single}: with data.document_attention none of its first",
        ),
    ):
        assert train(*given, attention) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not run.exists()
    # A file with labels can still give a step none.
    assert train(run, str(tmp_path / "late"), 2, attention, "--data.shuffle=false") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 1: no token of the global batch from data.train has a label" in error
    assert "data.document_attention" in error
    assert read_metrics(run / "metrics.jsonl") == []


def without_labels(labelled_rank: int | None) -> list[Any]:
    """A step and an evaluation where at most one rank has labels: what each rank answers, and whether weights moved."""
    run = Run(micro=4)
    engine = build_engine(run)
    answers: list[Any] = []
    batches = micro_batches(run, 0, engine.mesh)
    if engine.mesh.dp_rank != labelled_rank:
        for batch in batches:
            batch.labels_BS.fill_(-100)
    for call in (lambda: engine.evaluate(batches), lambda: engine.train_step(batches, 0, 1e-3).loss):
        try:
            answers.append(call())
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_every_rank_decides_the_same(gloo: GlooPool) -> None:
    """One rank's labels are enough for all; without any, all refuse and none hangs."""
    for answers in gloo.run(2, without_labels, None):
        assert ["has a label" in answer for answer in answers] == [True, True]
    first, second = gloo.run(2, without_labels, 1)
    assert first == second
    assert all(answer > 1 for answer in first)
