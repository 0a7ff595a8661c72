"""The process: device, process group, and a clean end."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

MAX_TIMEOUT_MINUTES = 7 * 24 * 60  # beyond some years torch's clocks overflow; a week is as good as for ever


@dataclass(frozen=True)
class RuntimeConfig:
    """Device and communication.

    Attributes:
        device: auto takes CUDA where there is a GPU for this rank.
        timeout_minutes: longest wait in one collective before the run ends with an error.
        deterministic: use only deterministic algorithms; an operation that has none is an error.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = 30.0
    deterministic: bool = False

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = []
        if not 0 < self.timeout_minutes <= MAX_TIMEOUT_MINUTES:
            broken.append(f"runtime.timeout_minutes: {self.timeout_minutes} must lie in (0, {MAX_TIMEOUT_MINUTES}] (a week)")
        if self.device == "cuda" and not torch.cuda.is_available():
            broken.append("runtime.device: cuda, but torch sees no CUDA device; use auto or cpu")
        return broken


@dataclass(frozen=True)
class Runtime:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics and talks to the user."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Ranks of the job as torchrun announces them; 1 without torchrun.

    Raises:
        ValueError: WORLD_SIZE is not a positive integer.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE: {text!r} must be a positive integer")
    return int(text)


def device_type(choice: str) -> str:
    """The kind of device that runtime.device comes to on this machine, cpu or cuda."""
    return "cpu" if choice == "cpu" or not torch.cuda.is_available() else "cuda"


def _pick_device(choice: str, local_rank: int) -> torch.device:
    if device_type(choice) == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start as many ranks per node as there are GPUs, or set runtime.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


_EVERY_RANK = "every rank"


def every_rank(error: Exception) -> Exception:
    """Mark an error that all ranks raise together: one of them says it for all."""
    error.add_note(_EVERY_RANK)
    return error


joined = False  # whether this process has been in a process group: megagrin.cli.entry asks


@contextlib.contextmanager
def session(config: RuntimeConfig) -> Iterator[Runtime]:
    """Join the job's process group for the length of a with block; one process without torchrun is a group of one.

    A block that ends well ends with a barrier before the group is destroyed, so that no rank takes away the store or the
    connections of one that is still at work. After an error there is no barrier, as the other ranks may be gone.
    """
    world_size, local_rank = world_size_from_environment(), int(os.environ.get("LOCAL_RANK", "0"))
    device = _pick_device(config.device, local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    global joined
    joined = True
    try:
        yield Runtime(dist.get_rank(), world_size, local_rank, device)
        dist.barrier()
    except Exception as error:
        # From here on an error may belong to this rank alone: the command line then says which, whatever the rank.
        if _EVERY_RANK not in getattr(error, "__notes__", []):
            error.add_note(f"rank {dist.get_rank()}")
        raise
    finally:
        dist.destroy_process_group()
