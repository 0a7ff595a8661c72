"""The formulas of docs/parallelism.md against the bytes of real collectives, every call of a training step on gloo counted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import BALANCE, MODEL, OPTIM, ROUTER, SEQ, SEQUENCES, Run, build_engine, micro_batches
from helpers import GlooPool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagrin.distributed.mesh import ParallelConfig, ParallelMesh
from megagrin.planning import cost
from megagrin.planning.cost import Workload, sent, step_traffic
from megagrin.training import rules
from megagrin.training.run_config import parse_config

# Everything divides by 8, so that no parameter is padded; round-robin routing gives every expert the same number of rows.
SHAPE = replace(MODEL, vocab_size=64, n_layers=4, d_ff=32, n_kv_heads=4)
OPS: dict[str, cost.Op] = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


Key = tuple[tuple[int, ...], str]  # ranks of a group, operation


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


class Counted(TorchDispatchMode):
    """Bytes that leave this rank, by the ranks of the group and the operation, in every c10d call, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._opname) not in ("recv_", "barrier"):
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            self.bytes[_ranks(group), OPS[name]] += self._sent(name, args, group)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _sent(name: str, args: Any, group: dist.ProcessGroup) -> float:
        if name == "alltoall_base_":
            rows, splits = args[1], list(args[4]) or [args[1].shape[0] // group.size()] * group.size()
            away = sum(split for rank, split in enumerate(splits) if rank != group.rank())
            return away * _size(rows) / max(1, rows.shape[0])
        # Gathered output, input of a reduction, or message.
        buffer = {"_allgather_base_": args[0], "_reduce_scatter_base_": args[1]}.get(name, args[0][0])
        return sent(OPS[name], _size(buffer), group.size())


def _axes(mesh: ParallelMesh) -> dict[str, tuple[int, ...]]:
    """The ranks behind each axis name; several axes may have the same ones."""
    groups = {axis: mesh.group(axis) for axis in ("pp", "dp", "cp", "tp", "ep", "etp", "tokens")}
    groups |= {"dense": mesh.dense["fsdp"].get_group(), "expert": mesh.expert["fsdp"].get_group()}
    groups |= {"copies": mesh.dense["dp_replicate"].get_group(), "expert copies": mesh.expert["dp_replicate"].get_group()}
    return {"world": tuple(range(dist.get_world_size()))} | {axis: _ranks(group) for axis, group in groups.items()}


def count_step(run: Run) -> tuple[dict[Key, float], dict[Key, float]]:
    """Bytes that this rank sends in the second optimizer step, when everything lazy is in place: counted, and by formula."""
    engine = build_engine(run)
    engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
    with Counted() as counted:
        engine.train_step(micro_batches(run, 1, engine.mesh), 1, 1e-3)
    axes = _axes(engine.mesh)
    expected: Counter[Key] = Counter()
    for traffic in step_traffic(_workload(run, engine.mesh)):
        expected[axes[traffic.axis], traffic.op] += traffic.bytes
    return {key: value for key, value in counted.bytes.items() if value > 0}, dict(expected)


def _workload(run: Run, mesh: ParallelMesh) -> Workload:
    stage, stages = mesh.rank("pp"), mesh.size("pp")
    return Workload(
        run.model,
        run.parallel,
        dist.get_world_size(),
        SEQ,
        run.micro,
        SEQUENCES // mesh.dp_size // run.micro,
        layers=run.model.n_layers // stages,
        stages=run.parallel.pp_stages_per_rank,
        embedding=stage == 0,
        head=stage == stages - 1,
        compute_bytes={"bf16": 2, "fp32": 4, "fp64": 8}[run.dtype],
        master_bytes=8 if run.dtype == "fp64" else 4,
        zero=run.engine.get("zero", 3),
        recomputed=run.model.n_layers // stages if run.engine.get("recompute") == "full" else 0,
        backward_weights=False,  # round robin has none
        documents=run.documents,
        muon=run.optim.kind == "muon",
        global_counts=run.balance.scope == "global",
    )


PIPELINED = {"pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2}
# name: (ranks, degrees, sequences a micro-batch, other fields of the run)
LAYOUTS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "dp2": (2, {}, 2, {}),
    "dp2-zero1": (2, {}, 2, {"engine": {"zero": 1}}),
    "dp2-zero2": (2, {}, 2, {"engine": {"zero": 2}}),
    "hybrid": (4, {"dp_replicate": 2}, 1, {}),
    "tp2": (2, {"tp": 2}, 8, {}),
    "tp2-cp2-ep4": (4, {"tp": 2, "cp": 2, "ep": 4}, 8, {}),
    "tp2-dp2-dense": (4, {"tp": 2}, 4, {"model": replace(SHAPE, n_experts=0, top_k=1)}),
    "cp2-documents": (2, {"cp": 2}, 4, {"documents": True}),
    "cp2-ulysses-ep4": (4, {"cp": 2, "cp_method": "ulysses", "ep": 4}, 2, {}),
    "ep2-chunks": (2, {"ep": 2, "ep_chunks": 2}, 2, {}),
    "ep2-edp2-hybrid": (8, {"ep": 2, "dp_replicate": 2}, 1, {}),
    "etp2": (2, {"etp": 2}, 4, {}),
    "ep2-etp2": (4, {"ep": 2, "etp": 2}, 2, {}),
    "tp2-etp2-dp2": (4, {"tp": 2, "etp": 2}, 4, {}),
    "pp2": (2, {"pp": 2}, 2, {}),
    "pp2-zero-bubble-dp2": (4, {"pp": 2, "pp_schedule": "zero_bubble"}, 1, {}),
    "pp2-tp2-etp2-interleaved": (8, {"pp": 2, "tp": 2, "etp": 2, **PIPELINED}, 1, {}),
    "muon-ep2-edp2": (4, {"ep": 2}, 2, {"optim": replace(OPTIM, kind="muon")}),
    "muon-tp2-dp2": (4, {"tp": 2}, 4, {"optim": replace(OPTIM, kind="muon")}),
    "recompute": (4, {"ep": 2, "cp": 2}, 2, {"engine": {"recompute": "full"}, "balance": replace(BALANCE, scope="global")}),
}
FAST = ("dp2", "tp2-cp2-ep4", "cp2-ulysses-ep4", "tp2-etp2-dp2", "pp2-zero-bubble-dp2")
# fp32 doubles what bf16 sends: CI has it for some, and for all `make test-all`.
CASES = [
    pytest.param(name, dtype, marks=() if dtype == "bf16" or name in FAST else pytest.mark.long, id=f"{name}-{dtype}")
    for name in LAYOUTS
    for dtype in ("bf16", "fp32")
]


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_bytes_of_a_step(gloo: GlooPool, layout: str, dtype: str) -> None:
    """Every group and operation, each rank: counted bytes equal the formula."""
    world_size, degrees, micro, fields = LAYOUTS[layout]
    router = replace(ROUTER, forced_balance=True)
    run = Run(ParallelConfig(**degrees), micro, dtype, router=router, **{"model": SHAPE, **fields})
    for rank, (counted, expected) in enumerate(gloo.run(world_size, count_step, run)):
        assert counted == pytest.approx(expected), f"rank {rank}"


DOCS = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
EXAMPLE_ROWS = {  # row of the table -> (axes, operations)
    "rows to experts and back (`ep`)": (("ep",), None),
    "tokens to parts of experts and back (`etp`)": (("etp",), None),
    "sequence of attention (`tp`)": (("tp",), None),
    "hidden states and their gradients (`pp`)": (("pp",), None),
    "parameters (data parallel)": (("dense", "expert", "tokens"), ("all_gather",)),
    "gradients (data parallel)": (("dense", "expert", "tokens"), ("reduce_scatter",)),
    "all": (None, None),
}


def _example(recipe: str, *overrides: str) -> list[float]:
    """GB that a rank of a middle stage sends in a step of a recipe for 64 GPUs, by row of the table."""
    path = Path(__file__).parents[2] / "launch" / "recipes" / f"{recipe}.yaml"
    run, _ = parse_config(["--config", str(path), "--data.train=tokens", *overrides])
    parallel, train = run.parallel, run.train
    workload = Workload(
        run.model,
        parallel,
        64,
        train.seq_len,
        train.micro_batch_size,
        train.global_batch_size // train.micro_batch_size // parallel.data_parallel_size(64),
        layers=run.model.n_layers // parallel.pp,
        stages=parallel.pp_stages_per_rank,
        embedding=parallel.pp == 1,
        head=parallel.pp == 1,
        zero=run.engine.zero,
    )
    traffic = step_traffic(workload)
    return [
        sum(t.bytes for t in traffic if (axes is None or t.axis in axes) and (ops is None or t.op in ops)) / 1e9
        for axes, ops in EXAMPLE_ROWS.values()
    ]


def example_table() -> str:
    """The worked example of docs/parallelism.md."""
    columns = [
        _example("grin_16x3_8b_64gpu", "--engine.zero=3"),
        _example("grin_16x3_8b_64gpu"),
        _example("grin_16x3_8b_64gpu_paper"),
    ]
    rows = zip(EXAMPLE_ROWS, *columns, strict=True)
    return "\n".join("| " + " | ".join([name, *(f"{value:.1f}" for value in values)]) + " |" for name, *values in rows)


def test_worked_example() -> None:
    """The table in the document is what the formulas say of the recipes."""
    assert example_table() in DOCS


RULES = (  # (ranks, settings, the message)
    (8, "parallel.tp=0", "parallel.tp: 0 must be at least 1"),
    (8, "parallel.pp=3", "parallel.pp: 3 must divide the number of ranks (8)"),
    (6, "parallel.ep=3", "parallel.ep: 3 must divide model.n_experts (16)"),
    (2, "model.preset=dense_tiny parallel.ep=2", "parallel.ep: 2 needs a model with experts; model.n_experts is 0"),
    (2, "parallel.ep_chunks=2", "parallel.ep_chunks: 2 splits an exchange that parallel.ep=1 does not make"),
    (8, "parallel.dp_replicate=3", "parallel.dp_replicate: 3 must divide the data-parallel ranks (8)"),
    (
        16,
        "train.global_batch_size=32 train.micro_batch_size=4",
        "train.global_batch_size: 32 must be a multiple of data-parallel ranks × train.micro_batch_size (16 × 4)",
    ),
    (4, "parallel.tp=4", "parallel.tp: 4 must divide model.n_kv_heads (2)"),
    (5, "parallel.etp=5", "parallel.etp: 5 must divide model.d_ff (192)"),
    (2, "parallel.tp=2 train.seq_len=1001", "parallel.tp: 2 must divide train.seq_len (1001)"),
    (
        4,
        "parallel.cp=2 parallel.tp=2 train.seq_len=1004",
        "train.seq_len: 1004 must be a multiple of 2 × parallel.cp × parallel.tp (8): "
        "each cp rank takes an early and a late chunk, and tp cuts what it takes",
    ),
    (
        4,
        "parallel.cp=4 parallel.cp_method=ulysses",
        "parallel.cp_method: ulysses needs model.n_kv_heads (2) to be a multiple of parallel.cp × parallel.tp (4); "
        "all_gather does not",
    ),
    (
        6,
        "parallel.tp=2",
        "model.d_model: 256 must be a multiple of the ranks that shard each part of a matrix (3); "
        "parallel.dp_replicate lowers that number",
    ),
    (
        10,
        "parallel.ep=2",
        "model.d_model: 256 must be a multiple of the ranks that shard each expert (5); parallel.dp_replicate lowers that number",
    ),
    (4, "parallel.pp_stages_per_rank=2", "parallel.pp_stages_per_rank: 2 needs parallel.pp above 1"),
    (
        2,
        "parallel.pp=2 parallel.pp_stages_per_rank=2",
        "parallel.pp_stages_per_rank: 2 must be 1 with parallel.pp_schedule 1f1b",
    ),
    (
        2,
        "parallel.pp=2 parallel.pp_schedule=interleaved_1f1b",
        "parallel.pp_stages_per_rank: 1 must be at least 2 with parallel.pp_schedule interleaved_1f1b",
    ),
    (
        8,
        "parallel.pp=8",
        "parallel.pp: 8 × parallel.pp_stages_per_rank 1 must not exceed model.n_layers + 2 "
        "(6: embedding and head may be stages of their own)",
    ),
    (
        8,
        "parallel.pp=8 train.micro_batch_size=8",
        "parallel.pp: 8 with parallel.pp_schedule 1f1b must not exceed the 4 micro-batches a rank "
        "(train.global_batch_size / data-parallel ranks / train.micro_batch_size)",
    ),
    (
        4,
        "parallel.pp=4 parallel.pp_schedule=zero_bubble train.global_batch_size=44",
        "parallel.pp: 4 with parallel.pp_schedule zero_bubble takes the 11 micro-batches a rank "
        "(train.global_batch_size / data-parallel ranks / train.micro_batch_size) in rounds of pp or a little more: "
        "their number must be a multiple of the rounds (2)",
    ),
    (2, "parallel.pp=2 parallel.pp_split=[1,1]", "parallel.pp_split: [1, 1] must add up to model.n_layers (4)"),
    (
        2,
        "parallel.pp=2 parallel.pp_split=[4]",
        "parallel.pp_split: [4] must have a number for each of the 2 stages (pp × pp_stages_per_rank)",
    ),
    (
        4,
        "parallel.pp=4 parallel.pp_split=[2,0,1,1]",
        "parallel.pp_split: [2, 0, 1, 1] must be positive; only the first and the last stage may be without layers",
    ),
    (
        2,
        "parallel.pp=2 parallel.pp_schedule=zero_bubble engine.compile=true",
        "engine.compile: true with parallel.pp_schedule zero_bubble is not possible: a compiled backward pass computes gradients "
        "of inputs and of weights together; take 1f1b or interleaved_1f1b",
    ),
    (
        2,
        "parallel.pp=2 parallel.pp_schedule=zero_bubble engine.recompute=full",
        "engine.recompute: full with parallel.pp_schedule zero_bubble would recompute a block once for its inputs and once more "
        "for each of its weights; take selective, or 1f1b or interleaved_1f1b",
    ),
    (2, "engine.recompute=budget", "engine.recompute_budget_gib: 0.0 must be positive with engine.recompute=budget"),
)


@pytest.mark.parametrize(("ranks", "settings", "message"), RULES)
def test_documented_rule(ranks: int, settings: str, message: str) -> None:
    """A layout that breaks a rule gets the message that the document lists."""
    run, _ = parse_config(["--data.train=tokens", *(f"--{setting}" for setting in settings.split())])
    assert message in rules.violations(run, ranks)
    assert f"`{message}`" in DOCS
