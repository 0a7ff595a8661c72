"""launch/slurm.sbatch on a real SLURM; tests/launch/slurm_cluster.sh makes one of two nodes on one host."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_helpers import ROOT, last_step, wait_until


def idle_nodes() -> int:
    """Nodes of the cluster that SLURM_CONF names; 0 where there is none."""
    if "SLURM_CONF" not in os.environ or shutil.which("sinfo") is None:
        return 0
    listing = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, timeout=30)
    return len(set(listing.stdout.split()))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        idle_nodes() < 2, reason="needs a SLURM of two idle nodes: tests/launch/slurm_cluster.sh COMMAND makes one"
    ),
]


class Job:
    """A submitted launch/slurm.sbatch on two nodes of one rank each."""

    def __init__(self, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
        self.folder = folder
        command = ["sbatch", "--parsable", "--nodes=2", "--time=30", f"--chdir={folder}", f"--output={folder}/job.log"]
        command += [str(ROOT / "launch/slurm.sbatch"), *arguments]
        environment = environment | {"NPROC": "1", "MEGAGRIN_HOME": str(ROOT), "LOG_DIR": str(folder / "logs")}
        submitted = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert submitted.returncode == 0, submitted.stderr
        self.number = submitted.stdout.strip()

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", self.number], capture_output=True, text=True, timeout=30, check=True
        )
        found = re.search(rf"\b{name}=(\S*)", shown.stdout)
        assert found is not None, shown.stdout
        return found[1]

    def log(self) -> str:
        """What the job has printed."""
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def running(self) -> bool:
        """Whether the job may still change."""
        return self.field("JobState") in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

    def wait(self, state: str) -> None:
        """Wait until the job has ended, in this state."""
        wait_until(lambda: not self.running(), lambda: True, self.log)
        assert self.field("JobState") == state, self.log()

    def cancel(self) -> None:
        """Leave nothing behind."""
        subprocess.run(["scancel", self.number], timeout=30)
        wait_until(lambda: not self.running(), lambda: True, self.log, 60)


@pytest.fixture
def submit(tmp_path: Path, environment: dict[str, str], recipe: Path) -> Iterator[object]:
    """Submits jobs and cancels them at the end."""
    jobs: list[Job] = []

    def submit_job(*arguments: str, **variables: str) -> Job:
        jobs.append(Job(tmp_path, environment | variables, ["--config", str(recipe), *arguments]))
        return jobs[-1]

    yield submit_job
    for job in jobs:
        job.cancel()


def test_two_nodes_train_together(submit, tmp_path):
    job = submit()
    job.wait("COMPLETED")
    assert "2 nodes × 1 ranks" in job.log()
    assert "2 ranks: dp 2; experts edp 1 × ep 2" in job.log()
    assert last_step(tmp_path / "run") == 6
    nodes = sorted(folder.name for folder in (tmp_path / "logs" / job.number).iterdir())
    assert len(nodes) == 2
    for node in nodes:
        ranks = list((tmp_path / "logs" / job.number / node).glob("*/attempt_0/0/stdout.log"))
        assert len(ranks) == 1, f"{node}: one rank was to run here"


def test_a_misspelt_key_ends_the_job_with_one_line_before_any_step(submit):
    job = submit("--train.stepz=3")
    job.wait("FAILED")
    assert job.log().count("megagrin: error:") == 1
    assert "did you mean train.steps?" in job.log()
    assert "srun" not in job.log()


def test_the_signal_before_the_time_limit_requeues_and_the_run_continues(submit, tmp_path):
    job = submit("--train.steps=100", "--checkpoint.interval=5", REQUEUE="1")
    wait_until((tmp_path / "run/checkpoints/step_00000005").exists, job.running, job.log)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job.number], check=True, timeout=30)
    wait_until(lambda: job.field("Restarts") == "1", job.running, job.log, 60)
    job.wait("COMPLETED")
    assert "requeued, continues from its newest checkpoint" in job.log()
    assert "resumed  after step" in job.log()
    assert last_step(tmp_path / "run") == 100


def ranks_on(node: str, job: str) -> list[int]:
    """Process ids of a job's ranks on one node of this host."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_JOB_ID={job}".encode()}
        if wanted <= set(variables) and any(variable.startswith(b"TORCHELASTIC_RUN_ID=") for variable in variables):
            found.append(int(process.name))
    return found


def test_a_killed_rank_ends_the_job_on_both_nodes(submit, tmp_path):
    job = submit("--train.steps=100000", "--checkpoint.interval=5")
    wait_until((tmp_path / "run/checkpoints/step_00000005").exists, job.running, job.log)
    ranks = ranks_on("n2", job.number)
    if not ranks:
        pytest.skip("the second node is not on this host: no process to kill")
    for rank in ranks:
        os.kill(rank, 9)
    job.wait("FAILED")
    assert "Signal 9 (SIGKILL)" in job.log()
