"""Interleaved timing: every contestant once per round, in an order that turns: clocks, heat and neighbours meet all alike.

A power-bound GPU slows down under sustained load; a pause before each measurement lets it recover for everyone.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import device_memory
import torch

# Shorter calls are repeated until one measurement lasts this long: a launch's jitter is some microseconds.
_LEAST_S = 4e-3
_MOST_REPEATS = 20


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean time of one call over `repeats` calls in a row: device time on CUDA (events), wall time on a CPU."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(
    contestants: Mapping[str, Callable[[int], object]], device: torch.device, *, rounds: int, pause_s: float
) -> dict[str, float]:
    """Median seconds of one call of each contestant.

    Args:
        contestants: name to function of a running number, by which it picks one of several sets of inputs.
        device: what they run on.
        rounds: measurements of each.
        pause_s: idle time before each measurement.
    """
    names = list(contestants)
    repeats = {}
    for name in names:
        contestants[name](0)
        synchronize(device)
        once = seconds_of(lambda name=name: contestants[name](1), 1, device)  # type: ignore[misc]
        repeats[name] = min(_MOST_REPEATS, max(1, math.ceil(_LEAST_S / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = dict.fromkeys(names, 0)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            time.sleep(pause_s)

            def call(name: str = name) -> None:
                calls[name] += 1
                contestants[name](calls[name])

            times[name].append(seconds_of(call, repeats[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Device memory that one call needs on top of what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    device_memory.reset_peaks()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
