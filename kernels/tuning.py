"""Block sizes of the grouped matrix products.

The fallback holds for every shape: chosen by compiling for each architecture and keeping what has no register spills and fits
the shared memory (docs/kernels.md has the figures). Measured choices per GPU come from tables, kernels/tuned/*.json: one per GPU
name and Triton version, written by `megagrin kernels tune`. A table is checked as a whole when it is read, at the first launch
of a process: what it then gives out was valid, and what it does not hold comes from the fallback.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megagrin.kernels import backend

log = logging.getLogger(__name__)

# wgrad writes the operands' dtype, wgrad_fp32 writes or adds to fp32.
Op = Literal["m_grouped", "m_grouped_dgrad", "up_swiglu", "down_dgrad", "wgrad", "wgrad_fp32"]
OPS: tuple[Op, ...] = get_args(Op)


@dataclass(frozen=True)
class BlockConfig:
    """How a grouped product is cut.

    Attributes:
        block_m: rows of an output tile (for wgrad: rows of the weight matrix, N).
        block_n: columns of an output tile (for wgrad: columns of the weight matrix, K).
        block_k: length of a step of the contraction (for wgrad: routed rows).
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
        group_m: row tiles that share weight columns in L2 before the next column tile is begun.
        slices: column slices of the epilogue, 1, 2 or 4: fewer registers and less shared memory for more of them.
        gather: up_swiglu on tokens only: gather rows in the product's own loads instead of copying them first.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    slices: int = 2
    gather: bool = False


# Two-byte dtypes. Keys: capability major.
_SIXTEEN_BIT: dict[int, dict[str, BlockConfig]] = {
    8: {
        "m_grouped": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "m_grouped_dgrad": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "up_swiglu": BlockConfig(128, 128, 32, 8, 3, slices=4),
        "down_dgrad": BlockConfig(128, 64, 64, 8, 3, slices=4),
        "wgrad": BlockConfig(128, 64, 64, 8, 3, slices=4),
        "wgrad_fp32": BlockConfig(128, 64, 64, 8, 3, slices=4),
    },
    9: {
        "m_grouped": BlockConfig(128, 256, 64, 8, 4),
        "m_grouped_dgrad": BlockConfig(128, 256, 64, 8, 4),
        "up_swiglu": BlockConfig(128, 256, 64, 8, 4, slices=4),
        "down_dgrad": BlockConfig(128, 256, 64, 8, 3, slices=4),
        "wgrad": BlockConfig(128, 256, 64, 8, 4),
        "wgrad_fp32": BlockConfig(128, 256, 64, 8, 3),
    },
    10: {
        "m_grouped": BlockConfig(128, 256, 64, 8, 4),
        "m_grouped_dgrad": BlockConfig(128, 256, 64, 8, 4),
        "up_swiglu": BlockConfig(128, 256, 64, 8, 4, slices=4),
        "down_dgrad": BlockConfig(128, 128, 64, 8, 4, slices=4),
        "wgrad": BlockConfig(128, 256, 64, 8, 4),
        "wgrad_fp32": BlockConfig(128, 256, 64, 8, 3),
    },
}
# fp32 operands are multiplied exactly, without tensor cores: for checking numbers, not for speed.
_FP32 = BlockConfig(64, 64, 16, 8, 2, slices=4)
# Small enough that a test of 65 rows and 72 features has several tiles with ragged ends.
_INTERPRETED = BlockConfig(32, 64, 32, 4, 2, group_m=2, slices=4)


def fallback(op: Op, dtype: torch.dtype, major: int) -> BlockConfig:
    """The statically checked blocks for a dtype and the major number of a compute capability (12 and beyond: as 10)."""
    if dtype.itemsize == 4:
        return _FP32
    return _SIXTEEN_BIT[min(major, 10)][op]


