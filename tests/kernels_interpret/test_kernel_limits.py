"""What small tests on a CPU would not show by themselves: addresses beyond 31 bits, and waiting for the device.

Shape suffixes: T tokens, R routed rows, D model width, F expert width.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import assert_near, normal

from megagrin.kernels import moe_mlp_triton
from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.grouped_gemm_triton import build_schedule
from megagrin.kernels.tuning import BlockConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig


def test_tokens_are_gathered_from_beyond_31_bits() -> None:
    """Tokens of 2^31 numbers and more; only the pages that are touched exist."""
    d_model, d_ff, rows = 1024, 32, 3
    first = (1 << 31) // d_model
    x_TD = torch.empty(first + rows, d_model, dtype=torch.bfloat16)
    x_TD[first:] = normal(rows, d_model, seed=1)
    up = (0.05 * normal(1, 2 * d_ff, d_model, seed=2)).bfloat16()
    source_R = torch.arange(first, first + rows).flip(0)
    act_RF, counts = torch.full((rows, d_ff), torch.nan, dtype=torch.bfloat16), torch.tensor([rows])
    blocks = BlockConfig(32, 64, 128, 4, 2, slices=2, gather=True)
    schedule = build_schedule(counts, rows, blocks.block_m)
    moe_mlp_triton.up_swiglu_launch(x_TD, source_R, up, torch.ones(rows), None, act_RF, schedule, blocks).run()
    h = (x_TD[first:].flip(0).double() @ up[0].double().T).bfloat16().double()
    assert_near(act_RF, h[:, 0::2] * torch.sigmoid(h[:, 0::2]) * h[:, 1::2])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where this project's code asks a tensor for numbers, which on CUDA waits for the device."""
    found: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        method = getattr(torch.Tensor, name)

        def asked(self: torch.Tensor, *args: Any, name: str = name, method: Callable[..., Any] = method) -> Any:
            caller = sys._getframe(1)
            if "megagrin." in caller.f_globals.get("__name__", ""):
                found.append(f"{caller.f_globals['__name__']}:{caller.f_lineno} {name}")
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, asked)
    return found


def test_a_layer_and_the_loss_never_wait(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, tile lists and labels stay on the device, forward and backward; the reference's loop over experts does wait."""
    layer = MoELayer(32, 16, 4, 2, 0, RouterConfig(mask_eps=0.3), BalanceConfig(scope="local"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_BSD, w_VD = normal(1, 9, 32, seed=1, dtype=torch.bfloat16), normal(40, 32, seed=2, dtype=torch.bfloat16)
    train = TrainRouting(Draws(1, 2, torch.arange(9)), 9, torch.full((1, 4), 0.25))

    def step() -> None:
        leaves = x_BSD.clone().requires_grad_(), w_VD.clone().requires_grad_()
        y_BSD, _ = layer(leaves[0], train)
        linear_cross_entropy(y_BSD.flatten(0, 1), leaves[1], None, torch.arange(9)).backward()

    step()
    assert waits == []
    monkeypatch.setenv("MEGAGRIN_KERNELS", "torch")
    step()
    assert any("grouped_gemm" in wait for wait in waits)
