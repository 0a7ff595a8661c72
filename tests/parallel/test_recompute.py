"""Activation checkpointing and torch.compile: the same gradients, the same experts, less memory.

Shape suffixes: B sequences, S positions, T tokens, K experts per token, D model width, L layers, E experts.
"""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import BALANCE, MODEL, ROUTER, STEPS, Run, assert_same_run, build_engine, capture_gradients, micro_batches
from helpers import GlooPool
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from megagrin import rng
from megagrin.distributed.mesh import ParallelConfig
from megagrin.engines.base import EngineConfig
from megagrin.models.init import init_parameters
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.layer import TrainRouting
from megagrin.moe.router import Draws
from megagrin.nn.rope import rope_table
from megagrin.parallel.expert import moe_layers
from megagrin.parallel.recompute import Recompute, apply_recompute, block_bytes, blocks_to_recompute

LONG = pytest.mark.long
PARTS = ("attention_core", "expert_mlp", "norms", "router")
FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective", "recompute_parts": PARTS}
GLOBAL = replace(BALANCE, scope="global", coef=1.0)
MODES = [pytest.param(FULL, id="full"), pytest.param(SELECTIVE, id="selective")]
MODES += [pytest.param({"recompute": "selective", "recompute_parts": (part,)}, id=part) for part in PARTS]


def one_step(run: Run) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step."""
    engine = build_engine(run)
    gradients = capture_gradients(engine)
    loss = engine.train_step(micro_batches(run, 0, engine.mesh), 0, 1e-3).loss
    return loss, gradients[0]


@pytest.mark.parametrize("engine", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bit_for_bit(gloo: GlooPool, engine: dict[str, Any], dtype: str) -> None:
    """Recomputing changes no bit of loss and gradients, over several micro-batches, documents and a window."""
    run = Run(ParallelConfig(), 4, dtype, documents=True)
    loss, gradients = gloo.run(1, one_step, run)[0]
    again, ours = gloo.run(1, one_step, replace(run, engine=engine))[0]
    assert again == loss
    assert ours.keys() == gradients.keys()
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(2, Run(ParallelConfig(ep=2), 2, "fp64", STEPS, engine=FULL), id="full-ep2"),
        pytest.param(4, Run(ParallelConfig(ep=2), 1, "fp32", engine=FULL, documents=True), id="full-ep2-dp2", marks=LONG),
        pytest.param(4, Run(ParallelConfig(ep=2), 1, engine=SELECTIVE), id="selective-ep2-dp2", marks=LONG),
        pytest.param(4, Run(ParallelConfig(ep=2, cp=2), 2, engine=FULL, documents=True), id="full-cp2-ep2"),
        pytest.param(4, Run(ParallelConfig(ep=4, cp=2), 2, engine=SELECTIVE, documents=True), id="selective-cp2-ep4"),
        pytest.param(4, Run(ParallelConfig(ep=2), 2, engine=FULL, balance=GLOBAL), id="full-counts-over-ranks"),
    ],
)
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Collectives inside what is recomputed meet their partners; the run is that of one process without recomputation."""
    assert_same_run(gloo, world_size, run)


def _by_call_order(seed: int, step: int, layer: int, token_T: Tensor, blocks: int) -> Tensor:
    """What sampling must not do: random words that depend on how often they were asked for."""
    return torch.randint(0, 1 << 32, (token_T.numel(), 4 * blocks))


def routed_twice(call_order: bool) -> tuple[bool, bool, bool]:
    """Whether each layer's experts and weights were the same in forward and recomputation, and whether backward succeeded."""
    run = Run(ParallelConfig(ep=dist.get_world_size()), 2, "fp32", engine=FULL)
    engine = build_engine(run)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for layer in moe_layers(engine.model):
        layer.router.register_forward_hook(
            lambda router, args, out: seen.setdefault(router.layer, []).append((out[1].expert_TK, out[1].weight_TK.detach()))
        )
    batch = micro_batches(run, 0, engine.mesh)[:1]
    kept, failed = rng.routing_words, False
    if call_order:
        rng.routing_words = _by_call_order
    try:
        engine.train_step(batch, 0, 1e-3)
    except CheckpointError:
        failed = True
    finally:
        rng.routing_words = kept
    assert all(len(calls) == 2 for calls in seen.values()) or failed
    experts = all(torch.equal(calls[0][0], calls[1][0]) for calls in seen.values() if len(calls) == 2)
    weights = all(torch.equal(calls[0][1], calls[1][1]) for calls in seen.values() if len(calls) == 2)
    return experts, weights, failed


