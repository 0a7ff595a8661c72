"""The model on CUDA: it takes the kernels, repeats bit for bit, and trains as on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, build_mesh
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.grin import GRIN_TINY
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig
from megagrin.optim.optimizer import OptimConfig

KERNELS = {
    "count_kernel",
    "place_kernel",
    "gather_rows_kernel",
    "sparsemixer_sums",
    "schedule_kernel",
    "m_grouped_kernel",
    "wgrad_kernel",
    "up_swiglu_kernel",
    "down_dgrad_kernel",
    "gather_sum_kernel",
    "sparsemixer_forward",
    "sparsemixer_backward",
    "cross_entropy_statistics",
    "cross_entropy_gradient",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the Triton kernels that are launched in the test."""
    from triton.runtime.jit import JITFunction

    names: set[str] = set()
    run = JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        names.add(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", noted)
    return names


def layer_and_inputs() -> tuple[MoELayer, Tensor, TrainRouting]:
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(128, 72, 8, 2, 0, RouterConfig(mask_eps=0.3), BalanceConfig(scope="local"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    x_BSD = torch.randn(2, 333, 128, generator=generator).to("cuda", torch.bfloat16)
    draws = Draws(1, 2, torch.arange(666, device="cuda"))
    return layer.cuda(), x_BSD.requires_grad_(), TrainRouting(draws, 666, torch.full((1, 8), 1 / 8, device="cuda"))


def test_a_layer_repeats_bit_for_bit() -> None:
    layer, x_BSD, train = layer_and_inputs()
    dy = torch.randn_like(x_BSD)
    first: list[Tensor] | None = None
    for _ in range(10):
        y, _ = layer(x_BSD, train)
        found = [y, *torch.autograd.grad(y, [x_BSD, *layer.parameters()], dy)]
        first = first or found
        for index, (a, b) in enumerate(zip(first, found, strict=True)):
            assert torch.equal(a, b), f"result {index} changed"


def test_a_layer_never_waits_for_the_device() -> None:
    """No size comes to the host, forward or backward."""
    layer, x_BSD, train = layer_and_inputs()
    dy = torch.randn_like(x_BSD)

    def step() -> None:
        torch.autograd.grad(layer(x_BSD, train)[0], [x_BSD, *layer.parameters()], dy)

    step()  # compiling and the tables of blocks may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(steps: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(4 * 64).view(4, 64)
    found = []
    for _ in range(steps):
        text = torch.randint(0, GRIN_TINY.vocab_size, (4, 65), generator=generator)
        found.append(Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), index % 64, None, index))
    return found


def micro_batches(batch: Batch) -> list[Batch]:
    """Two of them, so that gradients are added up."""
    parts = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.token_index_BS)
    halves = zip(*(part.chunk(2) for part in parts), strict=True)
    return [Batch(tokens, labels, positions, None, index) for tokens, labels, positions, index in halves]


def train(device: str, dtype: str) -> list[Any]:
    with session(RuntimeConfig(device=device)) as runtime:  # type: ignore[arg-type]
        config = EngineConfig(dtype=dtype, zero=1)  # type: ignore[arg-type]
        mesh = build_mesh(ParallelConfig(), device)
        parts = (replace(GRIN_TINY, n_layers=2), RouterConfig(), BalanceConfig(), OptimConfig(), config, mesh, runtime.device)
        engine = NativeEngine(*parts, seed=0)
        return [engine.train_step(micro_batches(batch), step, 1e-3) for step, batch in enumerate(batches(3))]


def test_training_takes_the_kernels(launched: set[str]) -> None:
    train("cuda", "bf16")
    assert KERNELS - launched == set()


def test_reference_is_forced_by_the_environment(launched: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAGRIN_KERNELS", "torch")
    layer, x_BSD, train_ = layer_and_inputs()
    layer(x_BSD, train_)[0].float().sum().backward()
    assert launched == set()


def test_steps_in_fp32_agree_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, cpu in zip(train("cuda", "fp32"), train("cpu", "fp32"), strict=True):
        assert cuda.loss == pytest.approx(cpu.loss, rel=1e-4)
        assert cuda.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-2)
        # Logits differ in their last bits between devices: a draw beside a boundary may fall on the other side.
        moved = (cuda.counts_LE - cpu.counts_LE).abs().sum() / cpu.counts_LE.sum()
        assert moved < 0.02, moved
