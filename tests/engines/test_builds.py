"""Locks of operator builds: a dead one is found before a start, and no wait for one is silent or endless."""

import os
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from megagrin.engines import builds
from megagrin.engines.builds import CPU_OPERATORS, OFFLOAD_OPERATORS, bounded_builds, is_held, stale_locks
from megagrin.training import preflight
from megagrin.training.run_config import parse_config


@pytest.fixture(params=[*OFFLOAD_OPERATORS, *CPU_OPERATORS])
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Where torch would have the lock of an operator of DeepSpeed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / request.param).mkdir()
    return tmp_path / request.param / "lock"


def test_the_operators_are_deepspeeds() -> None:
    """By the names under which its builders have torch build them."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import cpu

    names = {builder.NAME for builder in (cpu.CPUAdamBuilder, cpu.ShareMemCommBuilder)}
    assert names <= {*OFFLOAD_OPERATORS, *CPU_OPERATORS}


@pytest.mark.parametrize(("engine", "lines"), [("deepspeed", 1), ("native", 0)])
def test_a_start_names_the_lock_of_deepspeeds_collectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, lines: int
) -> None:
    """They are compiled in every run on a CPU, offload or not."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    run, _ = parse_config([f"--engine={engine}", f"--train.run_dir={tmp_path}/run", "--runtime.device=cpu"])
    found = preflight.violations(run)
    assert len(found) == lines
    expected = f"engine.kind: deepspeed compiles an operator, and {tmp_path}/deepspeed_shm_comm/lock is the lock of a build "
    assert all(line.startswith(expected) for line in found)


def test_only_a_lock_that_nobody_holds_is_stale(lock: Path) -> None:
    """torch keeps the file open while it builds; a killed process holds nothing."""
    assert stale_locks([lock.parent.name]) == []
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert is_held(lock)
    assert stale_locks([lock.parent.name]) == []
    os.close(baton.fd)  # as the kernel does for a process that was killed
    (sentence,) = stale_locks([lock.parent.name])
    assert sentence.startswith(f"{lock} is the lock of a build that no process of this machine is at")
    assert "remove the file" in sentence


def test_waiting_for_a_build_ends(lock: Path) -> None:
    """torch's own wait has no end."""
    lock.touch()
    with bounded_builds(0.2), pytest.raises(TimeoutError, match=r"lock: waited .* remove the file"):
        FileBaton(str(lock), wait_seconds=0.01).wait()
    lock.unlink()
    with bounded_builds(0.2):
        FileBaton(str(lock)).wait()
    assert FileBaton.wait.__module__ == "torch.utils.file_baton"


def test_a_wait_says_once_what_it_waits_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builds, "_SAY_AFTER_SECONDS", 0.05)
    lock.touch()
    with bounded_builds(0.3), pytest.raises(TimeoutError):
        FileBaton(str(lock), wait_seconds=0.01).wait()
    assert capsys.readouterr().out == f"waiting  for another process to compile an operator: {lock}\n"
