"""Operators that DeepSpeed has torch compile at their first use, and the lock file by which processes wait for a build.

torch waits for the file to vanish, without an end and without a word; a build that was killed never removes it. Whoever builds
keeps the file open, so that on one machine a lock that nobody has open is a dead one.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.file_baton import FileBaton

OFFLOAD_OPERATORS = ("cpu_adam", "async_io")
CPU_OPERATORS = ("deepspeed_shm_comm",)  # of DeepSpeed's collectives, in every run of it on a CPU
_SAY_AFTER_SECONDS = 10.0


def is_held(lock: Path) -> bool:
    """Whether a process of this machine that we may look at has the file open; true where there is no /proc to tell."""
    if not Path("/proc/self/fd").exists():
        return True
    target = os.path.realpath(lock)
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(opened) == target:
                return True
    return False


def stale_locks(operators: Sequence[str]) -> list[str]:
    """Locks of operators that nobody on this machine holds, each as a sentence that says what to do."""
    # Imported late: with a CUDA toolkit but no GPU, as on a login node, importing it logs a warning in front of every answer.
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    locks = [lock for name in operators for pattern in (f"{name}/lock", f"*/{name}/lock") for lock in root.glob(pattern)]
    # Looked at twice: a build that ends closes the file a moment before it removes it.
    suspects = [lock for lock in locks if not is_held(lock)]
    if suspects:
        time.sleep(0.5)
    return [
        f"{lock} is the lock of a build that no process of this machine is at: a build that was killed leaves it; "
        "remove the file, or wait if another machine is building there"
        for lock in suspects
        if lock.exists() and not is_held(lock)
    ]


@contextlib.contextmanager
def bounded_builds(seconds: float) -> Iterator[None]:
    """Inside the block a wait for another process's build says what it waits for, and ends.

    Args:
        seconds: longest wait.

    Raises:
        TimeoutError: (inside the block) names the lock.
    """

    def wait(self: FileBaton) -> None:
        begin, said = time.monotonic(), False
        while os.path.exists(self.lock_file_path):
            waited = time.monotonic() - begin
            if waited > seconds:
                raise TimeoutError(
                    f"{self.lock_file_path}: waited {waited:.0f} s for the build that holds this lock; "
                    "if none is running, it was killed: remove the file"
                )
            if waited > _SAY_AFTER_SECONDS and not said:
                said = True
                print(f"waiting  for another process to compile an operator: {self.lock_file_path}", flush=True)
            time.sleep(self.wait_seconds)

    original = FileBaton.wait
    FileBaton.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileBaton.wait = original  # type: ignore[method-assign]
