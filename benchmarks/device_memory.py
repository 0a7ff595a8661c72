"""How much memory of a GPU a program may take and has taken: a process fails beyond the limit, and its peaks survive resets."""

import torch
from device_limit import LIMIT_GIB

_GIB = 2.0**30
_highest = {"allocated": 0, "reserved": 0}


def cap() -> None:
    """Let torch's allocator refuse more than the limit on the current device; nothing happens without a GPU."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_GIB * _GIB / total))


def _note() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _highest["allocated"] = max(_highest["allocated"], torch.cuda.max_memory_allocated())
        _highest["reserved"] = max(_highest["reserved"], torch.cuda.max_memory_reserved())


def reset_peaks() -> None:
    """Begin a new peak in torch's statistics; those before are remembered here."""
    _note()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float] | None:
    """Highest GiB of the process so far, `allocated` to tensors and `reserved` by the allocator; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    _note()
    return {name: value / _GIB for name, value in _highest.items()}
