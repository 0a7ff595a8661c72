"""`--engine=deepspeed` as a user runs it: two ranks by launch/local.sh, continued, converted both ways, wrong input refused."""

import subprocess
from pathlib import Path

import pytest
from launch_helpers import WAIT_S, last_step

from megagrin.checkpoint import store
from megagrin.cli import main
from megagrin.observe.metrics import read_metrics

pytest.importorskip("deepspeed")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_run_resume_convert(recipe: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Native, DeepSpeed, and DeepSpeed's files in between: six steps with the same losses."""

    def ranks(*command: str) -> str:
        torchrun = [
            environment["PYTHON"],
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "megagrin.cli",
        ]
        done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def train(run_dir: str, *options: str) -> Path:
        log = ranks("train", "--config", str(recipe), f"--train.run_dir={tmp_path / run_dir}", *options)
        assert "done" in log, log
        return tmp_path / run_dir

    expected = losses(train("native"))
    ours = ["--engine=deepspeed", "--engine.zero=2", "--checkpoint.format=deepspeed", "--checkpoint.interval=3"]
    whole = train("deepspeed", *ours)
    assert losses(whole) == pytest.approx(expected, rel=1e-5)
    assert [store.format_of(path) for path in store.checkpoints(whole)] == ["deepspeed"] * 2
    # The third step's checkpoint as a native one; the native engine goes on from there, and then DeepSpeed from its files again.
    third = str(store.checkpoints(whole)[0])
    log = ranks("convert-checkpoint", "--from", third, "--to", str(tmp_path / "converted"))
    assert "native checkpoint of step 3" in log
    log = ranks("convert-checkpoint", "--from", str(tmp_path / "converted"), "--to", str(tmp_path / "back"))
    assert "deepspeed checkpoint of step 3" in log
    assert losses(train("converted")) == pytest.approx(expected[3:], rel=1e-5)
    assert losses(train("back", *ours)) == pytest.approx(expected[3:], rel=1e-5)
    assert last_step(tmp_path / "back") == 6


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--engine=deepspeed", "--engine.dtype=fp64"], "engine.dtype: fp64 needs engine.kind native"),
        (["--engine=deepspeed", "--parallel.pp=2"], "parallel.pp: 2 needs engine.kind native"),
        (["--engine", "deepspeed", "--optim.kind=muon"], "optim.kind: muon needs engine.kind native"),
        (["--engine=deepspeed", "--parallel.dp_replicate=2"], "parallel.dp_replicate: 2 needs engine.kind native"),
        (["--engine=deepspeed", "--engine.weight_copies=false"], "engine.weight_copies: false needs engine.kind native"),
        (["--engine=deepspeed", "--engine.compile=true"], "engine.compile: true with engine.zero 3 needs engine.kind native"),
        (["--engine=deepspeed", "--optim.fused_adam=apex"], "optim.fused_adam: apex needs engine.kind native"),
        (
            ["--engine=deepspeed", "--engine.zero=2", "--engine.offload_optimizer=nvme"],
            "engine.offload_optimizer: nvme needs engine.zero 3",
        ),
        (
            ["--engine=deepspeed", "--engine.offload_optimizer=nvme"],
            "engine.nvme_path: none is given, but engine.offload_optimizer is nvme",
        ),
        (
            ["--engine=deepspeed", "--engine.offload_parameters=cpu"],
            "engine.offload_parameters: cpu needs engine.offload_optimizer",
        ),
        (["--engine=deepspeed", "--engine.deepspeed_config=absent.json"], "engine.deepspeed_config: absent.json cannot be read"),
        (["--engine.offload_optimizer=cpu"], "engine.offload_optimizer: cpu needs engine.kind deepspeed"),
        (["--checkpoint.format=deepspeed"], "checkpoint.format: deepspeed needs engine.kind deepspeed"),
        (["--engine=deepsped"], "engine.kind"),
    ],
)
def test_rules(recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], rule: str) -> None:
    """Each names field, value and rule, before anything starts."""
    arguments = ["train", "--config", str(recipe), "--dry_run", "--world_size", "4", "--train.global_batch_size=8"]
    assert rule in refusal(capsys, *arguments, *options)


def test_further_settings_may_not_contradict_the_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch size or a stage in DeepSpeed's own file would be a second truth."""
    settings = tmp_path / "deepspeed.json"
    arguments = ["train", "--config", str(recipe), "--dry_run", "--world_size", "2", "--engine=deepspeed"]
    arguments.append(f"--engine.deepspeed_config={settings}")
    settings.write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    assert "sets train_batch_size, zero_optimization.stage, which the run's own settings decide" in refusal(capsys, *arguments)
    settings.write_text("[]")
    assert "must hold a JSON object, not a list" in refusal(capsys, *arguments)
    settings.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "aio": {"queue_depth": 16}}')
    assert main(arguments) == 0


def test_converter_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to convert, or nowhere to put it."""
    assert "--from: a checkpoint or run folder must be given" in refusal(capsys, "convert-checkpoint")
    missing = str(tmp_path / "none")
    assert f"{missing}: neither a checkpoint" in refusal(capsys, "convert-checkpoint", "--from", missing, "--to", "x")
