"""Locks of operator builds: a dead one is found before a start, and no wait for one is silent or endless."""

import os
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from megagrin.engines.builds import bounded_builds, is_held, stale_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would have the lock of DeepSpeed's CPU operator."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def test_only_a_lock_that_nobody_holds_is_stale(lock: Path) -> None:
    """torch keeps the file open while it builds; a killed process holds nothing."""
    assert stale_locks() == []
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert is_held(lock)
    assert stale_locks() == []
    os.close(baton.fd)  # as the kernel does for a process that was killed
    (sentence,) = stale_locks()
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
