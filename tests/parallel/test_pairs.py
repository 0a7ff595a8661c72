"""Pairs of README's table that no other file of this folder compares: ZeRO-1 and 2, hybrid sharding, Muon, dense models, compile.

Three steps against one process each; several micro-batches and documents wherever the layout allows.
"""

from dataclasses import replace
from typing import Any

import pytest
from common import MODEL, OPTIM, TOLERANCE, Run, assert_same_run, compare, reference
from helpers import GlooPool
from parallel.test_compile import compiled_run

from megagrin.distributed.mesh import ParallelConfig

FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective", "recompute_parts": ("attention_core", "expert_mlp", "norms")}
DENSE_PARTS = {"recompute": "selective", "recompute_parts": ("attention_core", "norms")}
COMPILE = {"compile": True}
DENSE = replace(MODEL, n_experts=0, top_k=1, n_layers=3)
DEEP = replace(MODEL, n_layers=4)
MUON = replace(OPTIM, kind="muon")
HYBRID = ParallelConfig(dp_replicate=2)
TP2, CP2, PP2, ETP2 = ParallelConfig(tp=2), ParallelConfig(cp=2), ParallelConfig(pp=2), ParallelConfig(etp=2)
ULYSSES = replace(CP2, cp_method="ulysses")
INTERLEAVED = replace(PP2, pp_schedule="interleaved_1f1b", pp_stages_per_rank=2)
ZERO_BUBBLE = replace(PP2, pp_schedule="zero_bubble", pp_stages_per_rank=2)


# Of four ranks, and of compiled ones, which take a minute each where processors are slow, CI has some; `make test-all` all.
IN_CI = ("zero1-tp2", "zero2-etp2", "hybrid-selective", "compiled-pp2", "compiled-muon")


def case(name: str, world_size: int, parallel: ParallelConfig, micro: int, **fields: Any) -> Any:
    """A run in fp64 with documents."""
    marks = () if name in IN_CI or not (world_size > 2 or name.startswith("compiled")) else (pytest.mark.long,)
    return pytest.param(world_size, Run(parallel, micro, documents=True, **fields), id=name, marks=marks)


def zero_cases(zero: int) -> list[Any]:
    """A ZeRO stage with what shards or recomputes beside it."""
    stage = {"zero": zero}
    return [
        case(f"zero{zero}-tp2", 4, TP2, 2, engine=stage),
        case(f"zero{zero}-cp2", 4, CP2, 2, engine=stage),
        case(f"zero{zero}-etp2", 4, ETP2, 1, engine=stage),
        case(f"zero{zero}-full", 2, ParallelConfig(), 2, engine=stage | FULL),
        case(f"zero{zero}-selective", 2, ParallelConfig(), 2, engine=stage | SELECTIVE),
    ]


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        *zero_cases(1),
        *zero_cases(2),
        case("hybrid-full", 4, HYBRID, 1, engine=FULL),
        case("hybrid-selective", 4, HYBRID, 1, engine=SELECTIVE),
        case("muon-cp2", 2, CP2, 4, optim=MUON),
        case("muon-ulysses", 2, ULYSSES, 4, optim=MUON),
        case("muon-full", 2, ParallelConfig(), 2, optim=MUON, engine=FULL),
        case("muon-selective", 2, ParallelConfig(), 2, optim=MUON, engine=SELECTIVE),
        case("dense-pp2", 2, PP2, 2, model=DENSE),
        case("dense-zero-bubble", 2, ZERO_BUBBLE, 2, model=DENSE),
        case("dense-cp2", 2, CP2, 4, model=DENSE),
        case("dense-ulysses", 2, ULYSSES, 4, model=DENSE),
        case("dense-hybrid", 4, HYBRID, 1, model=DENSE),
        case("dense-full", 2, ParallelConfig(), 2, model=DENSE, engine=FULL),
        case("dense-selective", 2, ParallelConfig(), 2, model=DENSE, engine=DENSE_PARTS),
        case("pp2-selective", 2, PP2, 2, model=DEEP, engine=SELECTIVE),
        case("interleaved-full", 2, INTERLEAVED, 2, model=DEEP, engine=FULL),
        case("interleaved-selective", 2, INTERLEAVED, 2, model=DEEP, engine=SELECTIVE),
        case("zero-bubble-selective", 2, ZERO_BUBBLE, 2, model=DEEP, engine=SELECTIVE),
    ],
)
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Experts drawn, losses, every gradient, update and clip norm."""
    assert_same_run(gloo, world_size, run)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        case("compiled-tp2", 2, TP2, 4, dtype="fp32", engine=COMPILE),
        case("compiled-etp2", 2, ETP2, 2, dtype="fp32", engine=COMPILE),
        case("compiled-pp2", 2, PP2, 2, dtype="fp32", engine=COMPILE),
        case("compiled-interleaved", 2, INTERLEAVED, 2, dtype="fp32", engine=COMPILE),
        case("compiled-zero1", 2, ParallelConfig(), 2, dtype="fp32", engine=COMPILE | {"zero": 1}),
        case("compiled-zero2", 2, ParallelConfig(), 2, dtype="fp32", engine=COMPILE | {"zero": 2}),
        case("compiled-hybrid", 4, HYBRID, 1, dtype="fp32", engine=COMPILE),
        case("compiled-muon", 2, ParallelConfig(), 2, dtype="fp32", optim=MUON, engine=COMPILE),
    ],
)
def test_same_compiled_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """The same with compiled dense parts, in graphs without breaks."""
    for ours, breaks, _ in gloo.run(world_size, compiled_run, run):
        compare(ours, reference(gloo, run), TOLERANCE["fp32"])
        assert breaks == {}
