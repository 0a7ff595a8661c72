"""Compiles Triton kernels for GPUs that are not here, through the very launchers that run on a GPU, and reads what came out.

A driver that only answers "which target" takes the place of the real one, and every launch is turned into a compilation. No
CUDA driver is touched: the wheel of Triton carries ptxas and the disassemblers. What the launchers would do with the result
does not matter, tensors are empty CPU memory.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Bytes of shared memory that one program may have. The compiler does not check it, only a launch would.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Columns of tensor memory on sm_100.
TENSOR_MEMORY_LIMIT = 512
# Registers of a multiprocessor. A kernel without products hides its memory's latency by other programs: at least three must fit.
# Of a product one fills it; what the compiler's 255 a thread do not hold are spills.
REGISTER_FILE, LEAST_PROGRAMS = 65_536, 3
_TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def cache_folder() -> Path:
    """Compiled kernels of earlier runs, by Triton version (one version's cache confuses another)."""
    import triton

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "megagrin" / f"triton-{triton.__version__}"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs.

    Attributes:
        kernel: function name.
        arch: 80, 90 or 100.
        registers: per thread.
        spills: store instructions to local memory.
        shared: bytes per program.
        tensor_memory: columns, sm_100 only.
        dots: matrix products in the source.
        exact: products in full fp32, which no tensor core does.
        tensor_core: instructions of the architecture's tensor cores in the PTX.
        bulk_loads: TMA loads in the PTX.
        counts: registers, and instructions by opcode as in `sass.count`; empty unless it was asked for.
    """

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    dots: int
    exact: int
    tensor_core: int
    bulk_loads: int
    counts: dict[str, int] = field(default_factory=dict, compare=False)

    def problems(self) -> list[str]:
        """Every limit that is broken."""
        found = []
        programs = 1 if self.dots else LEAST_PROGRAMS
        if self.registers * 32 * self.num_warps * programs > REGISTER_FILE:
            found.append(f"{self.registers} registers a thread: no room for {programs} programs of {self.num_warps} warps")
        if self.spills:
            found.append(f"{self.spills} spill stores")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} B of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        if self.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"{self.tensor_memory} columns of tensor memory, sm_{self.arch} has {TENSOR_MEMORY_LIMIT}")
        if self.dots > self.exact and not self.tensor_core:
            found.append(f"{self.dots} products and no {_TENSOR_CORE[self.arch]}")
        return found


class _OfflineDriver:
    """Answers what the launcher asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the launcher caches per device, so architectures do not mix

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Inside, launches compile for sm_<arch> and run nothing; gives the list that collects the compiled kernels."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    previous = driver._active
    driver.set_active(_OfflineDriver(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True, timeout=300).stdout


def _disassembly(cubin: str) -> str:
    return _tool("nvdisasm", "-c", cubin)


def _spill_stores(cubin: str, stack: int) -> int:
    # Spilled registers lie in the stack frame: without a frame there are none, and the slow disassembly is not needed.
    return len(re.findall(r"\bSTL\b", _disassembly(cubin))) if stack else 0


def _counts(path: str, cubin: bytes) -> dict[str, int]:
    """`sass.count` of a binary, kept beside the compiled kernels: the disassembler takes a second."""
    import sass

    key = hashlib.sha256(cubin + Path(sass.__file__).read_bytes()).hexdigest()
    kept = cache_folder() / "counts" / f"{key}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(sass.count(_disassembly(path)), file)
        os.replace(file.name, kept)
    counts: dict[str, int] = json.loads(kept.read_text())
    return counts


def report(kernel: Any, arch: int, disassemble: bool = False) -> Report:
    """Read resources of a compiled kernel, and its instructions where asked to."""
    ptx, ttir = kernel.asm["ptx"], kernel.asm["ttir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        spills = _spill_stores(file.name, numbers["STACK"] + numbers["LOCAL"])
        counts = {"registers": numbers["REG"], **_counts(file.name, kernel.asm["cubin"])} if disassemble else {}
    dots = re.findall(r"tt\.dot .*", ttir)
    return Report(
        kernel=kernel.metadata.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=numbers["REG"],
        spills=spills,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        dots=len(dots),
        # TTIR leaves the default (TF32) unsaid or says tf32; fp32 operands without it are exact.
        exact=sum("xf32" in dot and "tf32" not in dot for dot in dots),
        tensor_core=ptx.count(_TENSOR_CORE[arch]),
        bulk_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        counts=counts,
    )
