"""One training run under any layout, and its comparison with the same run in one process.

A test describes the run with `Run` and calls `assert_same_run(gloo, world_size, run)`.

Shape suffixes: B sequences, S positions, T tokens, K experts per token.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from helpers import GlooPool
from torch import Tensor
from torch.distributed.tensor import DTensor

from megagrin.checkpoint import store
from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, ParallelMesh, build_mesh
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.transformer import ModelConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import Router, RouterConfig, Routing
from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate
from megagrin.parallel.expert import moe_layers

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
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}


@dataclass(frozen=True)
class Run:
    """A training run and its layout; `reference()` is the same run in one process.

    Attributes:
        parallel: degrees of parallelism; data parallelism takes the ranks that are left.
        micro: sequences per forward pass and rank.
        dtype: of matrix products.
        steps: optimizer steps.
        model: shape of the model.
        router: how tokens choose.
        balance: balance loss.
        optim: optimizer.
        documents: cut every sequence into documents that do not see each other.
        engine: further fields of `EngineConfig`; they hold for the layout, not for the reference.
        ignored: sequences of the global batch without any label (a rank may have nothing to learn from).
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro: int = 1
    dtype: str = "fp64"
    steps: int = 3
    model: ModelConfig = MODEL
    router: RouterConfig = ROUTER
    balance: BalanceConfig = BALANCE
    optim: OptimConfig = OPTIM
    documents: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    ignored: int = 0

    def reference(self) -> "Run":
        """One process, one micro-batch."""
        return replace(self, parallel=ParallelConfig(), micro=SEQUENCES, engine={})


def expected_decay(moe: bool) -> dict[str, bool]:
    """Whether weight decay takes a parameter, for every parameter of MODEL, or of its dense counterpart, by name."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("moe.router.weight", "moe.experts.gate_up_proj", "moe.experts.down_proj")
    dense = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    norms = ("attention_norm.weight", "attention_norm.bias", "mlp_norm.weight", "mlp_norm.bias")
    decays = {"embed.weight": True, "lm_head.weight": True, "lm_head.bias": False}
    decays |= {"final_norm.weight": False, "final_norm.bias": False}
    for layer in range(MODEL.n_layers):
        decays |= {f"layers.{layer}.{name}": True for name in (mlp if moe else dense)}
        decays |= {f"layers.{layer}.attention.{name}.weight": True for name in attention}
        decays |= {f"layers.{layer}.attention.{name}.bias": False for name in attention}
        decays |= {f"layers.{layer}.{name}": False for name in norms}
    return decays


def micro_batches(run: Run, step: int, mesh: ParallelMesh) -> list[Batch]:
    """This rank's part of a fixed global batch; every third label of one half is left out, unevenly over the ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BS = torch.randint(0, run.model.vocab_size, (SEQUENCES, SEQ + 1), generator=generator)
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[: SEQUENCES // 2, ::3] = -100
    labels_BS[: run.ignored] = -100
    index_BS = torch.arange(SEQUENCES * SEQ).view(SEQUENCES, SEQ)
    positions_BS = torch.arange(SEQ).repeat(SEQUENCES, 1)
    documents_BS = None
    if run.documents:
        starts_BS = torch.rand(SEQUENCES, SEQ, generator=generator) < 0.2
        starts_BS[:, 0] = True
        documents_BS = starts_BS.cumsum(1) - 1
        positions_BS = positions_BS - torch.where(starts_BS, positions_BS, 0).cummax(1).values
    share = SEQUENCES // mesh.dp_size
    parts = []
    for start in range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share, run.micro):
        part = slice(start, start + run.micro)
        documents = None if documents_BS is None else documents_BS[part]
        parts.append(Batch(tokens_BS[part, :-1], labels_BS[part], positions_BS[part], documents, index_BS[part]))
    return parts


def build_engine(run: Run) -> NativeEngine:
    """A fresh engine on the default process group."""
    mesh = build_mesh(run.parallel, "cpu")
    config = EngineConfig(dtype=run.dtype, **run.engine)  # type: ignore[arg-type]
    return NativeEngine(run.model, run.router, run.balance, run.optim, config, mesh, torch.device("cpu"), seed=7)


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, wherever its parts are; every rank that holds a part calls it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def over_stages(tensors: dict[str, Tensor], mesh: ParallelMesh) -> dict[str, Tensor]:
    """Join what the pipeline stages hold."""
    parts: list[Any] = [None] * mesh.size("pp")
    dist.all_gather_object(parts, tensors, group=mesh.group("pp"))
    return {name: tensor for part in parts for name, tensor in part.items()}