def test_recomputation_routes_nobody_anew(gloo: GlooPool) -> None:
    """Experts and weights of forward and recomputation are the same bits; draws by call order would not pass."""
    for same in gloo.run(2, routed_twice, False):
        assert same == (True, True, False)
    # One process only: ranks that disagreed about the sizes of an exchange would hang.
    same_experts, _, failed = gloo.run(1, routed_twice, True)[0]
    assert failed or not same_experts


class _Kept(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still alive: what a forward pass keeps, by whatever way."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self._made.values() if not reference.expired())


SEQUENCES, LENGTH = 4, 64
TOKENS = SEQUENCES * LENGTH


def kept_bytes(config: ModelConfig, dtype: torch.dtype, recompute: Recompute) -> int:
    """Bytes that the first block keeps for backward, its input included."""
    model = Transformer(config, ROUTER, BALANCE).to(dtype)
    init_parameters(model, config, 0)
    for layer in moe_layers(model):
        layer.router.float()
    apply_recompute(model, recompute)
    x_BSD = torch.randn(SEQUENCES, LENGTH, config.d_model, dtype=dtype, requires_grad=True)
    rope = rope_table(torch.arange(LENGTH).unsqueeze(0), config.head_dim, config.rope_theta, torch.float32)
    mask = model.attention_mask(LENGTH, 0, None, torch.device("cpu"))
    train = TrainRouting(Draws(0, 0, torch.arange(TOKENS)), TOKENS, torch.full((config.n_layers, 8), 1 / 8))
    with _Kept() as kept:
        y_BSD, stats = model.layers[0](x_BSD, rope, mask, train, None)
        del stats
    bytes_ = kept.alive() - y_BSD.untyped_storage().nbytes() + x_BSD.untyped_storage().nbytes()
    y_BSD.float().sum().backward()
    return bytes_


LONG = replace(MODEL, max_positions=LENGTH, window=LENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_experts", [8, 0])
def test_counted_bytes_are_what_a_block_keeps(n_experts: int, dtype: torch.dtype) -> None:
    """The budget's formula against the memory that is alive after forward."""
    config = replace(LONG, n_experts=n_experts, top_k=2 if n_experts else 1)
    measured = kept_bytes(config, dtype, Recompute())
    assert measured == pytest.approx(block_bytes(config, TOKENS, dtype.itemsize), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_keeps_less(dtype: torch.dtype) -> None:
    """Full keeps the input and little else; each part saves at least what it is for; together they save more."""
    kept = {part: kept_bytes(LONG, dtype, Recompute("selective", (part,))) for part in PARTS}
    everything = kept_bytes(LONG, dtype, Recompute())
    boundary = TOKENS * LONG.d_model * dtype.itemsize
    assert kept_bytes(LONG, dtype, Recompute("full")) == boundary
    rows = TOKENS * LONG.top_k
    assert everything - kept["expert_mlp"] >= rows * 2 * LONG.d_ff * dtype.itemsize
    assert everything - kept["attention_core"] >= TOKENS * LONG.n_heads * LONG.head_dim * dtype.itemsize
    assert everything - kept["norms"] >= boundary
    assert everything - kept["router"] >= rows * LONG.n_experts * 5
    assert boundary < kept_bytes(LONG, dtype, Recompute("selective", PARTS)) < min(kept.values())


def test_budget_takes_the_fewest_blocks() -> None:
    """Kept 100, input 10, four blocks: each recomputed one saves 90, but one at a time is whole again in backward."""
    for budget, blocks in {400: 0, 399: 2, 320: 2, 319: 3, 230: 3, 229: 4, 140: 4}.items():
        assert blocks_to_recompute(100, 10, 4, 1, budget) == blocks, budget
    assert [blocks_to_recompute(100, 10, 4, 2, budget) for budget in (800, 799, 719)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"engine\.recompute_budget_gib"):
        blocks_to_recompute(100, 10, 4, 1, 139)


def test_budget_recomputes_the_blocks_it_says() -> None:
    """The chosen number of blocks is checkpointed, no more."""
    model = Transformer(replace(LONG, n_layers=4), ROUTER, BALANCE)
    kept, boundary = block_bytes(LONG, TOKENS, 4), TOKENS * LONG.d_model * 4
    apply_recompute(model, Recompute("budget", budget=2 * kept + 2 * boundary + kept, tokens=TOKENS, itemsize=4))
    assert [hasattr(block.forward, "__wrapped__") for block in model.layers] == [True, True, False, False]


def test_rules() -> None:
    """Each refusal names field, value and rule."""
    assert "engine.recompute_budget_gib: 0.0" in EngineConfig(recompute="budget").violations()[0]
    assert "engine.recompute_parts" in EngineConfig(recompute="selective", recompute_parts=()).violations()[0]
    assert EngineConfig(recompute="selective").violations() == []
