"""The DeepSpeed engine on gloo: the run of the native engine in one process, under every ZeRO stage, offload and layout."""

import contextlib
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import (
    MODEL,
    ROUTER,
    STEPS,
    Run,
    build_engine,
    forced,
    full,
    initial_weights,
    micro_batches,
    run_forced,
    run_steps,
)
from helpers import GlooPool, gloo_threads
from torch import Tensor
from zero_runs import assert_same, build_op, capture, deepspeed_engine, run_deepspeed

from megagrin.checkpoint import store
from megagrin.checkpoint.store import CheckpointInfo
from megagrin.distributed.mesh import ParallelConfig
from megagrin.optim.schedule import learning_rate
from megagrin.parallel.expert import moe_layers

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
LONG = pytest.mark.long

DP, EP2, TP2 = ParallelConfig(), ParallelConfig(ep=2), ParallelConfig(tp=2)


@pytest.fixture(scope="module")
def cpu_adam() -> None:
    """DeepSpeed's AdamW on the CPU."""
    build_op("CPUAdamBuilder")


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's reads and writes of files."""
    if not Path("/usr/include/libaio.h").exists():
        pytest.skip("needs libaio's headers (Debian: libaio-dev)")
    build_op("AsyncIOBuilder")


MANY = {
    "dp2": (2, Run(DP, 1)),
    "ep2": (2, Run(EP2, 1)),
    "dp4-ep2": (4, Run(EP2, 1)),
    "dp2-tp2": (4, Run(TP2, 1)),
    "tp2-ep2-folded": (4, Run(replace(TP2, ep=2), 1)),
    "tp2-ep2-etp2": (4, Run(replace(TP2, ep=2, etp=2), 1)),
    "dp2-etp2-chunks": (4, Run(ParallelConfig(ep=2, etp=2, ep_chunks=2), 1)),
    "cp2-ep2-documents": (4, Run(ParallelConfig(cp=2, ep=2), 1, documents=True)),
    "ulysses": (2, Run(ParallelConfig(cp=2, cp_method="ulysses"), 2, documents=True)),
    "dp2-tp2-cp2-ep4": (8, Run(ParallelConfig(tp=2, cp=2, ep=4), 1, documents=True)),
}


def stage_case(stage: int, layout: str) -> Any:
    """A layout under a ZeRO stage; CI has stage 3 of most."""
    ranks, run = MANY[layout]
    left_out = stage < 3 or layout in ("dp2-tp2", "tp2-ep2-folded", "dp2-etp2-chunks")
    marks = (pytest.mark.long,) if left_out else ()
    return pytest.param(ranks, replace(run, dtype="fp32", engine={"zero": stage}), id=f"zero{stage}-{layout}", marks=marks)


@pytest.mark.parametrize(("world_size", "run"), [stage_case(stage, layout) for layout in MANY for stage in (1, 2, 3)])
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Sampled experts, losses, clip norms, every gradient, final weights; several micro-batches a step."""
    assert_same(gloo, world_size, run)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"zero": 1, "offload_optimizer": "cpu"}, id="zero1-cpu"),
        pytest.param({"zero": 2, "offload_optimizer": "cpu"}, id="zero2-cpu", marks=LONG),
        pytest.param({"zero": 3, "offload_optimizer": "cpu"}, id="zero3-cpu", marks=LONG),
        pytest.param({"zero": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, id="zero3-all-cpu"),
    ],
)
@pytest.mark.usefixtures("cpu_adam")
def test_offload_to_cpu(gloo: GlooPool, engine: dict[str, Any]) -> None:
    """DeepSpeed's AdamW on the CPU; experts have a group of their own."""
    assert_same(gloo, 4, Run(EP2, 1, "fp32", engine=engine))