FORMAT = 1
# Rows per expert are looked up by the largest of these that they reach; fewer count as the first.
BUCKETS = (128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CHOICES = {
    "block_m": (32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "group_m": (1, 2, 4, 8, 16, 32),
    "slices": (1, 2, 4),
    "gather": (False, True),
}


def bucket(rows_per_expert: int) -> int:
    """The bucket of a number of rows per expert."""
    return max((edge for edge in BUCKETS if edge <= rows_per_expert), default=BUCKETS[0])


@dataclass(frozen=True)
class Key:
    """What a measured choice is for; `rows` is a bucket."""

    op: Op
    dtype: str
    n: int
    k: int
    rows: int


@dataclass
class Table:
    """Measured blocks of one GPU under one Triton version.

    Attributes:
        gpu: the device's name as the driver gives it.
        triton: major.minor of Triton.
        blocks: the choices.
        tflops: their measured rates, for the reader.
    """

    gpu: str
    triton: str
    blocks: dict[Key, BlockConfig] = dataclasses.field(default_factory=dict)
    tflops: dict[Key, float] = dataclasses.field(default_factory=dict)

    def find(self, key: Key) -> BlockConfig | None:
        """The choice for a key, else for the same product in the nearest bucket, else None."""
        buckets = [other.rows for other in self.blocks if dataclasses.replace(other, rows=key.rows) == key]
        if not buckets:
            return None
        nearest = min(buckets, key=lambda rows: (max(rows, key.rows) / min(rows, key.rows), rows))
        return self.blocks[dataclasses.replace(key, rows=nearest)]


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{where}.{name} is missing")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}.{name}: {value!r} must be of type {kind.__name__}")
    return value


def _block_config(record: Any, where: str) -> BlockConfig:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {record!r} must be an object")
    for name in record:
        if name not in _CHOICES:
            raise ValueError(f"{where}.{name}: no such field; fields are {', '.join(_CHOICES)}")
    for name, choices in _CHOICES.items():
        value = _field(record, name, type(choices[0]), where)
        if value not in choices:
            raise ValueError(f"{where}.{name}: {value!r} is none of {', '.join(map(str, choices))}")
    if record["block_n"] // record["slices"] < 16:
        raise ValueError(f"{where}.slices: {record['slices']} slices of {record['block_n']} columns have fewer than 16 columns")
    return BlockConfig(**record)


def _key(record: Any, where: str) -> Key:
    op, dtype = _field(record, "op", str, where), _field(record, "dtype", str, where)
    if op not in OPS:
        raise ValueError(f"{where}.op: {op!r} is none of {', '.join(OPS)}")
    if dtype not in _DTYPES:
        raise ValueError(f"{where}.dtype: {dtype!r} is none of {', '.join(_DTYPES)}")
    n, k, rows = (_field(record, name, int, where) for name in ("n", "k", "rows_per_expert"))
    if min(n, k) < 1:
        raise ValueError(f"{where}: n {n} and k {k} must be at least 1")
    if rows not in BUCKETS:
        raise ValueError(f"{where}.rows_per_expert: {rows} is none of the buckets {', '.join(map(str, BUCKETS))}")
    return Key(op, dtype, n, k, rows)


def read_table(path: Path) -> Table:
    """Read and check a table.

    Raises:
        ValueError: not JSON, a missing, unknown or impossible value; names file and field.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if _field(record, "format", int, "table") != FORMAT:
            raise ValueError(f"table.format: {record['format']} is not {FORMAT}, the one this version reads")
        table = Table(_field(record, "gpu", str, "table"), _field(record, "triton", str, "table"))
        for index, entry in enumerate(_field(record, "entries", list, "table")):
            where = f"entries[{index}]"
            key = _key(entry, where)
            if key in table.blocks:
                raise ValueError(f"{where}: the same product as an earlier entry")
            table.blocks[key] = _block_config(_field(entry, "blocks", dict, where), f"{where}.blocks")
            table.tflops[key] = _field(entry, "tflops", float, where)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: {error}; remove the file (the fallback is used then) or run `megagrin kernels tune`"
        ) from error
    return table


def table_path(folder: Path, gpu: str, triton: str) -> Path:
    """Where a table lies: nvidia_h200_triton3.6.json."""
    slug = re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    return folder / f"{slug}_triton{triton}.json"


def write_table(table: Table, path: Path) -> None:
    """Write a table in one move: a reader sees the old one or the new one."""
    entries = [
        {
            "op": key.op,
            "dtype": key.dtype,
            "n": key.n,
            "k": key.k,
            "rows_per_expert": key.rows,
            "blocks": dataclasses.asdict(blocks),
            "tflops": round(float(table.tflops.get(key, 0.0)), 1),
        }
        for key, blocks in table.blocks.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "gpu": table.gpu, "triton": table.triton, "entries": entries}, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared folder's table from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def tables_folder() -> Path:
    """Where tables are looked for: MEGAGRIN_TUNED, or the folder `tuned` beside this file."""
    return Path(os.environ.get("MEGAGRIN_TUNED") or Path(__file__).parent / "tuned")


@functools.cache
def triton_version() -> str:
    """major.minor of the installed Triton."""
    import triton  # not its metadata: some builds of torch bring it under another distribution name

    return ".".join(triton.__version__.split(".")[:2])


def find_table(gpu: str, triton: str) -> Table | None:
    """The table of a GPU; None, and one line in the log of the first rank, where there is none.

    Raises:
        ValueError: the table is damaged, or for another GPU or Triton than its name says.
    """
    path = table_path(tables_folder(), gpu, triton)
    if not path.exists():
        if os.environ.get("RANK", "0") == "0":
            log.warning("kernels: no table %s: %s under Triton %s takes the fallback blocks", path.name, gpu, triton)
        return None
    table = read_table(path)
    for name, found, expected in (("gpu", table.gpu, gpu), ("triton", table.triton, triton)):
        if found != expected:
            raise ValueError(f"{path}: table.{name}: {found!r} must be {expected!r}")
    return table


@functools.cache
def _table(device: torch.device) -> Table | None:
    gpu = torch.cuda.get_device_name(device)
    if _in_use is not None and (_in_use.gpu, _in_use.triton) == (gpu, triton_version()):
        return _in_use
    return find_table(gpu, triton_version())


@functools.cache
def _lookup(op: Op, dtype: torch.dtype, n: int, k: int, rows: int, device: torch.device) -> BlockConfig:
    table = _table(device)
    found = None if table is None else table.find(Key(op, str(dtype).removeprefix("torch."), n, k, rows))
    return found or fallback(op, dtype, backend.capability(device)[0])


_forced: dict[str, BlockConfig] = {}


@contextlib.contextmanager
def forced(op: Op, blocks: BlockConfig) -> Iterator[None]:
    """Give out these blocks for an op, whatever the tables say: for measuring and for compile checks."""
    previous = _forced.get(op)
    _forced[op] = blocks
    try:
        yield
    finally:
        if previous is None:
            del _forced[op]
        else:
            _forced[op] = previous


_in_use: Table | None = None


def use(table: Table | None) -> None:
    """Take this table from now on where its GPU and Triton are met, not the file; None goes back to the file."""
    global _in_use
    _in_use = table
    _table.cache_clear()
    _lookup.cache_clear()


def config(op: Op, dtype: torch.dtype, n: int, k: int, rows_per_expert: int, device: torch.device) -> BlockConfig:
    """Blocks for one launch: forced ones, else the table's, else the fallback.

    Args:
        op: which product.
        dtype: of the operands.
        n: output features of the product (wgrad: rows N of the weight).
        k: contracted features (wgrad: columns K of the weight).
        rows_per_expert: routed rows over experts, rounded down.
        device: where it runs; the CPU stands for the interpreter.

    Raises:
        ValueError: the table of this GPU is damaged; at the first launch of a process, not later.
    """
    if op in _forced:
        return _forced[op]
    if device.type != "cuda":
        return _INTERPRETED
    return _lookup(op, dtype, n, k, bucket(rows_per_expert), device)


def shared_bytes(op: Op, blocks: BlockConfig, itemsize: int) -> int:
    """Shared memory of a program in bytes: what the pipeline's stages and the epilogue's staging buffers take.

    Agrees with what Triton 3.6 to 3.9 report for sm_90 within 1 KiB where both are known (tests/kernels/test_tuning.py), and
    tells what cannot fit before anything is compiled or launched.
    """
    stages = blocks.num_stages * (blocks.block_m + blocks.block_n) * blocks.block_k * itemsize
    columns = blocks.block_n // blocks.slices
    per_column = {"up_swiglu": itemsize * 3 / 2, "wgrad_fp32": 4.0}.get(op, float(itemsize))
    return stages + int(blocks.block_m * columns * per_column)
