"""What is compiled offline: every kernel with every choice of blocks that the fallback, the candidates of tuning and the
tables of the repository can give it.

A module of kernels either offers `compile_cases(dtype[, blocks][, major]) -> {name: Launch}` or has an entry in `_BUILDERS`.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagrin.kernels import tuning
from megagrin.kernels.tuning import OPS, BlockConfig, Op
from megagrin.kernels.tuning_candidates import CANDIDATES

ARCHS = (80, 90, 100)
KERNELS = Path(tuning.__file__).parent
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def triton_files() -> list[Path]:
    """The files that hold Triton kernels."""
    return sorted(KERNELS.glob("*_triton.py"))


@functools.cache
def _jit_functions() -> dict[str, tuple[str, ast.FunctionDef]]:
    """Name to (module, definition) of every @triton.jit function."""
    found = {}
    for path in triton_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                found[node.name] = (path.stem, node)
    return found


def entry_kernels() -> set[str]:
    """Kernels that are launched: @triton.jit functions that no other one calls."""
    functions = _jit_functions()
    called = {
        call.func.id
        for name, (_, function) in functions.items()
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id != name
    }
    return set(functions) - called


@dataclass(frozen=True)
class Case:
    """One compilation, small enough to travel to another process."""

    module: str
    launch: str
    arch: int
    dtype: str = "bf16"
    op: Op | None = None
    blocks: BlockConfig | None = None

    def __str__(self) -> str:
        changed = "" if self.blocks is None else " " + ",".join(map(str, dataclasses.astuple(self.blocks)))
        return f"{self.module}.{self.launch} {self.dtype} sm_{self.arch}{changed}"

    def run(self) -> None:
        """Launch (inside `aot.compiling`)."""
        module = importlib.import_module(f"megagrin.kernels.{self.module}")
        if self.module in _BUILDERS:
            _BUILDERS[self.module]()[self.launch](module, _DTYPES[self.dtype])
            return
        dtype = _DTYPES[self.dtype]
        blocks: dict[Op, BlockConfig] = {op: tuning.fallback(op, dtype, self.arch // 10) for op in OPS}
        if self.op is not None and self.blocks is not None:
            blocks[self.op] = self.blocks
        _launches(module, dtype, blocks, self.arch // 10)[self.launch].run()


def _launches(module: Any, dtype: torch.dtype, blocks: dict[Op, BlockConfig], major: int) -> dict[str, Any]:
    offered = {"blocks": blocks, "major": major}
    taken = {name: offered[name] for name in inspect.signature(module.compile_cases).parameters if name in offered}
    return module.compile_cases(dtype, **taken)


# Which op's blocks a launch of `compile_cases` takes.
def op_of(launch: str) -> Op | None:
    if launch == "wgrad_accumulate":
        return "wgrad_fp32"
    return max((op for op in OPS if launch.startswith(op)), key=len, default=None)


def _alternatives(arch: int) -> dict[Op, set[BlockConfig]]:
    """Blocks beside the fallback that an architecture's table can hold; group_m changes no resource and is left out."""
    found: dict[Op, set[BlockConfig]] = {op: set() for op in OPS}
    for op, listed in CANDIDATES.get(arch // 10, {}).items():
        found[op] |= {dataclasses.replace(blocks, group_m=8) for blocks in listed}
    for path in (KERNELS / "tuned").glob("*.json"):
        table = tuning.read_table(path)
        if table.gpu in _TABLE_ARCH and _TABLE_ARCH[table.gpu] == arch:
            for key, blocks in table.blocks.items():
                found[key.op].add(dataclasses.replace(blocks, group_m=8))
    return {op: listed - {tuning.fallback(op, torch.bfloat16, arch // 10)} for op, listed in found.items()}


_TABLE_ARCH = {
    **dict.fromkeys(("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"), 80),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB"), 90),
    **dict.fromkeys(("NVIDIA B200", "NVIDIA GB200"), 100),
}


def _block_cases(module: Any, name: str) -> list[Case]:
    cases = []
    for arch, dtype in itertools.product(ARCHS, _DTYPES):
        if dtype == "fp16" and arch != 90:
            continue  # compiles as bf16 does
        blocks = {op: tuning.fallback(op, _DTYPES[dtype], arch // 10) for op in OPS}
        for launch in _launches(module, _DTYPES[dtype], blocks, arch // 10):
            cases.append(Case(name, launch, arch, dtype))
            op = op_of(launch)
            if op is not None and dtype == "bf16":
                others = sorted(_alternatives(arch)[op], key=dataclasses.astuple)
                cases += [Case(name, launch, arch, dtype, op, other) for other in others]
    return cases


_Launcher = Callable[[Any, torch.dtype], object]


def _sparsemixer() -> dict[str, _Launcher]:
    def forward(experts: int, top_k: int, draw: bool, paper: bool) -> _Launcher:
        z_TE, token_T = torch.empty(4096, experts), torch.empty(4096, dtype=torch.int64) if draw else None
        return lambda module, _: module.forward(z_TE, token_T, top_k, (0, 1, 2), (0.02, paper), (1.0, 1 << 30, 1.0))

    def backward(experts: int, top_k: int, paper: bool = False) -> _Launcher:
        z_TE, expert_TK = torch.empty(4096, experts), torch.empty(4096, top_k, dtype=torch.int64)
        arguments = (z_TE, expert_TK, torch.empty(4096, top_k), torch.empty(experts), torch.empty(()))
        return lambda module, _: module.backward(*arguments, (0.02, paper), (1.0, 1.0))

    return {
        **{f"forward_{e}_{k}": forward(e, k, True, False) for e, k in ((16, 2), (128, 8), (3, 1))},
        "forward_inference": forward(16, 2, False, False),
        "forward_paper_mask": forward(16, 2, True, True),
        **{f"backward_{e}_{k}": backward(e, k) for e, k in ((16, 2), (128, 8))},
        "backward_paper_mask": backward(16, 2, True),
    }


def _cross_entropy() -> dict[str, _Launcher]:
    def label() -> torch.Tensor:
        return torch.empty(64, dtype=torch.int64)

    def logits(vocab: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(64, vocab, dtype=dtype)

    def statistics(vocab: int) -> _Launcher:
        return lambda module, dtype: module.statistics(logits(vocab, dtype), label(), 0)

    def gradient(vocab: int) -> _Launcher:
        return lambda module, dtype: module.gradient_(logits(vocab, dtype), label(), torch.empty(64), 0, -100)

    vocabularies = (32064, 100)
    return {
        **{f"statistics_{vocab}": statistics(vocab) for vocab in vocabularies},
        **{f"gradient_{vocab}": gradient(vocab) for vocab in vocabularies},
    }


_BUILDERS: dict[str, Callable[[], dict[str, _Launcher]]] = {
    "sparsemixer_triton": _sparsemixer,
    "cross_entropy_triton": _cross_entropy,
}
_BUILDER_DTYPES = {"sparsemixer_triton": ("fp32",), "cross_entropy_triton": ("bf16", "fp32")}


def all_cases() -> list[Case]:
    """Everything, the slow ones first, so that the last worker does not begin one when the others are done."""
    cases: list[Case] = []
    for path in triton_files():
        if path.stem in _BUILDERS:
            product = itertools.product(_BUILDERS[path.stem](), ARCHS, _BUILDER_DTYPES[path.stem])
            cases += [Case(path.stem, launch, arch, dtype) for launch, arch, dtype in product]
            continue
        module = importlib.import_module(f"megagrin.kernels.{path.stem}")
        if hasattr(module, "compile_cases"):
            cases += _block_cases(module, path.stem)
    return sorted(cases, key=lambda case: ("dgrad" not in case.launch and "swiglu" not in case.launch, -case.arch))