def capture_gradients(engine: NativeEngine) -> list[dict[str, Tensor]]:
    """A list that receives all full gradients by name, as the optimizer sees them (clipped), before each of its steps."""
    gradients: list[dict[str, Tensor]] = []

    def capture(*_: Any) -> None:
        held = engine.model.named_parameters()
        local = {name: full(parameter.grad) for name, parameter in held if parameter.grad is not None}
        gradients.append(over_stages(local, engine.mesh))

    engine.optimizer.register_step_pre_hook(capture)
    return gradients


def to_compare(results: list[Any], gradients: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> dict[str, Any]:
    """What `compare` takes: of the steps' results and gradients, stacked over the steps, and the final weights."""
    return {
        "losses": [result.loss for result in results],
        "balance": [result.balance_loss for result in results],
        "z": [result.z_loss for result in results],
        "norms": [result.grad_norm for result in results],
        "counts": torch.stack([result.counts_LE for result in results]) if results[0].counts_LE is not None else None,
        "gradients": {name: torch.stack([step[name] for step in gradients]) for name in gradients[0]},
        "weights": weights,
    }


def run_steps(run: Run) -> dict[str, Any]:
    """Train and return everything there is to compare; tensors of all steps stacked."""
    engine = build_engine(run)
    gradients = capture_gradients(engine)
    results = [
        engine.train_step(micro_batches(run, step, engine.mesh), step, learning_rate(run.optim, step, run.steps))
        for step in range(run.steps)
    ]
    return to_compare(results, gradients, store.gather(engine.model, engine.mesh.group("pp")))


_CACHE: dict[str, dict[str, Any]] = {}


def reference(gloo: GlooPool, run: Run) -> dict[str, Any]:
    """The run in one process with one micro-batch, computed once a session."""
    alone = run.reference()
    if repr(alone) not in _CACHE:
        _CACHE[repr(alone)] = gloo.run(1, run_steps, alone)[0]
    return _CACHE[repr(alone)]


def compare(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Sampled experts, losses, clip norms, every gradient of every step and the final weights."""
    if expected["counts"] is not None:
        assert torch.equal(ours["counts"], expected["counts"]), "another expert was sampled"
    for what in ("losses", "balance", "z", "norms"):
        torch.testing.assert_close(torch.tensor(ours[what]), torch.tensor(expected[what]), rtol=tolerance, atol=0)
    assert ours["gradients"].keys() == expected["gradients"].keys() == ours["weights"].keys()
    for name, gradient in expected["gradients"].items():
        # The key bias has no gradient in exact arithmetic (softmax ignores a constant): only rounding is left, so errors are
        # measured against the attention's other gradients.
        scale = expected["gradients"][name.replace("k_proj.bias", "q_proj.bias")].flatten(1).norm(dim=1)
        error = (ours["gradients"][name] - gradient).flatten(1).norm(dim=1)
        worst = (error / scale).max()
        assert (error <= tolerance * scale).all(), (
            f"gradient of {name}: off by {worst:.2e} in step {int((error / scale).argmax())}"
        )
    for name, weight in expected["weights"].items():
        assert (ours["weights"][name] - weight).norm() <= 10 * tolerance * weight.norm().clamp_min(1e-3), f"weight {name}"


def assert_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Every rank of a layout reports the run of one process, within the tolerance of its dtype."""
    expected = reference(gloo, run)
    assert min(expected["norms"]) > run.optim.clip_norm > 0, "clipping must be at work"
    for ours in gloo.run(world_size, run_steps, run):
        compare(ours, expected, TOLERANCE[run.dtype])


def forced(expert_of_choice: list[int]) -> Any:
    def forward(self: Router, x_TD: Tensor, draws: Any) -> tuple[Tensor, Routing]:
        z_TE = torch.nn.functional.linear(x_TD, self.weight)
        expert_TK = torch.tensor(expert_of_choice).expand(x_TD.shape[0], -1)
        return z_TE, Routing(expert_TK, torch.softmax(z_TE, -1).gather(1, expert_TK), None)

    return forward


def run_forced(run: Run, expert_of_choice: list[int]) -> dict[str, Any]:
    """One step with every token sent to the same experts; returns gradients and loss."""
    engine = build_engine(run)
    for layer in moe_layers(engine.model):
        layer.router.forward = forced(expert_of_choice).__get__(layer.router)  # type: ignore[method-assign]
    gradients = capture_gradients(engine)
    result = engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3)
    return {"loss": result.loss, "norm": result.grad_norm, "counts": result.counts_LE, "gradients": gradients[0]}


def initial_weights(run: Run) -> dict[str, Tensor]:
    """Full weights of a fresh engine."""
    engine = build_engine(run)
    return store.gather(engine.model, engine.mesh.group("pp"))
