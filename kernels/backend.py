"""Which implementation an op takes: Triton on CUDA (or under Triton's interpreter), the PyTorch reference elsewhere.

Triton itself is imported late, by the ops that decided for it: the CPU path works on a machine without it.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

# Programs of a persistent kernel under the interpreter: more than one, so that the tile loop's stride is exercised.
_INTERPRETED_PROGRAMS = 3
_MIN_CAPABILITY = (8, 0)
# Names that MEGAGRIN_KERNELS switches off one by one: those of the files here.
OPS = ("grouped_gemm", "moe_mlp", "permute", "sparsemixer", "cross_entropy", "router_logits")
# The kernels of the expert MLP launch those of these ops, so they are off where one of these is.
LAUNCHES = {"moe_mlp": ("grouped_gemm", "permute")}
# TMA addresses rows whose pitch is a multiple of this; the same holds for what the kernels' tensor descriptors accept anywhere.
_TMA_BYTES = 16


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1: kernels run in Triton's interpreter, on CPU tensors. To be set before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _switched_off(choice: str) -> frozenset[str]:
    """Ops that a value of MEGAGRIN_KERNELS sends to the reference."""
    if choice == "torch":
        return frozenset(OPS)
    first, *rest = choice.split(",")
    if first != "auto" or not all(part.startswith("-") and part[1:] in OPS for part in rest):
        raise ValueError(
            f"MEGAGRIN_KERNELS: {choice!r} must be auto, torch, or auto followed by any of {' '.join(f',-{op}' for op in OPS)}"
        )
    off = {part[1:] for part in rest}
    return frozenset(off | {op for op, launched in LAUNCHES.items() if off.intersection(launched)})


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, asked for once."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Elements of all temporaries of a thread's share of an elementwise pass: in fp32 they stay in a core's second-level cache.
_PASS_ELEMENTS = 1 << 17
# torch gives no thread a smaller share of an operation.
_GRAIN = 1 << 15


def row_passes(rows: int, width: int, temporaries: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows for a chain of elementwise operations: on the CPU its temporaries never travel to memory and back.

    Nor are they large enough to be given back to the system and faulted in again. All rows at once on other devices.

    Args:
        rows: number of rows.
        width: elements of a row.
        temporaries: tensors of that width that the chain keeps at a time.
        device: of the tensors.
    """
    share = max(_GRAIN, _PASS_ELEMENTS // temporaries) * torch.get_num_threads()
    step = max(1, share // max(1, width) if device.type == "cpu" else rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def use_triton(x: Tensor, op: str) -> bool:
    """Whether an op on x takes its Triton kernel.

    True on CUDA devices of compute capability 8.0 and newer where Triton is installed, and for CPU tensors under
    TRITON_INTERPRET=1. False for float64, everywhere with MEGAGRIN_KERNELS=torch, and for single ops with
    MEGAGRIN_KERNELS=auto,-sparsemixer,-permute (the expert MLP, whose kernels launch those of grouped_gemm and permute, goes with
    either).

    Args:
        x: what the op works on.
        op: one of `OPS`.

    Raises:
        ValueError: MEGAGRIN_KERNELS is none of these.
    """
    off = op in _switched_off(os.environ.get("MEGAGRIN_KERNELS", "auto"))
    if x.dtype == torch.float64 or off or not _triton_installed():
        return False
    return capability(x.device) >= _MIN_CAPABILITY if x.is_cuda else interpreted()


def tma_rows(dtype: torch.dtype, *widths: int) -> bool:
    """Whether contiguous rows of these many elements can be addressed by tensor descriptors: multiples of 16 bytes, not empty."""
    return all(width > 0 and width * dtype.itemsize % _TMA_BYTES == 0 for width in widths)


def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one per multiprocessor."""
    return _multiprocessors(device) if device.type == "cuda" else _INTERPRETED_PROGRAMS
