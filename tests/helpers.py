"""One pool of gloo processes for all distributed tests: starting torch takes seconds, a case takes milliseconds."""

import contextlib
import gc
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

POOL_SIZE = 8
CASE_TIMEOUT_S = 240.0
# A group has three; those of a large case are some forty.
KEPT_THREADS = 60


def _end_with_parent() -> None:
    """A session that is killed, as by a time limit, closes no pool; its workers would wait for ever, and take the cores."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def gloo_threads() -> int:
    """Threads of this process that serve gloo groups."""
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # ended between listing and reading
            names.append((thread / "comm").read_text())
    return sum("gloo" in name for name in names)


def _worker(rank: int, tasks: Any, results: Any, path: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:] = path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what importing made: each collection below would walk it again
    while True:
        function, args, world_size, store_path = tasks.get()
        try:
            store = dist.FileStore(store_path, world_size)
            timeout = datetime.timedelta(seconds=CASE_TIMEOUT_S / 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            try:
                value = function(*args)
                dist.barrier()
            finally:
                dist.destroy_process_group()
                # DTensor takes an equal mesh of the next group for this one, whose groups are gone, and remembers what it did.
                _clear_sharding_prop_cache()
                _gen_transform_infos.cache_clear()
                clear_redistribute_planner_cache()
            # Engines are circles that hold their groups, whose threads wake every 10 ms: the idle workers of a slow suite had a
            # thousand, and took both cores.
            gc.collect()
            results.put((rank, True, value, gloo_threads()))
        except BaseException:
            results.put((rank, False, traceback.format_exc(), 0))


class GlooPool:
    """Runs functions on 1 to POOL_SIZE ranks; a case that fails or hangs costs the processes, not the session."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._tasks: list[Any] = []
        self._results: Any = None

    def _start(self, world_size: int) -> None:
        """Start the processes that are still missing: importing torch eight times would cost small runs half a minute."""
        context = multiprocessing.get_context("spawn")
        if not self._processes:
            self._results, self._tasks = context.Queue(), []
        for rank in range(len(self._processes), world_size):
            self._tasks.append(context.Queue())
            process = context.Process(target=_worker, args=(rank, self._tasks[rank], self._results, list(sys.path)), daemon=True)
            process.start()
            self._processes.append(process)

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        self._processes = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank of a fresh gloo group.

        Args:
            world_size: 1 to POOL_SIZE.
            function: a module-level function.
            args: picklable.

        Returns:
            What each rank returned, by rank.

        Raises:
            AssertionError: a rank raised or did not answer in time; holds its traceback.
        """
        assert 1 <= world_size <= POOL_SIZE
        self._start(world_size)
        values: dict[int, Any] = {}
        most_kept = 0
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                self._tasks[rank].put((function, args, world_size, str(Path(folder) / "store")))
            try:
                while len(values) < world_size:
                    rank, ok, value, kept = self._results.get(timeout=CASE_TIMEOUT_S)
                    if not ok:
                        self.close()
                        raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                    values[rank] = value
                    most_kept = max(most_kept, kept)
            except queue.Empty:
                silent = sorted(set(range(world_size)) - values.keys())
                self.close()
                raise AssertionError(f"ranks {silent} of {world_size} did not answer within {CASE_TIMEOUT_S} s") from None
        if most_kept > KEPT_THREADS:
            self.close()  # what libraries keep of groups that have ended; the next case starts processes anew
        return [values[rank] for rank in range(world_size)]
