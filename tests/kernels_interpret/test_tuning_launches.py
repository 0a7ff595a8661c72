"""Tuning's own launches in the interpreter: every product runs, and a candidate with any wrong output is refused."""

from collections.abc import Callable

import pytest
import torch

from megagrin.kernels.tuning import BlockConfig
from megagrin.planning.kernel_tuning import CudaMeasure, Launches, LayerShape, Product, products

LAYER = LayerShape(tokens=21, d_model=72, d_ff=40, n_experts=4, top_k=2)
BLOCKS = [BlockConfig(32, 64, 32, 4, 2, group_m=2, slices=4), BlockConfig(64, 32, 32, 4, 2, slices=2)]


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Product], list[bool]]:
    """Which of BLOCKS pass the check that comes before the timing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    cpu = torch.device("cpu")

    def run(product: Product) -> list[bool]:
        launches = Launches(product, torch.bfloat16, cpu)
        return [run is not None for run in CudaMeasure(torch.bfloat16, cpu)._verified(launches, BLOCKS)]

    return run


@pytest.mark.parametrize("product", products(LAYER), ids=lambda product: f"{product.op}-{product.n}-{product.k}")
def test_every_product_is_launched(product: Product, accepted: Callable[[Product], list[bool]]) -> None:
    assert accepted(product) == [True, True]


FAULTS = {
    "nothing written": lambda launches: None,
    "dh": lambda launches: launches.outputs[0][:1].add_(1),
    "act": lambda launches: launches.outputs[1][:1].add_(1),
    "dv": lambda launches: launches.parts[:1].add_(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_candidate_is_refused(
    fault: str, accepted: Callable[[Product], list[bool]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong in one output alone, or leaving the memory as the fallback left it."""
    prepare = Launches.prepare

    def broken(self: Launches, blocks: BlockConfig) -> Callable[[], None]:
        run = prepare(self, blocks)
        if blocks == BLOCKS[0]:
            return run

        def wrong() -> None:
            if fault != "nothing written":
                run()
            FAULTS[fault](self)

        return wrong

    monkeypatch.setattr(Launches, "prepare", broken)
    (down_dgrad,) = (product for product in products(LAYER) if product.op == "down_dgrad")
    assert accepted(down_dgrad) == [True, False]
    assert "refused: its result is off by" in capsys.readouterr().out
