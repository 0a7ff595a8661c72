"""Ranks by fork for the tests' pool: children of a mutant's process have its code, which the pool's own processes have not."""

import datetime
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

CASE_TIMEOUT_S = 60.0


def _rank(rank: int, world_size: int, store_path: str, answer: Connection, case: Callable[[], Any], lines: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=CASE_TIMEOUT_S / 2)
        )
        value = case()
        dist.barrier()
        message = pickle.dumps((True, value, lines))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc(), lines))
    answer.send_bytes(message)
    answer.close()


class ForkedRanks:
    """Stands in for `helpers.GlooPool`; what each rank reaches is added to `lines`, file by file."""

    def __init__(self, lines: dict[str, set[int]]) -> None:
        self.lines = lines

    def close(self) -> None:
        """Nothing outlives a case."""

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank of a fresh gloo group; AssertionError when one fails or is silent."""
        children, waiting, values = [], {}, {}
        end = time.monotonic() + CASE_TIMEOUT_S
        with tempfile.TemporaryDirectory() as folder:
            try:
                for rank in range(world_size):
                    ours, theirs = Pipe(duplex=False)
                    child = os.fork()
                    if child == 0:
                        try:
                            _rank(rank, world_size, str(Path(folder) / "store"), theirs, lambda: function(*args), self.lines)
                        finally:
                            os._exit(0)
                    theirs.close()
                    children.append(child)
                    waiting[ours] = rank
                while waiting:
                    ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
                    assert ready, f"ranks {sorted(waiting.values())} of {world_size} did not answer within {CASE_TIMEOUT_S} s"
                    for answer in ready:
                        assert isinstance(answer, Connection)
                        rank = waiting.pop(answer)
                        ok, value, lines = pickle.loads(answer.recv_bytes())
                        assert ok, f"rank {rank} of {world_size} failed:\n{value}"
                        values[rank] = value
                        for path, reached in lines.items():
                            self.lines[path] |= reached
            finally:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
        return [values[rank] for rank in range(world_size)]