@pytest.mark.long  # compiling DeepSpeed's file access takes four minutes on two cores
@pytest.mark.usefixtures("cpu_adam", "async_io")
@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_offload_to_nvme(gloo: GlooPool, tmp_path: Path, parameters: str) -> None:
    """fp32 weights and moments, and the shards of the weights, live in files between their uses."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text('{"zero_optimization": {"offload_param": {"buffer_size": 1000000}}}')  # its default takes 2 GiB a rank
    engine = {"zero": 3, "offload_optimizer": "nvme", "offload_parameters": parameters, "nvme_path": str(tmp_path)}
    engine["deepspeed_config"] = str(settings)
    wide = replace(MODEL, d_model=64, d_ff=640)  # DeepSpeed writes nothing to files that is smaller than 1 MiB
    assert_same(gloo, 2, Run(EP2, 1, "fp32", model=wide, engine=engine))
    check_resume(gloo, tmp_path, 2, Run(EP2, 1, "fp32", model=wide, engine=engine), "native")
    for kind in ["optimizer"] + ["*params"] * (parameters == "nvme"):
        assert list(tmp_path.glob(f"zero_stage_3/{kind}/rank*/*.swp")), f"nothing was offloaded to {kind}"


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(4, Run(EP2, 1, engine={"zero": 1}), id="zero1-dp4-ep2"),
        pytest.param(4, Run(replace(TP2, ep=2, etp=2), 1, engine={"zero": 2}), id="zero2-tp2-ep2-etp2"),
        pytest.param(2, Run(DP, 1, steps=STEPS, engine={"zero": 2}), id="20-steps-zero2", marks=LONG),
        pytest.param(2, Run(EP2, 1, steps=STEPS, engine={"zero": 3}), id="20-steps-zero3-ep2", marks=LONG),
        pytest.param(1, Run(DP, 2, engine={"zero": 3}), id="one-rank"),
        pytest.param(2, Run(DP, 1, model=replace(MODEL, n_experts=0, top_k=1), engine={"zero": 3}), id="dense"),
        pytest.param(2, Run(EP2, 2, model=replace(MODEL, top_k=4), engine={"zero": 2, "recompute": "full"}), id="top4-recompute"),
        pytest.param(2, Run(DP, 2, model=replace(MODEL, top_k=1), engine={"zero": 3, "recompute": "full"}), id="top1-recompute3"),
        pytest.param(2, Run(EP2, 2, engine={"zero": 2, "compile": True}), id="compile", marks=LONG),
        pytest.param(2, Run(EP2, 2, engine={"zero": 1, "compile": True}), id="compile1"),
        pytest.param(2, Run(EP2, 1, ignored=4, engine={"zero": 3}), id="rank-without-labels"),
    ],
)
def test_same_run_otherwise(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Longer, other models, recomputation, compiled parts, a rank whose sequences have no label."""
    assert_same(gloo, world_size, replace(run, dtype="fp32"))


@pytest.mark.parametrize("zero", [1, 3])
def test_a_case_leaves_no_threads_behind(zero: int) -> None:
    """DeepSpeed's globals hold engines and their groups, of 35 threads a case.

    The pool is its own, and must keep its workers: it would hide them by replacing those.
    """
    run, pool = Run(EP2, 1, "fp32", 1, engine={"zero": zero}), GlooPool()
    try:
        workers = set()
        for _ in range(3):
            pool.run(2, run_deepspeed, run)
            workers |= {tuple(pool.run(2, os.getpid))}
        assert len(workers) == 1
        assert max(pool.run(2, gloo_threads)) < 35
    finally:
        pool.close()


