"""The same run on every layout: losses, gradients and clip norm of sampled routing against one process.

Shape suffixes: B sequences, S positions, T tokens, K experts per token.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagrin import checkpoint
from megagrin.data.loader import Batch
from megagrin.engines.native import EngineConfig, NativeEngine
from megagrin.models.transformer import ModelConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import Router, RouterConfig, Routing
from megagrin.optim import OptimConfig, learning_rate
from megagrin.parallel.expert import moe_layers
from megagrin.parallel.mesh import ParallelConfig, build_mesh

MODEL = ModelConfig(
    vocab_size=67,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=24,
    n_experts=8,
    top_k=2,
    max_positions=16,
    window=9,
    init_std=0.1,
)
# A wide mask keeps several experts in every draw: routing is really sampled.
ROUTER = RouterConfig(mask_eps=0.4)
BALANCE = BalanceConfig(coef=0.02, z_coef=0.001)
OPTIM = OptimConfig(lr=2e-3, warmup_steps=4, clip_norm=0.5, eps=1e-5)
SEQUENCES, SEQ, STEPS = 8, 16, 20


def _micro_batches(step: int, rank: int, world_size: int, size: int) -> list[Batch]:
    """This rank's part of a fixed global batch; every third label is left out, unevenly over the ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BS = torch.randint(0, MODEL.vocab_size, (SEQUENCES, SEQ + 1), generator=generator)
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[: SEQUENCES // 2, ::3] = -100
    index_BS = torch.arange(SEQUENCES * SEQ).view(SEQUENCES, SEQ)
    positions_BS = torch.arange(SEQ).expand(SEQUENCES, SEQ)
    share = SEQUENCES // world_size
    parts = []
    for start in range(rank * share, (rank + 1) * share, size):
        part = slice(start, start + size)
        parts.append(Batch(tokens_BS[part, :-1], labels_BS[part], positions_BS[part], None, index_BS[part]))
    return parts


def _engine(ep: int, dtype: str, model: ModelConfig = MODEL, balance: BalanceConfig = BALANCE, **options: Any) -> NativeEngine:
    mesh = build_mesh(ParallelConfig(ep=ep), "cpu")
    router = options.pop("router", ROUTER)
    return NativeEngine(model, router, balance, OPTIM, EngineConfig(dtype=dtype, **options), mesh, torch.device("cpu"), seed=7)


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def run_steps(
    ep: int, micro: int, dtype: str, steps: int, model: ModelConfig, balance: BalanceConfig, options: dict[str, Any]
) -> dict[str, Any]:
    """Train and return everything there is to compare."""
    engine = _engine(ep, dtype, model, balance, **options)
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    gradients: list[dict[str, Tensor]] = []

    def capture(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.append({names[p]: _full(p.grad) for group in optimizer.param_groups for p in group["params"]})

    engine.optimizer.register_step_pre_hook(capture)
    results = [
        engine.train_step(
            _micro_batches(step, dist.get_rank(), dist.get_world_size(), micro), step, learning_rate(OPTIM, step, steps)
        )
        for step in range(steps)
    ]
    return {
        "losses": [result.loss for result in results],
        "balance": [result.balance_loss for result in results],
        "norms": [result.grad_norm for result in results],
        "counts": torch.stack([result.counts_LE for result in results]) if results[0].counts_LE is not None else None,
        "gradients": gradients,
        "weights": checkpoint.gather(engine.model),
    }


def _reference(gloo: GlooPool, cache: dict[Any, Any], *case: Any) -> dict[str, Any]:
    """One process, one micro-batch: computed once a case."""
    key = repr(case)
    if key not in cache:
        dtype, steps, model, balance, options = case
        cache[key] = gloo.run(1, run_steps, 1, SEQUENCES, dtype, steps, model, balance, options)[0]
    return cache[key]


_CACHE: dict[Any, Any] = {}


def _assert_same_run(ours: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    if reference["counts"] is not None:
        assert torch.equal(ours["counts"], reference["counts"]), "another expert was sampled"
    for what in ("losses", "balance", "norms"):
        torch.testing.assert_close(torch.tensor(ours[what]), torch.tensor(reference[what]), rtol=tolerance, atol=0)
    for step, (got, expected) in enumerate(zip(ours["gradients"], reference["gradients"], strict=True)):
        assert got.keys() == expected.keys()
        # The key bias has no gradient in exact arithmetic (softmax ignores a constant): only rounding is left, so errors are
        # measured against the attention's other gradients.
        scale = {name: expected[name.replace("k_proj.bias", "q_proj.bias")].norm() for name in expected}
        for name in expected:
            error = (got[name] - expected[name]).norm()
            assert error <= tolerance * scale[name], f"step {step}: {name} is off by {error / scale[name]:.2e}"
    for name, weight in reference["weights"].items():
        assert (ours["weights"][name] - weight).norm() <= 10 * tolerance * weight.norm().clamp_min(1e-3), name


LAYOUTS = [  # (ranks, ep, sequences a micro-batch)
    pytest.param(1, 1, 2, id="accumulation"),
    pytest.param(2, 1, 4, id="dp2"),
    pytest.param(2, 2, 4, id="ep2"),
    pytest.param(4, 2, 2, id="ep2-edp2"),
    pytest.param(4, 4, 1, id="ep4-accumulation"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-10)])
@pytest.mark.parametrize(("world_size", "ep", "micro"), LAYOUTS)
def test_same_run_on_every_layout(gloo: GlooPool, world_size: int, ep: int, micro: int, dtype: str, tolerance: float) -> None:
    """Losses, every gradient, the clip norm and the sampled experts over 20 steps."""
    reference = _reference(gloo, _CACHE, dtype, STEPS, MODEL, BALANCE, {})
    assert min(reference["norms"]) > OPTIM.clip_norm, "clipping must be at work"
    for ours in gloo.run(world_size, run_steps, ep, micro, dtype, STEPS, MODEL, BALANCE, {}):
        _assert_same_run(ours, reference, tolerance)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", ["sparsemixer_v2_star", "gshard"])
def test_other_routers_and_k(gloo: GlooPool, kind: str, top_k: int) -> None:
    """EP 2 × DP 2 for the other estimators, top-1 and top-3."""
    model, options = replace(MODEL, top_k=top_k), {"router": replace(ROUTER, kind=kind)}
    reference = _reference(gloo, _CACHE, "fp64", 3, model, BALANCE, options)
    for ours in gloo.run(4, run_steps, 2, 2, "fp64", 3, model, BALANCE, options):
        _assert_same_run(ours, reference, 1e-10)


def test_dense_model_and_kept_parameters(gloo: GlooPool) -> None:
    """The dense twin, with gathered parameters kept between forward and backward."""
    model, options = replace(MODEL, n_experts=0, top_k=1), {"reshard_after_forward": False}
    reference = _reference(gloo, _CACHE, "fp64", 3, model, BALANCE, options)
    for ours in gloo.run(4, run_steps, 1, 1, "fp64", 3, model, BALANCE, options):
        _assert_same_run(ours, reference, 1e-10)


def test_global_scope_counts_over_ranks(gloo: GlooPool) -> None:
    """Scope `global` without accumulation sees the whole batch, as one process does; `local` does not."""
    whole = replace(BALANCE, scope="global", coef=1.0)
    reference = _reference(gloo, _CACHE, "fp64", 3, MODEL, whole, {})
    for ours in gloo.run(4, run_steps, 2, 2, "fp64", 3, MODEL, whole, {}):
        _assert_same_run(ours, reference, 1e-10)
    local = gloo.run(4, run_steps, 2, 2, "fp64", 3, MODEL, replace(whole, scope="local"), {})[0]
    with pytest.raises(AssertionError):
        _assert_same_run(local, reference, 1e-10)


def test_bf16_follows_fp32(gloo: GlooPool) -> None:
    """bf16 compute with fp32 masters: ranks agree with one process far better than bf16 agrees with fp32."""
    reference = _reference(gloo, _CACHE, "bf16", 2, MODEL, BALANCE, {})
    exact = _reference(gloo, _CACHE, "fp32", 2, MODEL, BALANCE, {})
    ours = gloo.run(4, run_steps, 2, 2, "bf16", 2, MODEL, BALANCE, {})[0]
    assert all(weight.dtype == torch.float32 for weight in ours["weights"].values())
    assert all(gradient.dtype == torch.float32 for gradient in ours["gradients"][0].values())
    assert abs(ours["losses"][0] / reference["losses"][0] - 1) < 1e-4
    assert 0 < abs(reference["losses"][0] / exact["losses"][0] - 1) < 1e-2
    for name, gradient in exact["gradients"][0].items():
        if "k_proj.bias" not in name and "moe" not in name:  # a flipped draw moves an expert's gradient as a whole
            assert (ours["gradients"][0][name] - gradient).norm() < 0.1 * gradient.norm(), name


def _forced(expert_of_choice: list[int]) -> Any:
    def forward(self: Router, x_TD: Tensor, draws: Any) -> tuple[Tensor, Routing]:
        z_TE = torch.nn.functional.linear(x_TD, self.weight)
        expert_TK = torch.tensor(expert_of_choice).expand(x_TD.shape[0], -1)
        return z_TE, Routing(expert_TK, torch.softmax(z_TE, -1).gather(1, expert_TK), None)

    return forward


def run_forced(ep: int, micro: int, expert_of_choice: list[int]) -> dict[str, Any]:
    """One step with every token sent to the same experts; returns gradients and loss."""
    engine = _engine(ep, "fp64")
    for layer in moe_layers(engine.model):
        layer.router.forward = _forced(expert_of_choice).__get__(layer.router)  # type: ignore[method-assign]
    gradients: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    engine.optimizer.register_step_pre_hook(
        lambda optimizer, *_: gradients.update(
            {names[p]: _full(p.grad) for group in optimizer.param_groups for p in group["params"]}
        )
    )
    batches = _micro_batches(0, dist.get_rank(), dist.get_world_size(), micro)
    result = engine.train_step(batches, 0, 1e-3)
    return {"loss": result.loss, "norm": result.grad_norm, "counts": result.counts_LE, "gradients": gradients}


@pytest.mark.parametrize("experts", [[5, 4], [0, 7], [3, 2]], ids=["second-rank-only", "both-ends", "first-rank-only"])
@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 4), (4, 2)])
def test_empty_experts_and_ranks(gloo: GlooPool, experts: list[int], world_size: int, ep: int) -> None:
    """All tokens to two experts: nothing is dropped, six experts and whole ranks stay empty, nothing hangs."""
    reference = gloo.run(1, run_forced, 1, SEQUENCES, experts)[0]
    assert reference["counts"][0].tolist() == [SEQUENCES * SEQ * (expert in experts) for expert in range(8)]
    for ours in gloo.run(world_size, run_forced, ep, 1, experts):
        assert torch.equal(ours["counts"], reference["counts"])
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-12)
        assert ours["norm"] == pytest.approx(reference["norm"], rel=1e-11)
        for name, gradient in reference["gradients"].items():
            torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-9, atol=1e-14)
    for name in ("gate_up_proj", "down_proj"):
        gradient = reference["gradients"][f"layers.0.moe.experts.{name}"]
        assert [bool(gradient[expert].abs().sum() > 0) for expert in range(8)] == [expert in experts for expert in range(8)]


def test_initial_weights_do_not_depend_on_layout(gloo: GlooPool) -> None:
    """Bit for bit, with experts over both axes and a vocabulary that divides by no number of ranks."""
    reference = gloo.run(1, initial_weights, 1)[0]
    for world_size, ep in [(2, 2), (4, 2), (3, 1)]:
        for weights in gloo.run(world_size, initial_weights, ep):
            assert weights.keys() == reference.keys()
            assert all(torch.equal(weights[name], reference[name]) for name in reference)


def initial_weights(ep: int) -> dict[str, Tensor]:
    """Full weights of a fresh engine."""
    return checkpoint.gather(_engine(ep, "fp32").model)