def test_experts_without_tokens(gloo: GlooPool) -> None:
    """Every token on the same two experts: the others, and a whole rank, get none, and a gradient of zeros."""
    run = Run(EP2, 1, "fp32", engine={"zero": 3})
    expected = gloo.run(1, run_forced, run.reference(), [0, 1])[0]
    for ours in gloo.run(2, run_forced_deepspeed, run, [0, 1]):
        assert torch.equal(ours["counts"], expected["counts"])
        assert ours["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name, gradient in expected["gradients"].items():
            assert (ours["gradients"][name] - gradient).norm() <= 1e-5 * expected["norm"], name


def run_forced_deepspeed(run: Run, expert_of_choice: list[int]) -> dict[str, Any]:
    with deepspeed_engine(run) as engine:
        for layer in moe_layers(engine.model):
            layer.router.forward = forced(expert_of_choice).__get__(layer.router)  # type: ignore[method-assign]
        gradients = capture(engine, run)
        result = engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
        return {"loss": result.loss, "norm": result.grad_norm, "counts": result.counts_LE, "gradients": gradients[0]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16(gloo: GlooPool, stage: int) -> None:
    """fp32 master weights that are the native engine's bit for bit, and its losses but for rounding.

    Experts take turns, as the router's rounded weights may flip a draw.
    """
    run = Run(EP2, 1, "bf16", steps=5, router=replace(ROUTER, forced_balance=True), engine={"zero": stage})
    native = gloo.run(2, run_steps, replace(run, engine={}))[0]
    for initial, losses, norms in gloo.run(2, run_bf16, run):
        for name, weight in gloo.run(1, initial_weights, run.reference())[0].items():
            assert torch.equal(initial[name], weight), name
        assert losses == pytest.approx(native["losses"], rel=1e-3)
        assert norms == pytest.approx(native["norms"], rel=1e-2)


def run_bf16(run: Run) -> tuple[dict[str, Tensor], list[float], list[float]]:
    with deepspeed_engine(run) as engine:
        assert all(parameter.dtype == torch.bfloat16 for parameter in engine.model.parameters())
        initial = {name.removeprefix("model."): full(tensor) for name, tensor in engine.state(optimizer=False).items()}
        results = [
            engine.train_step(micro_batches(run, step, engine.mesh), step, learning_rate(run.optim, step, run.steps))
            for step in range(run.steps)
        ]
        return initial, [result.loss for result in results], [result.grad_norm for result in results]


def run_clipped(run: Run) -> list[float]:
    """The gradient norm that the inner optimizer steps with, in each step."""
    norms: list[float] = []
    with deepspeed_engine(run) as engine:
        engine.zero.basic_optimizer.register_step_pre_hook(lambda *_: norms.append(engine.zero_state.norm().item()))
        for step in range(run.steps):
            engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-3)
    return norms


@pytest.mark.parametrize("parallel", [pytest.param(EP2, id="dp4-ep2", marks=LONG), pytest.param(TP2, id="dp2-tp2")])
def test_bf16_is_clipped_once(gloo: GlooPool, parallel: ParallelConfig) -> None:
    """DeepSpeed's bf16 optimizer has a norm of its own, too large under tp: by it, clipped gradients would be clipped again."""
    run = Run(parallel, 1, "bf16", engine={"zero": 1})
    for norms in gloo.run(4, run_clipped, run):
        assert norms == pytest.approx([run.optim.clip_norm] * run.steps, rel=1e-4)


def train(run: Run, steps: range, load: str | None = None, save: tuple[str, str] | None = None) -> dict[str, Any]:
    """Some steps of a run on either engine, from a checkpoint, and to one of a format."""
    build = deepspeed_engine(run) if "zero" in run.engine else contextlib.nullcontext(build_engine(run))
    with build as engine:
        if load is not None:
            engine.load(store.find(Path(load)), steps.start)
        losses = [engine.train_step(micro_batches(run, step, engine.mesh), step, 1e-3).loss for step in steps]
        if save is not None:
            folder, kind = save
            sections = {"model": run.model, "router": run.router, "parallel": run.parallel, "engine": engine.config}
            info = CheckpointInfo(steps.stop, 0, {name: asdict(section) for name, section in sections.items()})
            store.commit(Path(folder), info, lambda path: engine.save(path, kind))  # type: ignore[arg-type]
        valid = engine.evaluate(micro_batches(run, 9, engine.mesh))
        state = {name: full(tensor) for name, tensor in engine.state().items()}
        return {"losses": losses, "valid": valid, "state": state}


NATIVE = Run(ParallelConfig(), 2, "fp32")
ZERO2, ZERO3 = Run(EP2, 1, "fp32", engine={"zero": 2}), Run(TP2, 1, "fp32", engine={"zero": 3})
BF16 = replace(ZERO2, dtype="bf16", engine={"zero": 1})


@pytest.mark.usefixtures("cpu_adam")
@pytest.mark.parametrize(
    ("ranks", "run", "kind"),
    [
        pytest.param(2, ZERO2, "deepspeed", id="zero2-ep2"),
        pytest.param(4, ZERO3, "deepspeed", id="zero3-tp2"),
        pytest.param(4, replace(ZERO3, parallel=EP2), "deepspeed", id="zero3-dp4-ep2", marks=LONG),
        pytest.param(2, BF16, "deepspeed", id="zero1-ep2-bf16"),
        pytest.param(2, BF16, "native", id="zero1-ep2-bf16-native", marks=LONG),
        pytest.param(2, replace(ZERO2, engine={"zero": 3, "offload_optimizer": "cpu"}), "native", id="zero3-cpu-native"),
    ],
)
def test_resumes_bit_for_bit(gloo: GlooPool, tmp_path: Path, ranks: int, run: Run, kind: str) -> None:
    """Four steps are two, a checkpoint in either format, a new engine and two more."""
    check_resume(gloo, tmp_path, ranks, run, kind)


def check_resume(gloo: GlooPool, tmp_path: Path, ranks: int, run: Run, kind: str) -> None:
    whole = gloo.run(ranks, train, run, range(4))
    gloo.run(ranks, train, run, range(2), None, (str(tmp_path), kind))
    for ours, expected in zip(gloo.run(ranks, train, run, range(2, 4), str(tmp_path)), whole, strict=True):
        assert ours["losses"] == expected["losses"][2:]
        assert ours["valid"] == expected["valid"]
        assert all(torch.equal(ours["state"][name], tensor) for name, tensor in expected["state"].items())


def run_poisoned(run: Run) -> tuple[str, bool]:
    """A step whose gradients are not finite: what it says, and whether all weights and moments stayed."""
    with deepspeed_engine(run) as engine:
        engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
        before = {name: full(tensor) for name, tensor in engine.state().items()}
        layer = moe_layers(engine.model)[0]
        layer.register_forward_hook(lambda module, arguments, output: (output[0] * float("nan"), output[1]))
        with pytest.raises(FloatingPointError) as error:
            engine.train_step(micro_batches(run, 1, engine.mesh), 1, 1e-3)
        after = {name: full(tensor) for name, tensor in engine.state().items()}
        return str(error.value), all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_gradients_that_are_not_finite_change_nothing(gloo: GlooPool, stage: int, dtype: str) -> None:
    """One line that names the step, on every rank; DeepSpeed itself would skip the step in silence."""
    for message, unchanged in gloo.run(2, run_poisoned, Run(EP2, 2, dtype, engine={"zero": stage})):
        assert message == "step 2: the gradient norm is nan; the weights were not changed"
        assert unchanged


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, NATIVE), (4, ZERO3), id="native-to-zero3-tp2"),
        pytest.param((4, ZERO3), (1, NATIVE), id="zero3-tp2-to-native"),
        pytest.param((2, ZERO2), (4, ZERO3), id="zero2-ep2-to-zero3-tp2"),
    ],
)
def test_checkpoints_travel_between_engines(
    gloo: GlooPool, tmp_path: Path, before: tuple[int, Run], after: tuple[int, Run]
) -> None:
    """Weights, moments and load fractions of one engine and layout continue on another as if nothing had happened."""
    expected = gloo.run(1, train, NATIVE, range(4))[0]
    gloo.run(before[0], train, before[1], range(2), None, (str(tmp_path), "native"))
    for ours in gloo.run(after[0], train, after[1], range(2, 4), str(tmp_path)):
        assert ours["losses"] == pytest.approx(expected["losses"][2:], rel=1e-5)
        assert ours["valid"] == pytest.approx(expected["valid"], rel=1e-5)
        assert ours["state"].keys() == expected["state"].keys()


def test_other_ranks_cannot_read_deepspeeds_files(gloo: GlooPool, tmp_path: Path) -> None:
    """One line that says how many are needed; a reader of tensors says what to do."""
    gloo.run(2, train, ZERO2, range(1), None, (str(tmp_path), "deepspeed"))
    with pytest.raises(AssertionError, match="DeepSpeed's files of 2 ranks are read by as many, not by 4"):
        gloo.run(4, train, replace(ZERO2, parallel=TP2), range(1, 2), str(tmp_path))
    with pytest.raises(AssertionError, match=r"another layout \(parallel.ep: 2 -> 1\); convert it by way of native"):
        gloo.run(2, train, replace(ZERO2, parallel=DP), range(1, 2), str(tmp_path))
    with pytest.raises(AssertionError, match="`megagrin convert-checkpoint` makes a native checkpoint of them"):
        gloo.run(1, train, NATIVE, range(1, 2), str(tmp_path))
